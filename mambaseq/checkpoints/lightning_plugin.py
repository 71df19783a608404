"""Training checkpoints that are either complete or absent. Apart from reading them, for which Lightning and what it
imports need not be waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mambaseq.atomic import atomic_file
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.checkpoints.parts import remove_parts


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through a temporary file, so after a full disk or a kill the old checkpoint is unchanged."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_file(Path(path)) as file:
            torch.save(checkpoint, file)
        remove_parts(Path(path))  # of one that several processes wrote before

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)
