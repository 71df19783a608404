"""Scores are compared on the same data only, and data that changed behind the same name do not go unnoticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tiny import Items, TinyTokens

from mambaseq.checkpoints import load_model
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.errors import cut_list
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.record import KEY, DataRecord

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {{name: "tasks.test_changed_data:FileTokens", file: {file}}}
loader: {{batch_size: 4}}
model: {{d_model: 8, backbone: {{name: residual, n_layers: 1}}, mixer: {{name: mamba, d_state: 4}}}}
optimizer: {{lr: 1.0e-2}}
checkpoint: {{every_n_steps: 2, monitor: val/bits_per_token, mode: max}}
trainer: {{max_steps: 4, accelerator: cpu, enable_progress_bar: false, val_check_interval: 2,
  check_val_every_n_epoch: null}}
"""


class FileTokens(TinyTokens):
    """Sequences whose seed is the number in a file.

    Args:
        file: of the number.
    """

    def __init__(self, file: str = "") -> None:
        super().__init__()
        self.file = file

    def _seed(self) -> int:
        return int(Path(self.file).read_text())

    def sources(self) -> dict[str, str]:
        return {Path(self.file).name: hashlib.sha256(Path(self.file).read_bytes()).hexdigest()}

    def train(self) -> Items:
        return Items(self._seed(), self.size, self.length, 7, False)

    def validation(self) -> Items:
        return Items(self._seed() + 1, 6, self.length, 7, False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose best score is its first: "max" keeps the weights of step 2."""
    (tmp_path / "numbers").write_text("0")
    (tmp_path / "run.yaml").write_text(CONFIG.format(file=tmp_path / "numbers"))
    out = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--out", str(out)]) == 0
    assert RunFolder(out).read_results()["exported_step"] == 2
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_of_the_new_data(out: Path) -> None:
    """What is exported was chosen among validations on the new data, and validates to the recorded value."""
    results = RunFolder(out).read_results()
    assert results["exported_step"] > 4
    curve = {step: value for step, value in RunFolder(out).curve("val/bits_per_token") if step >= 4}
    assert results["val/bits_per_token"] == pytest.approx(max(curve.values()), rel=1e-5)
    assert main(["validate", "--checkpoint", str(out)]) == 0
    assert RunFolder(out).read_results() == results


def test_a_score_on_other_data_does_not_count(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "others").write_text("50")
    score = RunFolder(run).read_results()["val/bits_per_token"]
    capsys.readouterr()
    others = ["--data.file", str(tmp_path / "others"), "--trainer.max_steps=8"]
    assert main(["fit", "--resume", str(run), *others]) == 0
    told = capsys.readouterr().err
    assert f"data.file changed: {tmp_path / 'numbers'} -> {tmp_path / 'others'}" in told
    assert f"no longer counts: {score:.4g} at step 2 was measured on other data" in told
    assert_of_the_new_data(run)


def test_a_score_on_other_data_does_not_count_after_a_kill_either(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "others").write_text("50")
    killer = '--trainer.callbacks=[{"class_path": "tasks.test_resume.Killer", "init_args": {"step": 4}}]'
    others = ["--data.file", str(tmp_path / "others"), "--trainer.max_steps=8"]
    with pytest.raises(ZeroDivisionError):
        main(["fit", "--resume", str(run), *others, killer])
    assert not RunFolder(run).best.exists()  # whoever reads the run now does not get weights of the other data
    assert load_model(run).card.step == 4
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.callbacks=null"]) == 0
    assert_of_the_new_data(run)


def test_files_that_changed_are_refused_and_can_be_allowed(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "numbers").write_text("50")
    before = files(run)
    capsys.readouterr()
    for more in ([], ["--trainer.max_steps=8"]):
        assert main(["fit", "--resume", str(run), *more]) == 2
        told = capsys.readouterr().err
        assert "numbers has other contents" in told
        assert "--allow-changed-data" in told
    assert files(run) == before
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=8", "--allow-changed-data"]) == 0
    told = capsys.readouterr().err
    assert "the data changed: numbers has other contents" in told
    assert "was measured on other data" in told
    assert_of_the_new_data(run)
    capsys.readouterr()
    assert main(["fit", "--resume", str(run)]) == 0  # they are its data from now on
    assert "nothing to do" in capsys.readouterr().out


def test_evaluation_says_and_records_what_changed(run: Path, tmp_path: Path, capsys) -> None:
    before = RunFolder(run).read_results()
    (tmp_path / "numbers").write_text("50")
    capsys.readouterr()
    assert main(["validate", "--checkpoint", str(run)]) == 0
    assert "the data changed since training: numbers has other contents" in capsys.readouterr().err
    results = RunFolder(run).read_results()
    assert results["val/changed_files"] == ["numbers has other contents"]
    assert results["val/bits_per_token"] != before["val/bits_per_token"]
    (tmp_path / "numbers").write_text("0")
    (tmp_path / "others").write_text("50")
    capsys.readouterr()
    assert main(["validate", "--checkpoint", str(run), "--data.file", str(tmp_path / "others")]) == 0
    assert capsys.readouterr().err == ""
    assert RunFolder(run).read_results()["val/changed_settings"] == {"data.file": str(tmp_path / "others")}
    assert main(["validate", "--checkpoint", str(run)]) == 0
    assert RunFolder(run).read_results() == before


def test_a_run_of_an_earlier_version_says_that_it_cannot_tell(run: Path, capsys: pytest.CaptureFixture) -> None:
    RunFolder(run).data.unlink()
    for path in (RunFolder(run).last, RunFolder(run).best):
        checkpoint = read_checkpoint(path)
        del checkpoint["mambaseq"]
        torch.save(checkpoint, path)
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=8"]) == 0
    assert "changes cannot be noticed" in capsys.readouterr().err
    assert RunFolder(run).read_results()["exported_step"] == 2
    assert RunFolder(run).data.is_file()


def test_what_counts_as_the_same_data() -> None:
    settings = {"data.file": "a", "data.cache": "x", "loader.batch_size": 4, "trainer.limit_val_batches": None}
    one = DataRecord.of(settings, {"a": "1", "b": "2"})
    assert one.same(DataRecord.of(settings | {"data.cache": "y", "loader.batch_size": 2}, {"b": "2", "a": "1"}))
    assert not one.same(DataRecord.of(settings | {"trainer.limit_val_batches": 2}, one.sources))
    assert not one.same(DataRecord.of(settings | {"data.file": "b"}, one.sources))
    assert one.changed_files(DataRecord.of(settings, {"a": "2", "c": "3"})) == [
        "a has other contents",
        "b is gone",
        "c is new",
    ]
    assert one.changed_files(DataRecord.of(settings | {"data.file": "b"}, {"c": "3"})) == []
    assert one.changed_files(DataRecord.of(settings, {})) == []
    assert DataRecord.read(one.plain()) == one
    assert DataRecord.read({"settings": []}) is None
    part = DataRecord.of(settings | {"trainer.limit_val_batches": 2}, one.sources)
    other = settings | {"trainer.limit_val_batches": 2, "loader.batch_size": 2}
    assert not part.same(DataRecord.of(other, one.sources))  # two batches hold other sequences
    assert part.same_training(DataRecord.of(other, one.sources))
    assert part.other(DataRecord.of(other, one.sources)).startswith(
        "4 validation sequences a batch of all processes, w"
    )
    assert part.other(DataRecord.of(other | {"data.file": "b"}, one.sources)) == "other data"
    assert part.same(DataRecord.of(other, one.sources), (1, 2))  # processes take every second sequence each
    assert not part.same(part, (2, 1))


@pytest.mark.parametrize(("batch", "told"), [(4, ""), (2, "measured on 4 validation sequences a batch of all")])
def test_a_score_counts_for_any_number_of_processes(batch: int, told: str, tmp_path: Path, capsys) -> None:
    """The best score of two processes goes on in one that validates on the same sequences."""
    (tmp_path / "numbers").write_text("50")
    (tmp_path / "run.yaml").write_text(CONFIG.format(file=tmp_path / "numbers"))
    out = tmp_path / "run"
    part = ["--trainer.limit_val_batches=1", "--loader.batch_size=2"]
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--out", str(out), *part]) == 0
    for path in (RunFolder(out).best, RunFolder(out).last):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint[KEY] |= {"world_size": 2, "validating": 2}  # as if two had trained it
        torch.save(checkpoint, path)
    capsys.readouterr()
    assert main(["fit", "--resume", str(out), "--trainer.max_steps=5", f"--loader.batch_size={batch}"]) == 0
    error = capsys.readouterr().err
    assert ("no longer counts" in error) == bool(told)
    few = "warning: a step takes 2 sequences now, 4 before: 2 * 1 * 1, not 2 * 2 * 1 (batch size, "
    assert error.count(few) == (batch == 2)
    assert error.count("warning") == (batch == 2)
    assert told in error


def test_a_long_path_leaves_room_for_what_became_of_it() -> None:
    path = f"/{'a/long/way/' * 20}chr1.fa"
    now = {path: "2", f"{path}x": "1", f"{path}z": "1"}
    phrases = DataRecord({}, {path: "1", f"{path}y": "1"}).changed_files(DataRecord({}, now))
    ends = ["/chr1.fa has other contents", "/chr1.fay is gone", "/chr1.fax is new", "/chr1.faz is new"]
    assert len(phrases) == len(ends)
    for phrase, end in zip(phrases, ends, strict=True):
        assert phrase.startswith("…")
        assert phrase.endswith(end)
        assert cut_list([phrase]) == phrase
