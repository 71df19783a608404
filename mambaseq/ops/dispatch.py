"""Which implementation of an op runs: a table of backends per op, fastest first.

An op is a function of one `NamedTuple` of arguments that returns a tuple of tensors. Every backend implements
all of its definition for the arguments that it accepts, and says why it does not accept the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.errors import BackendError, shown
from mambaseq.ops.eager import wants_reference

Result = tuple[Tensor, Tensor]

# backends that other people's packages bring
PACKAGES = ("mamba_ssm", "fla")


class Backend(NamedTuple):
    """One implementation: `run(arguments)`, and why it would not run for some arguments (None: it would)."""

    name: str
    run: Callable[[Any], Result]
    why_not: Callable[[Any], str | None]


class Op(NamedTuple):
    """An op: its backends, fastest first and the definition ("reference") last, and small inputs to try.

    `samples(device)` yields `(label, arguments)` in float32. `half(arguments)`: the same for backends that take half
    precision alone, where there are such.
    """

    name: str
    backends: tuple[Backend, ...]
    samples: Callable[[torch.device], Iterator[tuple[str, Any]]]
    half: Callable[[Any], Any] | None = None

    def in_half(self) -> Op | None:
        """The same op with samples in half precision, or None."""
        half, samples = self.half, self.samples
        if half is None:
            return None
        return self._replace(samples=lambda device: ((label, half(made)) for label, made in samples(device)))


def never(arguments: Any) -> str | None:
    """`why_not` of a backend that runs whatever the arguments are."""
    return None


def run(op: Op, arguments: Any, backend: str | None = None) -> Result:
    """Run the named backend, or the fastest that accepts the arguments; within `only_reference` the reference.

    Raises:
        BackendError: the backend of that name does not accept these arguments; says why. A ValueError, too.
        ValueError: there is no backend of that name.
    """
    if wants_reference():
        backend = "reference"
    for candidate in op.backends:
        if backend is not None and candidate.name != backend:
            continue
        reason = candidate.why_not(arguments)
        if reason is None:
            return candidate.run(arguments)
        if backend is not None:
            raise BackendError(
                f"{op.name}: backend {shown(backend)} cannot run these arguments: {reason}. Leave backend out for the "
                "fastest that can: null in a configuration (--model.mixer.backend null for fit), or in a saved model's "
                "model.json."
            )
    if backend is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(op, arguments))
        raise ValueError(f"{op.name}: no backend can run these arguments ({reasons})")
    known = ", ".join(repr(candidate.name) for candidate in op.backends)
    raise ValueError(f"{op.name}: no backend {shown(backend)}; there are {known}")


def explain(op: Op, arguments: Any) -> list[tuple[str, str | None]]:
    """Every backend in order of preference with the reason why it would not run (None: it would).

    The first with None is the one that `backend=None` picks.
    """
    return [(backend.name, backend.why_not(arguments)) for backend in op.backends]


def relative_rms_error(actual: Tensor, expected: Tensor) -> float:
    """`rms(actual - expected) / rms(expected)` in double precision, of two tensors of one shape: the error itself where
    `expected` is 0, NaN if `actual` holds one."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.to(wide), expected.to(wide)
    if expected.numel() == 0:
        return 0.0
    scale = torch.linalg.vector_norm(expected).item()
    error = torch.linalg.vector_norm(actual - expected).item()
    return error / scale if scale > 0 else error


def check(op: Op, device: torch.device | str = "cpu") -> dict[str, float | str]:
    """Hold every backend against the reference in float64 on this machine, on the op's small samples.

    Returns:
        name of the backend → the largest relative RMS error of any output or gradient over the samples that
        it accepts, or, where it accepts none, the reason.
    """
    reference = op.backends[-1]
    found: dict[str, float | str] = {}
    for _, arguments in op.samples(torch.device(device)):
        expected: list[Tensor] | None = None
        for backend in op.backends:
            reason = backend.why_not(leaves(arguments))
            if reason is not None:
                found.setdefault(backend.name, reason)
                continue
            actual = outputs_and_gradients(backend, arguments)
            if expected is None:
                expected = outputs_and_gradients(reference, arguments, double=True, like=[a.dtype for a in actual])
            errors = (relative_rms_error(a, e) for a, e in zip(actual, expected, strict=True))
            worst = max(e if math.isfinite(e) else math.inf for e in errors)  # max() passes over NaN
            before = found.get(backend.name)
            found[backend.name] = max(worst, before) if isinstance(before, float) else worst
    return found


def leaves(arguments: Any, *, double: bool = False) -> Any:
    """The same arguments, every floating-point one a leaf that asks for a gradient, in float64 if `double`."""
    return type(arguments)(*(leaf(value, double=double) for value in arguments))


def leaf(value: Any, *, double: bool = False) -> Any:
    """A real or complex tensor as one that asks for a gradient, in float64 or complex128 if `double`; all else as it
    is."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    if double:
        value = value.to(torch.complex128 if value.is_complex() else torch.float64)
    return value.detach().requires_grad_()


def outputs_and_gradients(
    backend: Backend, arguments: Any, *, double: bool = False, like: Sequence[torch.dtype] = ()
) -> list[Tensor]:
    """The outputs, and the gradients of every floating-point argument for fixed pseudo-random cotangents.

    Where the arguments say that the final state is not wanted, it is left out.

    Args:
        double: in float64.
        like: dtypes of the outputs (and of what follows them) with which these are compared. Cotangents are rounded to
            them first, so that gradients differ by what a backend rounds and not by what it was given.
    """
    inputs = leaves(arguments, double=double)
    outputs: tuple[Tensor, ...] = backend.run(inputs)
    if not getattr(arguments, "wants_final_state", True):
        outputs = outputs[:1]
    generator = torch.Generator().manual_seed(0)
    cotangents = []
    for output, dtype in zip(outputs, like or [output.dtype for output in outputs], strict=False):
        shape = (*output.shape, 2) if output.is_complex() else output.shape
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.view_as_complex(noise) if output.is_complex() else noise
        cotangents.append(noise.to(output.device, dtype).to(output.dtype))
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
    return [*(output.detach() for output in outputs), *gradients]
