"""What a dataset hands to a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass
class Batch:
    """One batch of sequences of any modality.

    inputs: `(batch, length)` int64 token ids, or `(batch, length, channels)` float32 for continuous signals.
    targets: `(batch, length)` int64 next tokens (already shifted: `targets[:, t]` is what position t predicts,
        -100 where nothing is to be predicted), or `(batch,)` int64 class labels, or float32 for regression,
        `(batch,)` or `(batch, n_outputs)`.
    mask: `(batch, length)` bool, True at real positions; None means all of them. Sequences are padded on the
        right only, so a causal model never sees padding before a real position.
    cu_seqlens: `(sequences + 1,)` int32, for packed batches (batch 1); targets of classes are `(sequences,)`.
    condition: `(batch,)` int64, what the sequence is conditioned on (a speaker, a digit, a species).
    n_units: how many units of the raw data the targets stand for (bytes of the text behind the tokens), where
        it differs from the number of targets; metrics "per byte" divide by it.
    """

    inputs: torch.Tensor
    targets: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    condition: torch.Tensor | None = None
    n_units: torch.Tensor | None = None

    @property
    def per_token(self) -> bool:
        """Whether the targets are one for each position, not labels or values of whole sequences."""
        targets = self.targets
        if targets is None or targets.dim() != 2 or targets.is_floating_point():
            return False
        return targets.shape[1] == self.inputs.shape[1]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """A batch whose every tensor is `function(tensor)`."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: function(v) for k, v in tensors.items() if v is not None})

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Move every tensor, as `torch.Tensor.to` does."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Batch:
        return self.map(lambda tensor: tensor.pin_memory())
