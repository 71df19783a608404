"""Cross-entropy of a linear map to a vocabulary, without the logits of all rows ever existing."""

from __future__ import annotations

from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.linear_cross_entropy import arguments as _arguments
from mambaseq.ops.linear_cross_entropy import chunked, gpu, reference
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments

OP = dispatch.Op(
    name="linear_cross_entropy",
    backends=(
        dispatch.Backend("cpu", chunked.run, chunked.why_not_cpu),
        dispatch.Backend("triton", gpu.run, gpu.why_not),
        dispatch.Backend("torch", chunked.run, dispatch.never),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str | None = None
) -> Tensor:
    """The sum over rows of the cross-entropy of `softmax(hidden @ weight.T)` at their labels, in nats.

    Under autocast hidden and weight are used in its dtype; without it they must have one dtype, which the logits have
    too. The softmax and the sums are in float32 (float64 if the inputs are).

    Args:
        hidden: `(rows, d_model)`.
        weight: `(vocab, d_model)`.
        labels: `(rows,)` int64, from 0 to vocab - 1, or `ignore_index`. Any other is an error on CPU; a GPU, which
            nobody waits for, gives a loss and gradients that are NaN.
        ignore_index: the label of a row that does not count.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        The loss, a single number, float32 (float64 if the inputs are). Gradients have the dtypes of the inputs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = LossArguments(hidden, weight, labels, ignore_index)
    _arguments.check(arguments)
    return dispatch.run(OP, arguments, backend)[0]
