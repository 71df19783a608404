"""What was read of a prompt, saved and used again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from mambaseq.arguments import DTYPES
from mambaseq.atomic import json_text
from mambaseq.backbones.pooling import PoolState
from mambaseq.errors import DataError, cut, shown
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import prefill
from mambaseq.mixers.growing import GrowingState
from mambaseq.models import SequenceModel
from mambaseq.outputs import output_file

_FORMAT, _KEY = 1, "mambaseq_state"


@dataclasses.dataclass(frozen=True)
class Begun:
    """A sequence that was read: `ids` `(length,)`, the state behind them (a list of layers, of one sequence), and what
    the head tells of the last, `(1, ...)`.

    condition: ids under which it was read. hidden: how many of the first ids are no part of a result.
    """

    ids: np.ndarray
    state: list[Any]
    told: Tensor
    condition: int | tuple[int, ...] | None = None
    hidden: int = 0

    def on(self, model: SequenceModel, ids: np.ndarray) -> Begun:
        """With further ids read; this one stays as it is."""
        if not len(ids):
            return self
        state, told = prefill(model, Prompts([ids], self.told.device), self.under(), self.state)
        return dataclasses.replace(self, ids=np.concatenate([self.ids, ids.astype(np.int64)]), state=state, told=told)

    def under(self) -> Tensor | None:
        """The condition as a model takes it."""
        return None if self.condition is None else torch.tensor([self.condition], device=self.told.device)

    @classmethod
    def of(
        cls,
        model: SequenceModel,
        ids: np.ndarray,
        condition: int | tuple[int, ...] | None,
        device: torch.device,
        hidden: int = 0,
    ) -> Begun:
        """Read from the beginning."""
        under = None if condition is None else torch.tensor([condition], device=device)
        state, told = prefill(model, Prompts([ids], device), under)
        return cls(ids.astype(np.int64), state, told, condition, hidden)


def save_state(begun: Begun, path: Path, digest: str) -> None:
    """Write it whole or not at all, as safetensors. digest: of the model, which alone may go on."""
    tensors = {"told": begun.told, "ids": torch.from_numpy(begun.ids)}
    for number, layer in enumerate(begun.state):
        tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.tensors().items()}
    said = {"format": _FORMAT, "model": digest, "condition": begun.condition, "hidden": begun.hidden}
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {_KEY: json_text(said)})
    with output_file(path) as file:
        file.write(data)


def load_state(path: Path, model: SequenceModel, digest: str, device: torch.device) -> Begun:
    """What `save_state` wrote. Raises DataError for a file that is none, or damaged, or of another model, or
    of its weights in another dtype."""
    remedy = "Give a file that --save-state wrote."
    try:
        with safetensors.safe_open(str(path), "pt", device="cpu") as file:
            said = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(said, dict) or said.get("format") != _FORMAT:
                raise DataError(f"{path} holds no state that this mambaseq knows. {remedy}")
            if said["model"] != digest:
                raise DataError(
                    f"{path} is the state of another model: the checksum of its weights differs. Give --checkpoint "
                    f"that one, or read the prompt again."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        begun = _begun(said, tensors, model, device)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"The state {shown(path, 300)} cannot be read: {cut(error, 200)}. {remedy}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged, or not this model's state: {cut(error, 200)}. {remedy}") from error
    return begun


def _begun(said: dict[str, Any], tensors: dict[str, Tensor], model: SequenceModel, device: torch.device) -> Begun:
    """Raises ValueError or KeyError for tensors that are not the model's, DataError for those of weights in another
    dtype."""
    state = []
    for number, layer in enumerate(model.init_state(1)):
        found = {}
        for name, like in layer.tensors().items():
            tensor = tensors.pop(f"layers.{number}.{name}")
            grows = isinstance(layer, GrowingState) and name in layer.rows
            begin = 2 if grows else 0
            if tensor.shape[begin:] != like.shape[begin:] or tensor.dim() != like.dim():
                raise ValueError(f"layer {number}'s {name} is {tuple(tensor.shape)}")
            if tensor.dtype != like.dtype:
                theirs, own = (str(one.dtype).removeprefix("torch.") for one in (tensor, like))
                if not {theirs, own} <= {*DTYPES}:
                    raise ValueError(f"layer {number}'s {name} is {theirs}")
                raise DataError(
                    f"The state was made with weights in {theirs}, and these are in {own}. Give --dtype {theirs}, or "
                    "read the prompt again."
                )
            found[name] = tensor.to(device)
        made = layer.map(lambda tensor: tensor)
        for name, tensor in found.items():
            setattr(made, name, tensor)
        if isinstance(made, GrowingState):
            made.longest = int(made.length.max())
            if made.length.min() < 0 or any(getattr(made, name).shape[:2] != (1, made.capacity) for name in made.rows):
                raise ValueError(f"layer {number}'s rows are not those of one sequence")
            if made.longest > made.capacity:
                raise ValueError(f"layer {number} has fewer rows than positions")
        if isinstance(made, PoolState) and not 0 <= int(made.count) <= made.begun.shape[1]:
            raise ValueError(f"layer {number}'s window is longer than it can be")
        state.append(made)
    ids, told = tensors.pop("ids"), tensors.pop("told")
    if ids.dtype != torch.int64 or not len(ids) or len(told) != 1 or tensors:
        raise ValueError("there are other tensors than a state's")
    condition, hidden = said["condition"], int(said["hidden"])
    if isinstance(condition, list):
        condition = tuple(map(int, condition))
    return Begun(ids.numpy(), state, told.to(device), condition, hidden)
