"""What a model gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mambaseq.heads.distributions import Distribution
from mambaseq.trees import register_tree


@dataclasses.dataclass
class ModelOutput:
    """loss: scalar, if labels were given. logits: None if only the loss was needed. state: one for each layer.
    distribution: of the next values, by the logits of a head such as `forecast`.

    Names and numbers index it, as in outputs of transformers. What is None is left out, so `output[0]` is the loss, or
    the logits if no labels were given. Iterating gives the names. `values` is not a method here.

    >>> import torch
    >>> output = ModelOutput(logits=torch.zeros(1, 2, 3))
    >>> list(output), output["logits"].shape, len(output[1:])
    (['logits'], torch.Size([1, 2, 3]), 0)
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: list[Any] | None = None
    distribution: Distribution | None = None

    def keys(self) -> list[str]:
        """The names of what is not None."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of what is not None."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None."""
        return tuple(value for _, value in self.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        """Raises KeyError or IndexError for a name or number of what is missing."""
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    @property
    def values(self) -> Tensor | None:
        """The predicted values of a head that learns values, one for each target, in the targets' shape."""
        return self.logits if self.distribution is None else self.distribution.point()


register_tree(ModelOutput, "mambaseq.models")
