"""Training checkpoints that are whole or not there, and that are read without unpickling code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mambaseq.atomic import atomic_file
from mambaseq.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through a temporary file, so a full disk or a kill leaves the old checkpoint as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


def _check_sums(file: IO[bytes]) -> None:
    """Raise BadZipFile when a part of the archive differs from its checksum. torch writes them and does not look at
    them; 500 MB take 0.2 s beside the 0.5 s of loading, which then finds them in memory."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch does not do")
            with archive.open(entry) as part:
                while part.read(1 << 22):
                    pass


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a training checkpoint: tensors and plain values only.

    Raises UserError when it does not exist, is damaged (each part is held against its checksum), or holds anything
    else.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}. Give the folder of a run (it holds checkpoints/last.ckpt).")
    try:
        with path.open("rb") as file:
            _check_sums(file)
        contents = torch.load(path, map_location=map_location, weights_only=True)
        if not isinstance(contents, dict):
            raise TypeError(f"it holds a {type(contents).__name__}")
        return contents
    except Exception as error:
        text = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {text}). It is "
            f"damaged or was not written by mambaseq; use another one, or start the run anew in another folder."
        ) from error
