"""A checkpoint that was damaged on a disk is refused, whichever bit it is."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mambaseq.checkpoints.lightning_io import AtomicCheckpointIO, read_checkpoint
from mambaseq.errors import UserError


def checkpoint(path: Path) -> bytes:
    contents = {"state_dict": {"model.weight": torch.arange(2000.0), "model.bias": torch.ones(7)}, "global_step": 3}
    AtomicCheckpointIO().save_checkpoint(contents, path)
    return path.read_bytes()


def test_a_flipped_bit_in_a_tensor_is_refused_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    whole = bytearray(checkpoint(path))
    place = whole.index(torch.arange(2000.0).numpy().tobytes()) + 4 * 1234
    whole[place] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read .*CRC"):
        read_checkpoint(path)


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    whole = checkpoint(path)
    expected = read_checkpoint(path)["state_dict"]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except UserError:
            refused += 1
            continue
        assert found["global_step"] == 3  # the bit was in what fills up, or in a date
        assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in expected.items())
    assert refused > 200


def test_what_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(checkpoint(path))) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry))
    path.write_bytes(packed.getvalue())
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="it holds a list"):
        read_checkpoint(path)
