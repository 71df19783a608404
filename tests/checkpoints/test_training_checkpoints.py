"""A checkpoint that was damaged on a disk is refused, whichever bit it is."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.checkpoints.lightning_plugin import AtomicCheckpointIO
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole.pop("state_dict"), "it has no state_dict"),
        (lambda whole: whole.pop("global_step"), "it has no global_step"),
        (lambda whole: whole.update(global_step=-1), "its global_step is -1"),
        (lambda whole: whole.update(global_step="3"), "its global_step is a str"),
        (lambda whole: whole["state_dict"].update({"model.bias": None}), r"its state_dict\.model\.bias is a NoneType"),
        (lambda whole: whole.update(callbacks=[]), "its callbacks is a list"),
        (
            lambda whole: whole["loops"]["fit_loop"]["epoch_progress"]["current"].update(ready="x"),
            r"its loops\.fit_loop\.epoch_progress\.current\.ready is 'x'",
        ),
        (
            lambda whole: whole["loops"]["fit_loop"]["epoch_progress"]["current"].update(ready={}),
            r"its loops\.fit_loop\.epoch_progress\.current\.ready is a dict",
        ),
        (
            lambda whole: whole["optimizer_states"][0]["state"][0].update(exp_avg="x"),
            r"its optimizer_states\.0\.state\.0\.exp_avg is a str",
        ),
        (lambda whole: whole["optimizer_states"][0]["param_groups"][0].update(lr=[]), r"param_groups is a list"),
    ],
)
def test_what_no_run_writes_is_named(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    whole: dict = {
        "state_dict": {"model.weight": torch.ones(3), "model.bias": torch.ones(7)},
        "global_step": 3,
        "epoch": 0,
        "callbacks": {},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1, "processed": 1}}}},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        ],
    }
    path = tmp_path / "last.ckpt"
    torch.save(whole, path)
    assert read_checkpoint(path)["global_step"] == 3
    change(whole)
    torch.save(whole, path)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)
