"""examples/forecast: a forecaster of seven channels, from configuration to files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from installed import installed

from mambaseq.checking import check
from mambaseq.cli.main import main
from mambaseq.data.tables import read_table
from mambaseq.errors import DataError

EXAMPLE = Path(__file__).parents[2] / "examples" / "forecast"
SHIPPED = EXAMPLE / "mambaseq_forecast" / "hours.csv"


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with installed(EXAMPLE, tmp_path / "site"):
        yield


def test_it_learns_tells_and_continues(capsys: pytest.CaptureFixture) -> None:
    small = ["--model.d_model=8", "--model.backbone.n_layers=1", "--trainer.max_steps=3", "--loader.batch_size=4",
             "--model.head.horizon=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]  # fmt: skip
    assert main(["fit", "--config", "forecast/hours", "--out", "run", *small]) == 0
    page = Path("run/report.html").read_text()
    values = read_table(SHIPPED, SHIPPED.read_text().splitlines()[0].split(",")[1:], others=True)
    for name, hours in (("the last hour again", 1), ("the same hour a day ago", 24)):  # of the hours scored
        assert f"{np.abs(values[1441:1920] - values[1441 - hours : 1920 - hours]).mean():.3f}" in page, name
    assert main(["test", "--checkpoint", "run", "--trainer.accelerator=cpu"]) == 0
    assert "test/crps" in capsys.readouterr().out
    Path("past.csv").write_text("".join(SHIPPED.read_text().splitlines(keepends=True)[:31]))
    on = ["--checkpoint", "run", "--device", "cpu"]
    assert main(["generate", *on, "--prompt", "past.csv", "-n", "2", "--temperature", "0", "--out", "mean.csv"]) == 0
    names = SHIPPED.read_text().splitlines()[0].split(",")[1:]
    past, found = read_table("past.csv", names, others=True), read_table("mean.csv", names)
    assert found.shape == (32, 7)
    np.testing.assert_allclose(found[:30], past, rtol=1e-6)
    assert main(["predict", *on, "past.csv", "--out", "told.csv"]) == 0
    with Path("told.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    # what is told of the step behind the last, in the channels' units, is what continuing takes
    assert float(rows[-1]["q0.5_7_ahead_1"]) == pytest.approx(found[30, 6], rel=1e-4)
    assert abs(found[30, 6] - past[:, 6].mean()) < 3 * 8


def test_it_keeps_the_laws_and_is_short() -> None:
    assert [str(finding) for finding in check("forecast") if finding.failed] == []
    files = [*EXAMPLE.rglob("*.py"), *EXAMPLE.rglob("*.yaml")]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 150


def test_the_hours_are_made_up_again_and_split_by_time() -> None:
    assert main(["forecast/made-up", "again.csv"]) == 0
    assert Path("again.csv").read_bytes() == SHIPPED.read_bytes()
    from mambaseq_forecast.hours import CHANNELS, Hours

    data = Hours(length=100, step=50)
    data.setup()
    for items in (data.validation(), data.test()):  # every hour but the first is asked for once
        assert [len(item.targets[0]) for item in items] == [100, 100, 100, 100, 79]
    rows = torch.from_numpy(read_table(SHIPPED, CHANNELS, others=True)).float()
    for items, first, last in ((data.train(), 0, 1440), (data.validation(), 1440, 1920), (data.test(), 1920, 2400)):
        assert torch.equal(items[0].inputs[0, 0], rows[first])
        (end,) = (rows == items[-1].targets[0, -1]).all(1).nonzero()[:, 0].tolist()
        assert first < end < last
    assert torch.tensor(data.channel_mean).allclose(rows[:1440].mean(0))
    Path("short.csv").write_text("".join(SHIPPED.read_text().splitlines(keepends=True)[:100]))
    with pytest.raises(DataError, match=r"short\.csv has 99 rows"):
        Hours(Path("short.csv")).setup()
