"""What a recipe is run with: trials that are run once, and the lines that were asked for."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from mambaseq.errors import UserError
from mambaseq.models import causal_lm
from mambaseq.reproduction import FINISHED, Context, train, training
from mambaseq.reproduction.batches import of_text
from mambaseq.tasks.optimizer import OptimizerConfig


def context(folder: Path, **more) -> Context:
    return Context(torch.device("cpu"), "tiny", [0, 1], folder, **more)


def test_a_trial_is_run_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def run(checkpoint: Path) -> dict[str, float]:
        calls.append(checkpoint)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text("half way")
        return {"accuracy": 0.5, "loss": math.nan}

    for _ in range(2):  # a context of its own each, as a command started again has
        found = context(tmp_path).trial("mamba, lti seed=0", run)
        assert found["accuracy"] == 0.5
        assert math.isnan(found["loss"])
    assert len(calls) == 1
    assert not calls[0].exists()
    context(tmp_path).trial("mamba, lti seed=1", run)
    assert len(set(calls)) == 2


def test_where_trials_ran_is_kept(tmp_path: Path) -> None:
    def interrupted(checkpoint: Path) -> dict[str, float]:
        time.sleep(0.01)
        raise KeyboardInterrupt

    context(tmp_path, hardware="one GPU").trial("x", lambda checkpoint: {"a": 1.0})
    later = context(tmp_path, hardware="another")
    later.trial("x", lambda checkpoint: {"a": 2.0})
    assert later.used == {"one GPU"}
    with pytest.raises(KeyboardInterrupt):
        later.trial("y", interrupted)
    third = context(tmp_path, hardware="a third")
    third.trial("y", lambda checkpoint: {"a": 2.0})
    assert third.used == {"another", "a third"}  # it was begun on the one and ended on the other
    assert third.seconds >= 0.01
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == ["x.json", "y.json"]


def test_a_trial_that_fails_is_run_again(tmp_path: Path) -> None:
    def fail(checkpoint: Path) -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        context(tmp_path).trial("one", fail)
    assert context(tmp_path).trial("one", lambda checkpoint: {"a": 1.0}) == {"a": 1.0}


def test_values_are_lists_over_the_seeds(tmp_path: Path) -> None:
    found = context(tmp_path).over_seeds(
        "x", lambda seed, checkpoint: {"a": float(seed), **({"b": 5.0} if seed == 1 else {})}
    )
    assert found == {"a": [0.0, 1.0], "b": [5.0]}
    assert context(tmp_path).trial("x seed=1", lambda checkpoint: {}) == {"a": 1.0, "b": 5.0}


def test_what_is_finished_is_collected_and_nothing_is_trained(tmp_path: Path) -> None:
    def never(seed: int, checkpoint: Path) -> dict[str, float]:
        raise AssertionError(f"seed {seed} was trained")

    context(tmp_path).trial("x seed=1", lambda checkpoint: {"a": 3.0})
    later = context(tmp_path, only=[FINISHED])
    assert later.wanted(["mamba", "s4d"], [FINISHED]) == ["mamba", "s4d"]
    assert context(tmp_path, only=[FINISHED, "s4d"]).wanted(["mamba", "s4d"], [FINISHED]) == ["s4d"]
    with pytest.raises(UserError, match="--only names 'finished', which this recipe has not"):
        later.wanted(["mamba", "s4d"])  # of trials that would be run, or tables that need all values
    found = later.over_seeds("x", never)
    assert found == {"a": [3.0]}
    assert later.note(found) == "1 of 2 seeds"
    assert later.note(later.over_seeds("y", never)) == "none of 2 seeds"
    assert later.note({"a": [1.0, 2.0]}) == ""


def test_an_interrupted_trial_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial is stopped in the middle; the one that is started again takes only the steps that are left."""
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)  # after each step
    seen: list[int] = []
    batches = of_text(torch.arange(50) % 5, 8, 2, seed=0)

    def run(checkpoint: Path, stop: int) -> dict[str, float]:
        def batch_of(step):
            if int(step) == stop:
                raise KeyboardInterrupt
            seen.append(int(step))
            return batches(step)

        torch.manual_seed(0)
        trained = train(causal_lm(5, 8, 1), batch_of, 6, OptimizerConfig(), checkpoint=checkpoint)
        return {"steps": trained.steps}

    with pytest.raises(KeyboardInterrupt):
        context(tmp_path).trial("x", lambda checkpoint: run(checkpoint, 4))
    assert context(tmp_path).trial("x", lambda checkpoint: run(checkpoint, -1)) == {"steps": 6}
    assert seen == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "trials" / "x.json").read_text())["values"] == {"steps": 6}


def test_only_what_was_asked_for(tmp_path: Path) -> None:
    lines, columns = ["mamba", "s4d"], ["digits", "listops"]
    assert context(tmp_path).wanted(lines) == lines
    assert context(tmp_path, only=["s4d"]).wanted(lines) == ["s4d"]
    both = context(tmp_path, only=["digits", "s4d"])
    assert both.wanted(lines, columns) == ["s4d"]
    assert both.wanted(columns, lines) == ["digits"]
    assert context(tmp_path, only=["digits"]).wanted(lines, columns) == lines
    with pytest.raises(UserError, match=r"'mambda'.*Did you mean 'mamba'\?.*'mamba', 's4d'"):
        context(tmp_path, only=["s4d", "mambda"]).wanted(lines)
    with pytest.raises(UserError, match="digits"):
        context(tmp_path, only=["digits"]).wanted(lines)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"{}", b'{"hardware": 1, "seconds": 1, "values": {}}',
     b'{"hardware": [], "seconds": "1", "values": {}}', b'{"hardware": [], "seconds": 1, "values": {"a": "x"}}',
     b'{"hardware": [], "seconds": 1}'],
    ids=range(9),
)  # fmt: skip
def test_damaged_records_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trials").mkdir()
    for name in ("x.json", "y.begun"):
        (tmp_path / "trials" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json.*Remove it"):
        context(tmp_path).trial("x", lambda checkpoint: {"a": 1.0})
    if b'"seconds": 1}' not in content:  # which is what one that began looks like
        with pytest.raises(UserError, match=r"y\.begun.*Remove it"):
            context(tmp_path).trial("y", lambda checkpoint: {"a": 1.0})


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    context(tmp_path).trial("x", lambda checkpoint: {"loss": math.inf})
    text = (tmp_path / "trials" / "x.json").read_text()
    assert json.loads(text)["values"] == {"loss": None}
    assert "Infinity" not in text


def test_two_names_for_one_file_are_not_one_trial(tmp_path: Path) -> None:
    context(tmp_path).trial("a b", lambda checkpoint: {"a": 1.0})
    with pytest.raises(UserError, match="is of the trial 'a b'"):
        context(tmp_path).trial("a,b", lambda checkpoint: {"a": 2.0})


def test_damaged_checkpoints_are_told(tmp_path: Path) -> None:
    """Cut anywhere, or with one byte of a tensor changed, which PyTorch reads without a word."""
    path = tmp_path / "x.pt"
    batches = of_text(torch.arange(50) % 5, 8, 2, seed=0)

    def go() -> None:
        torch.manual_seed(0)
        train(causal_lm(5, 8, 1), batches, 1, OptimizerConfig(), checkpoint=path)

    go()
    whole = path.read_bytes()
    go()
    place = len(whole) // 2
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in (b"", whole[:10], whole[:place], whole[:-1], flipped):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.pt cannot be read as a checkpoint"):
            go()
    state = torch.load(path.with_name("x.pt"), weights_only=True) if path.write_bytes(whole) else {}
    torch.save({key: value for key, value in state.items() if key != "done"}, path)
    with pytest.raises(UserError, match="has no done"):
        go()
