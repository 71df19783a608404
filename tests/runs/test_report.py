"""The page of a run: what it says however the run ended, and what the domain of its data set adds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mambaseq.domain import catalog
from mambaseq.reporting import Section
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.config import RunConfig
from mambaseq.runs.finishing import Facts, Outcome
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.report import write_report

HERE = "runs.test_report"
FACTS = Facts(1234, ["cat", "dog"], 1.0, "loss (nats)")
DONE = Outcome("finished", "", FACTS)


def good(run: Path) -> Section:
    return Section("Mine", f"loss {RunFolder(run).read_results()['val/loss']}", "<p>It went well.</p>")


def bad(run: Path) -> Section:
    raise KeyError("test/accuracy")


def none(run: Path) -> None:
    return None


@pytest.fixture(scope="module")
def settings() -> Iterator[RunConfig]:
    registry = catalog()["reports"]
    names = {f"odd/{one.__name__}": (f"{HERE}:{one.__name__}", "") for one in (good, bad, none)}
    registry.add_all(names, "tests")
    yield parse_config("text/demo", ["--optimizer.lr=0.125"])
    for name in names:
        del registry._entries[name]


def finished(path: Path, settings: RunConfig, dataset: str) -> RunFolder:
    """A folder as a run leaves it that was gone on with once."""
    settings.settings["data"]["name"] = dataset
    folder = RunFolder(path)
    for version, losses in enumerate(([4.0, 3.0], [2.5])):
        (folder.logs / f"version_{version}").mkdir(parents=True)
        rows = [f"{10 * version + step},{loss},,{750 * (step + 1)}\n" for step, loss in enumerate(losses)]
        text = "step,train/loss,val/loss,tokens\n" + "".join(rows) + f"{10 * version + 1},,2.75,1500\n"
        (folder.logs / f"version_{version}" / "metrics.csv").write_text(text)
    folder.config.write_text(settings.yaml)
    counts = [[3, 1], [0, 4]]
    folder.update_results(steps=12, exported_step=12, train_tokens=9000, tokens_per_second=70)
    folder.update_results(**{"val/loss": 0.5, "val/accuracy": 0.75, "test/accuracy": 0.625, "test/confusion": counts})
    return folder


def test_every_run_has_a_page(settings: RunConfig, tmp_path: Path) -> None:
    """Without a report of its domain: what, on what, how good, curves, results, size, speed, settings that differ."""
    folder = finished(tmp_path / "run", settings, "odd/other")
    assert write_report(folder, settings, DONE) == ""
    page = folder.report.read_text()
    for text in (
        *("1,234 parameters of mamba on odd/other, 12 steps: val/", "finished", "resumed once", "training, smoothed"),
        *(
            "over tokens",
            "over step",
            "0.750",
            "0.625",
            "cat 75% right",
            "9,000",
            "optimizer.lr</td><td>0.125</td><td>0.001",
        ),
    ):
        assert text in page, text
    assert "over seconds" not in page  # nobody wrote them down
    assert "<td>optimizer.beta1" not in page  # it is the default
    assert "model.backbone.name</td>" not in page


def test_the_validation_loss_is_that_of_the_step_whose_weights_were_exported(
    settings: RunConfig, tmp_path: Path
) -> None:
    folder = finished(tmp_path / "run", settings, "odd/other")
    log = folder.logs / "version_0" / "metrics.csv"
    log.write_text(log.read_text().replace(",,2.75,", ",,1.25,"))
    folder.results.unlink()
    for step, told in ((2, "1.250, by the weights of step 2"), (12, "2.750.")):
        folder.update_results(steps=12, exported_step=step)
        assert write_report(folder, settings, DONE) == ""
        assert f"12 steps: val/loss {told}" in folder.report.read_text()


def test_results_that_somebody_changed_are_left_out(settings: RunConfig, tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", settings, "odd/other")
    odd = {"val/accuracy": 10**350, "test/confusion": [["x", 1], [0, None]], "test/accuracy": "high"}
    folder.update_results(steps="many", exported_step=None, train_tokens=[1], tokens_per_second="fast", **odd)
    assert write_report(folder, settings, DONE) == ""
    assert "12 steps: val/loss 0.500" in folder.report.read_text()  # as the log has them


@pytest.mark.parametrize("status", ["diverged", "interrupted"])
def test_the_page_says_how_the_run_ended(settings: RunConfig, tmp_path: Path, status: str) -> None:
    folder = finished(tmp_path / "run", settings, "odd/good")
    folder.results.unlink()
    assert write_report(folder, settings, Outcome(status, "the loss is <nan> after step 7", FACTS)) == ""  # type: ignore[arg-type]
    page = folder.report.read_text()
    for text in (f'bad">{status}', "the loss is &lt;nan&gt; after step 7", "1,234", "Its last training loss was 2.500"):
        assert text in page, text
    assert "It went well" not in page  # a domain's report is of a run that has finished


def test_a_report_is_named_as_the_data_set(settings: RunConfig, tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", settings, "odd/good")
    assert write_report(folder, settings, DONE) == ""
    page = folder.report.read_text()
    for text in ("loss 0.5", "<p>It went well.</p>", "12 steps", "Settings that differ"):
        assert text in page, text


@pytest.mark.parametrize(("name", "told"), [("bad", "KeyError"), ("none", "a NoneType, not a mambaseq.reporting")])
def test_a_report_that_fails_takes_nothing_from_the_run(
    settings: RunConfig, tmp_path: Path, name: str, told: str
) -> None:
    folder = finished(tmp_path / "run", settings, f"odd/{name}")
    message = write_report(folder, settings, DONE)
    assert told in message
    assert "the run is complete" in message
    page = folder.report.read_text()
    assert "the run is complete" in page
    assert "Settings that differ" in page


def test_a_page_that_cannot_be_written_takes_nothing_from_the_run(
    settings: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(tmp_path / "run", settings, "odd/plain")
    # as from a file name that is no UTF-8
    monkeypatch.setattr("mambaseq.runs.report._lead", lambda *rest: "\udc80")
    assert "its page could not be written (UnicodeEncodeError" in write_report(folder, settings, DONE)
    assert folder.read_results()
