"""Training checkpoints of which every process writes its part (torch.distributed.checkpoint).

`last.ckpt` is then a small file with all but the tensors, which names the folder of parts beside it,
`last.ckpt.TAG.parts`. It is replaced once all parts are there, and the folder that it named before is removed after
that: whatever is killed, and when, the file names a folder that is whole.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import re
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader

from mambaseq.atomic import atomic_file, sync

PARTS = "parts"
"""The key of a checkpoint's file that names the folder with its tensors."""

Tensors = Literal["all", "weights", "none"]
"""Which tensors of a checkpoint are read: those of the optimizer are twice as many as the weights."""

_FOLDER = re.compile(r"[\w.-]+\.[0-9a-f]{8}\.parts")
_FILE = re.compile(r"__\d+_\d+\.distcp")
# of the pickle that PyTorch writes: a file may be somebody else's, so it can name nothing else
_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
        *("StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", *sorted(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


def check_sums(file: IO[bytes]) -> None:
    """Raise BadZipFile if a part of the archive differs from its checksum. torch writes checksums but does not compare
    them. 500 MB take 0.2 s, next to 0.5 s for loading, which then finds the file in memory."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch does not do")
            with archive.open(entry) as part:
                while part.read(1 << 22):
                    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"its .metadata names {module[:100]}.{name[:100]}")
        return super().find_class(module, name)


class PartsReader(FileSystemReader):
    """Reads a folder of parts: tensors only, no code, each compared with its checksum, none larger than the files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        folder = Path(self.path)
        with (folder / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, dcp_metadata.Metadata):
            raise TypeError(f"its .metadata holds a {type(found).__name__}")
        size = 0
        for key, one in found.state_dict_metadata.items():
            if not isinstance(one, dcp_metadata.TensorStorageMetadata):
                raise TypeError(f"its {str(key)[:200]} is no tensor")
            size += math.prod(map(int, one.size)) * one.properties.dtype.itemsize
        held = 0
        for name in {stored.relative_path for stored in found.storage_data.values()}:
            if not _FILE.fullmatch(name):
                raise ValueError(f"its .metadata names the file {str(name)[:100]}")
            held += (folder / name).stat().st_size
        if size > held:
            raise ValueError(f"its .metadata promises {size:,} bytes of tensors, but its files have {held:,}")
        if found.storage_meta is None:
            found.storage_meta = dcp_metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        found = io.BytesIO(super()._slice_file(file, sinfo).read(-1))
        check_sums(found)
        found.seek(0)
        return found


def new_folder(path: Path) -> str:
    """The name of a folder of parts for the checkpoint at `path`."""
    return f"{path.name}.{secrets.token_hex(4)}.parts"


def take_apart(checkpoint: dict[str, Any], folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file holds of a checkpoint, and the tensors that go to the folder of parts, by name."""
    tensors = {f"weights/{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"} | {PARTS: {"folder": folder}}
    rest["optimizer_states"] = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        plain: dict[str, dict[str, Any]] = {}
        for parameter, values in optimizer["state"].items():
            plain[parameter] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
            tensors |= {
                f"optimizer/{number}/{parameter}/{name}": value
                for name, value in values.items()
                if isinstance(value, Tensor)
            }
        rest["optimizer_states"].append({**optimizer, "state": plain})
    return rest, tensors


def put_together(contents: dict[str, Any], path: Path, which: Tensors) -> dict[str, Any]:
    """The checkpoint at `path` as one process writes it, of what its file holds. Tensors are on the CPU; parameters of
    an optimizer are numbered in the order of its groups. With "none" it stays as it is in the file, without weights.

    Raises OSError, TypeError, ValueError or one of PyTorch's errors for parts that are missing, damaged or others.
    """
    if which == "none":
        return {**contents, "state_dict": {}}
    reader = reader_of(contents, path)
    wanted = ("weights/", "optimizer/") if which == "all" else ("weights/",)
    found: dict[str, Tensor] = {
        key: torch.empty(one.size, dtype=one.properties.dtype)
        for key, one in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(wanted)
    }
    with as_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")  # it reads without others
        dcp.load(found, storage_reader=reader, no_dist=True)
    whole = {key: value for key, value in contents.items() if key != PARTS}
    whole["state_dict"] = {key[8:]: tensor for key, tensor in found.items() if key.startswith("weights/")}
    whole["optimizer_states"] = []
    for number, optimizer in enumerate(contents["optimizer_states"]):
        names = [name for group in optimizer["param_groups"] for name in group["params"]]
        numbers = {name: at for at, name in enumerate(names)}
        state = {numbers[name]: dict(values) for name, values in optimizer["state"].items()}
        for key, tensor in found.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer" and rest.startswith(f"{number}/"):
                _, name, value = rest.split("/")
                state[numbers[name]][value] = tensor
        groups = [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ]
        whole["optimizer_states"].append({"state": state, "param_groups": groups})
    return whole


def reader_of(contents: dict[str, Any], path: Path) -> PartsReader:
    """Of the parts of the checkpoint at `path`, whose file holds `contents`. Raises ValueError where it names none, and
    FileNotFoundError where they are not there."""
    named = contents[PARTS]
    folder = named.get("folder") if isinstance(named, dict) else None
    if not isinstance(folder, str) or not _FOLDER.fullmatch(folder):
        raise ValueError(f"its {PARTS} name no folder")
    if not (path.parent / folder / ".metadata").is_file():
        raise FileNotFoundError(f"the folder {folder} with its tensors is not beside it")
    return PartsReader(path.parent / folder)


def commit(contents: bytes, path: Path, folder: Path) -> None:
    """Have the file at `path`, of these contents, name a folder of parts that all processes have written; then remove
    the one that it named before."""
    sync(folder)
    with atomic_file(path) as file:
        file.write(contents)
    remove_parts(path, {folder.name})


def remove_parts(path: Path, kept: Collection[str] = ()) -> None:
    """Remove the folders of parts of the checkpoint at `path`, but those that are kept."""
    for folder in path.parent.glob(f"{path.name}.*.parts"):
        if _FOLDER.fullmatch(folder.name) and folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def remove_unnamed(path: Path) -> None:
    """Remove what killed processes have left of the checkpoint at `path`: folders of parts that its file does not name.
    Nothing is removed where it cannot be read."""
    if any(path.parent.glob(f"{path.name}.*.parts")):
        with contextlib.suppress(Exception):
            named = torch.load(path, map_location="cpu", weights_only=True).get(PARTS) if path.is_file() else None
            remove_parts(path, {named["folder"]} if named else ())


@contextlib.contextmanager
def as_error() -> Iterator[None]:
    """Raise what went wrong in one of the processes instead of PyTorch's CheckpointException, which is no Exception."""
    try:
        yield
    except dcp.CheckpointException as error:
        (first, *_) = error.failures.values()
        raise first[0] from error
