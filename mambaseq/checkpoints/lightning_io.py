"""Training checkpoints that are whole or not there, and that are read without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a training checkpoint: tensors and plain values only.

    Raises UserError when it does not exist, is damaged, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}. Give the folder of a run (it holds checkpoints/last.ckpt).")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise UserError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). It is "
            f"damaged or was not written by mambaseq; use another one, or start the run anew in another folder."
        ) from error
