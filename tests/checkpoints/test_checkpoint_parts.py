"""Checkpoints of which every process writes its part are read as those of one process, and are whole or not there."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.checkpoints.lightning_plugin import AtomicCheckpointIO
from mambaseq.checkpoints.parts import PARTS, commit, new_folder, remove_unnamed, take_apart
from mambaseq.errors import UserError
from mambaseq.runs.trainer_classes import make_classes
from mambaseq.tasks.sharding import FullySharded


def checkpoint(step: int) -> dict[str, Any]:
    """As the strategy hands it over, parameters by name; the groups of the optimizer have another order."""
    weights = {"model.a": torch.full((3, 4), float(step)), "model.b": torch.arange(5.0) * step}
    moments = {name: {"exp_avg": weight + 1, "step": torch.tensor(3.0)} for name, weight in weights.items()}
    groups = [{"lr": 0.1, "params": ["model.b"]}, {"lr": 0.2, "params": ["model.a"]}]
    return {
        "global_step": step,
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": groups}],
    }


def write(path: Path, step: int, *, whole: bool = True) -> Path:
    """Write one in parts, with or without the file that names them; gives their folder."""
    folder = path.parent / new_folder(path)
    rest, tensors = take_apart(checkpoint(step), folder.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)  # type: ignore[arg-type]
    if whole:
        file = io.BytesIO()
        torch.save(rest, file)
        commit(file.getvalue(), path, folder)
    return folder


def test_parts_are_read_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    former, folder = write(path, 1), write(path, 2)
    assert not former.exists()
    found, given = read_checkpoint(path), checkpoint(2)
    assert found.keys() == {"global_step", "state_dict", "optimizer_states"}
    for name, tensor in given["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor)
    (optimizer,), (states,) = found["optimizer_states"], given["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]
    for number, name in enumerate(("model.b", "model.a")):
        for key, value in states["state"][name].items():
            assert torch.equal(optimizer["state"][number][key], value)
    weights = read_checkpoint(path, tensors="weights")
    assert weights["state_dict"].keys() == given["state_dict"].keys()
    assert weights["optimizer_states"][0]["state"] == {0: {}, 1: {}}
    assert read_checkpoint(path, tensors="none")["global_step"] == 2
    AtomicCheckpointIO().save_checkpoint({"global_step": 3, "state_dict": {}}, path)
    assert not folder.exists()


def test_what_is_not_whole_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write(path, 1)
    unnamed = write(path, 2, whole=False)  # killed before all had written, or before the file was replaced
    assert read_checkpoint(path)["global_step"] == 1
    assert torch.equal(read_checkpoint(path)["state_dict"]["model.a"], torch.full((3, 4), 1.0))
    remove_unnamed(path)  # as a run does that is resumed
    assert not unnamed.exists()
    assert read_checkpoint(path)["global_step"] == 1
    unnamed = write(path, 2, whole=False)
    write(path, 3)
    assert not unnamed.exists()
    assert read_checkpoint(path)["global_step"] == 3


class Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_damaged_or_foreign_parts_are_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "last.ckpt"
    folder = write(path, 1)
    (part,) = folder.glob("*.distcp")
    metadata, data = (folder / ".metadata").read_bytes(), part.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            read_checkpoint(path)

    at = data.index(torch.full((3, 4), 1.0).numpy().tobytes())
    part.write_bytes(data[:at] + b"\1" + data[at + 1 :])
    refused("Bad CRC-32")
    part.write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(Code()))
    refused(r"names builtins\.print")
    found = pickle.loads(metadata)
    found.state_dict_metadata["weights/model.a"].size = torch.Size([2**40])
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    refused("promises .* bytes of tensors, but its files have")
    found = pickle.loads(metadata)
    for stored in found.storage_data.values():
        stored.relative_path = "../last.ckpt"
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    refused(r"names the file \.\./last\.ckpt")
    (folder / ".metadata").unlink()
    refused("with its tensors is not beside it")
    torch.save({**torch.load(path), PARTS: {"folder": "../" + folder.name}}, path)
    refused("name no folder")
    assert "run" not in capsys.readouterr().out


def test_how_parts_are_saved_is_set_in_a_configuration() -> None:
    def made(**given: Any) -> Any:
        return make_classes("strategy", {"class_path": "fsdp2", "init_args": given})

    assert made().asynchronous
    assert not made(asynchronous=False).asynchronous
    assert not made(checkpoints="whole").asynchronous
    with pytest.raises(UserError, match="checkpoints cannot be"):
        made(checkpoints="some")
    with pytest.raises(UserError, match="Use parts or whole"):
        FullySharded(checkpoints="some")  # type: ignore[arg-type]
