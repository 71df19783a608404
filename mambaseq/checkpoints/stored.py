"""The files of a published model's weights: one, or the parts that an index lists, safetensors or `.bin`, whose code is
never run. Tensors are read some at a time, so that a large model needs little more memory than its own."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.checkpoints.export import described_in, read_safetensors
from mambaseq.errors import UserError, cut, shown
from mambaseq.limits import INDEX_BYTES, check_unpacked
from mambaseq.plain import read_json

WEIGHTS = tuple(f"{name}{kind}" for name in ("model.safetensors", "pytorch_model.bin") for kind in ("", ".index.json"))
"""The files in which weights may be, or that list the parts; the first one that is there counts."""

REMEDY = "Download it again, from the same place as the weights."
REMEDY_OF_WEIGHTS = (
    "Download them again, with the config.json that belongs to them, or compare their SHA-256 with the publisher's."
)
"""For weights that were not trained here: damaged, incomplete or not finite."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)

logger = logging.getLogger(__name__)

_CALLED = re.compile(r"GLOBAL (\S+)")  # what a pickle would call or make, in PyTorch's refusal


def weights_in(folder: Path) -> Path:
    """The file with the weights of a published model. Raises UserError if there is none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"There is neither model.safetensors nor pytorch_model.bin in {folder}.")


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file with the weights of a published model, or their index, and its tensors by name. No code is unpickled.

    Raises UserError if they are missing or damaged.
    """
    source = weights_in(folder)
    return source, {name: tensor for part in _parts(source) for name, tensor in _read(part).items()}


class StoredWeights:
    """Weights that stay in their files until they are asked for.

    source: the file, or the index. described: tensors on the meta device, by name, in the order of the files.
    Raises UserError if files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.source = weights_in(folder)
        self._places: dict[str, Path] = {}
        self.described: dict[str, Tensor] = {}
        for part in _parts(self.source):
            for name, tensor in _described(part).items():
                self.described[name], self._places[name] = tensor, part

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, by name. They lie in mapped files, whose memory is returned when the last of them is gone.

        Raises UserError if a file is damaged.
        """
        found: dict[str, Tensor] = {}
        by_part: dict[Path, list[str]] = {}
        for name in names:
            by_part.setdefault(self._places[name], []).append(name)
        for part, some in by_part.items():
            found |= _read(part, some)
        return found


def check_quantised(tensors: Mapping[str, Tensor], source: Path, told: Any, config: Path) -> None:
    """Raise UserError for weights in whole numbers or 8 bits, which mean nothing without a scale; say that the setting
    is left out where they are not.

    tensors: those that hold weights, by their names in the file. told: `quantization_config` of the configuration, None
    where it has none.
    """
    method = told.get("quant_method") if isinstance(told, dict) else told
    by = "" if told is None else f" (quantization_config in {config.name}: {shown(method)})"
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{source}: {shown(name)} is {str(tensor.dtype).removeprefix('torch.')}: the weights are quantised"
                f"{by}, and only those in 16 or 32 bits can be loaded. Download the checkpoint that was not quantised."
            )
    if told is not None:
        logger.warning(
            "%s has a quantization_config (%s), but the weights beside it are not quantised: it is left out.",
            config,
            shown(method),
        )


def _parts(source: Path) -> list[Path]:
    """The files of weights: one, or those that an index lists. Raises UserError for an index that is none, or that
    names what is not beside it."""
    if source.suffix != ".json":
        return [source]
    names = parts_in(source)
    for name in names:
        if not (source.parent / name).is_file():
            raise UserError(f"{source} names {shown(name)}, which is no file beside it. {REMEDY}")
    return [source.parent / name for name in names]


def parts_in(index: Path) -> list[str]:
    """The files that an index of weights lists. Raises UserError for one that is none, or that names a path."""
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or name in ("", "."):
            raise UserError(f"{index} names {shown(name)}, which is no file beside it. {REMEDY}")
    return names


def promised(source: Path) -> dict[str, Path]:
    """The part that holds each tensor, as an index says; nothing for a file of weights that has none. Raises UserError
    for an index that is none."""
    if source.suffix != ".json":
        return {}
    return {name: source.parent / part for name, part in _weight_map(source).items()}


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index, REMEDY, INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} must have a weight_map, names of tensors to names of files. {REMEDY}")
    return found


def _read(path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """names: only these."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, names, REMEDY_OF_WEIGHTS)
    tensors = _read_bin(path)
    return tensors if names is None else {name: tensors[name] for name in names if name in tensors}


def _described(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the meta device."""
    if path.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in _read_bin(path).items()}
    return described_in(path, REMEDY_OF_WEIGHTS)


def _check_unpacked(path: Path) -> None:
    """Refuse compressed members: a file of tensors is an uncompressed zip, but PyTorch would unpack compressed
    members."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
        check_unpacked(size, path.stat().st_size, str(path))


def _read_bin(path: Path) -> dict[str, Tensor]:
    remedy = "Download it again, or take the checkpoint's model.safetensors."
    try:
        _check_unpacked(path)
        mapped = zipfile.is_zipfile(path)  # others are of PyTorch before 1.6, and are read whole
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # torch's error depends on where the file was cut
        if called := _CALLED.search(str(error)):
            raise UserError(
                f"The weights in {path} cannot be read: the file holds more than tensors, and asks for "
                f"{shown(called[1])}. No code from a checkpoint is run. Take the checkpoint's model.safetensors, or "
                "leave it."
            ) from error
        # PyTorch's first line may be its advice to load without `weights_only`, which is none for a stranger's file
        lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
        raise UserError(
            f"The weights in {path} cannot be read ({type(error).__name__}: {cut((lines or [''])[0], 120)}): the file "
            f"is damaged, or holds more than tensors. {remedy}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} is not a mapping of names to tensors. {remedy}")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path}: {shown(name)} is sparse or quantised, not a plain tensor. {remedy}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # one number may stand for any amount of memory
            raise UserError(f"{path}: {shown(name)} is {tuple(tensor.shape)}, but fewer numbers are there. {remedy}")
    return tensors
