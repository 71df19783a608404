"""What a dataset hands to a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from mambaseq.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass
class Batch:
    """One batch of sequences of any modality.

    inputs: `(batch, length)` int64 token ids, `(batch, length, codes)` int64 for several codes at a position, or
        `(batch, length, channels)` float32 for continuous signals.
    targets: of whole sequences `(batch,)` int64 class labels, or float32 values `(batch,)` or `(batch, n_outputs)`; of
        positions `(batch, length)` int64, one each, such as next tokens (already shifted: `targets[:, t]` is what
        position t predicts), or float32 values `(batch, length, n_outputs)`. Several labels, any of which may apply,
        are 1 and 0 in one more dimension: `(batch, length, n_labels)` int64, or, with `target_of="sequence"`, `(batch,
        n_labels)`. A target that is unknown, and must not count in the loss, is -100 among integers and NaN among
        floats.
    mask: `(batch, length)` bool, True at real positions; None means all of them. Sequences are padded on the right
        only, so a causal model never sees padding before a real position.
    cu_seqlens: `(sequences + 1,)` int32, for packed batches (batch 1); targets of sequences are `(sequences, ...)`.
    condition: what the sequence is conditioned on (a speaker, a digit, a species). One condition of names: `(batch,)`
        int64 ids. Several, or numbers: `(batch, conditions)` int64, rows of `mambaseq.conditions.row`.
    n_units: how many units of the raw data the targets stand for (bytes of the text), if that differs from the number
        of targets; metrics "per byte" divide by it.
    target_of: "position", "sequence" or "code": what a target belongs to. Of several codes at a position, each has one
        label: `(batch, length, codes)` int64. None: integers with two dimensions and floats with
        three belong to positions, others to sequences. Give it where that is wrong: "sequence" for several labels a
        sequence, `(batch, n_labels)` int64; "position" for one float each, `(batch, length)`.
    stride: positions that share one target (a bin). Each sequence has `ceil(length / stride)` bins; those of packed
        sequences follow each other.
    """

    inputs: torch.Tensor
    targets: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    condition: torch.Tensor | None = None
    n_units: torch.Tensor | None = None
    target_of: Literal["position", "sequence", "code"] | None = None
    stride: int = 1

    @property
    def per_token(self) -> bool:
        """Whether there is a target (or a row of values) for each position, or each bin of `stride` positions, rather
        than for whole sequences. Does not wait for a GPU.

        Raises DataError if there is, but their number is not that of the positions.
        """
        targets = self.targets
        if targets is None or self.target_of == "sequence":
            return False
        if self.target_of is None and targets.dim() < (3 if targets.is_floating_point() else 2):
            return False
        if self.stride < 1:
            raise DataError(f"Batch.stride must be at least 1, not {self.stride}.")
        rows, length = self.inputs.shape[:2]
        count = -(-length // self.stride)
        # each packed sequence may end with a bin that is not full; the head counts them
        packed = self.stride > 1 and self.cu_seqlens is not None and targets.shape[1] >= count
        if targets.shape[0] != rows or not (targets.shape[1] == count or packed):
            bins = f" in bins of {self.stride} (Batch.stride)" if self.stride > 1 else ""
            raise DataError(
                f"Targets {tuple(targets.shape)} are one for each position{bins}, which are {(rows, length)}. "
                f"Give as many, or, for several labels or values of a whole sequence, Batch(target_of='sequence')."
            )
        return True

    @property
    def kind(self) -> Literal["labels", "multilabels", "values"]:
        """What the targets are: "values" (floats), "labels" (one of several classes each), or "multilabels" (for each
        of several labels, whether it applies). "labels" if there are none."""
        if self.targets is None or self.target_of == "code":
            return "labels"
        if self.targets.is_floating_point():
            return "values"
        return "multilabels" if self.targets.dim() > 1 + self.per_token else "labels"

    @property
    def n_targets(self) -> torch.Tensor:
        """How many known targets there are, `()` int64: integers that are not -100, floats that are not NaN; the number
        of sequences if there are no targets. It is the weight of a batch's mean loss. Does not wait for a GPU."""
        targets = self.targets
        if targets is None:
            bounds = self.cu_seqlens
            like = self.inputs if bounds is None else bounds
            return like.new_zeros(()).long() + (len(like) if bounds is None else len(bounds) - 1)
        return (~targets.isnan() if targets.is_floating_point() else targets != -100).sum()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """A batch with `function` applied to every tensor."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("target_of", "stride")]
        tensors = {name: getattr(self, name) for name in names}
        mapped: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self, **mapped)

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Move every tensor, as `torch.Tensor.to` does."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Batch:
        return self.map(lambda tensor: tensor.pin_memory())
