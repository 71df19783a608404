"""examples/ecg as a stranger meets it: installed beside mambaseq, listed, trained and used from another folder."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambaseq.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ecg"
PACKAGE = EXAMPLE / "mambaseq_ecg"


def run(command: list[str], cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_installed_it_is_listed_trains_and_predicts(tmp_path: Path) -> None:
    target = tmp_path / "venv"
    venv.create(target, with_pip=False)
    site = next((target / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--target", str(site), str(EXAMPLE)], tmp_path)
    reused = (sysconfig.get_paths()["purelib"], ROOT, ROOT / "domains")
    (site / "reuse.pth").write_text("".join(f"{path}\n" for path in reused))
    python = str(target / "bin" / "python")

    listed = run([python, "-m", "mambaseq", "list"], tmp_path)
    for name in ("ecg/beats", "ecg/csv"):
        assert re.search(rf"  {name} .*\[mambaseq-ecg 0\.1\.0\]", listed), listed

    options = ["--data.window=128", "--loader.batch_size=4", "--model.d_model=8", "--model.backbone.n_layers=1",
               "--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=2",
               "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
    fit = ["fit", "--config", "ecg/beats", "--out", "run", *options]
    strip = EXAMPLE / "strip.csv"
    predict = ["predict", "--checkpoint", "run", str(strip), "--out", "beats.csv", "--device", "cpu"]
    both = f"from mambaseq.cli.main import main; raise SystemExit(main({fit!r}) or main({predict!r}))"
    run([python, "-c", both], tmp_path)  # one process, since a process spends its time on imports

    beats = np.flatnonzero(np.loadtxt(strip, delimiter=",", skiprows=1)[:, 2])
    with (tmp_path / "beats.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["record"] for row in rows] == [f"strip:{beat}" for beat in beats]
    assert {row["predicted"] for row in rows} <= set("NSVF")
    for row in rows:
        assert sum(float(row[name]) for name in "NSVF") == pytest.approx(1, abs=1e-5)


def test_the_example_is_short_and_touches_no_inside() -> None:
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert text.count("\n") < 300
    assert "import mambaseq_" not in text
    assert set(re.findall(r"from (mambaseq_\w+)", text)) == {"mambaseq_ecg"}


def test_the_data_are_those_that_their_readme_names() -> None:
    sums = re.findall(r"`([\w.]+)` .*\| ([0-9a-f]{64}) \|", (PACKAGE / "data" / "README.md").read_text())
    assert len(sums) == 3
    for name, digest in sums:
        assert hashlib.sha256((PACKAGE / "data" / name).read_bytes()).hexdigest() == digest


@pytest.fixture(scope="module")
def ecg() -> Iterator[Any]:
    """`mambaseq_ecg.beats`, `.reader` and `.window` from the checkout; the records are unpacked once."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(EXAMPLE))
    from mambaseq_ecg import beats, reader, window

    patch.setattr(beats, "read_patients", functools.cache(beats.read_patients))

    class Modules:
        Beats, read_csv, Window = beats.Beats, reader.read_csv, window.Window

    yield Modules
    patch.undo()


def test_splits_are_by_patient_and_complete(ecg: Any) -> None:
    data = ecg.Beats()
    data.setup()
    drawn, validation, test = data.train(), data.validation(), data.test()
    patients = [
        {p.name for p in drawn.patients},
        {p.name for p, _ in validation.items},
        {p.name for p, _ in test.items},
    ]
    assert [len(names) for names in patients] == [19, 3, 22]
    assert len(set.union(*patients)) == 44
    counts = Counter(int(patient.labels[beat]) for patient, beat in test.items)
    assert counts == {0: 44259, 1: 1837, 2: 3221, 3: 388}


def test_a_drawn_beat_depends_on_its_index_alone(ecg: Any) -> None:
    data = ecg.Beats(window=128)
    data.setup()
    first, again = data.train(), data.train()
    _ = [first[i] for i in range(5)]
    assert np.array_equal(first[7].inputs, again[7].inputs)
    assert not np.array_equal(first[7].inputs, first[8].inputs)
    labels = Counter(int(first[i].targets) for i in range(1000))
    assert labels[0] / 1000 == pytest.approx(0.7, abs=0.05)  # three standard deviations
    assert labels[3] / 1000 == pytest.approx(0.03, abs=0.02)


def test_a_window_by_hand(ecg: Any) -> None:
    """Beats at 100, 180, 240 of a ramp that begins at 0; the window of the last one, which reaches past the end."""
    signal = np.arange(250.0)
    window = ecg.Window(samples=200, after=20, patch=4)
    values = window.read(signal, np.array([100, 180, 240]), 2)
    assert values.shape == (50, 12)
    assert values.dtype == np.float32
    z, elapsed, relative = values.reshape(200, 3).T  # samples 61 to 260
    ramp = np.arange(61.0, 250.0)
    np.testing.assert_allclose(z[:189], (ramp - ramp.mean()) / ramp.std(), rtol=1e-4, atol=1e-6)
    assert not values.reshape(200, 3)[189:].any()
    assert not elapsed[: 100 - 61].any()
    assert elapsed[[100 - 61, 179 - 61, 180 - 61, 239 - 61]] == pytest.approx([0, 0.79, 0, 0.59])
    assert relative[179 - 61] == pytest.approx(0.79 / 0.7)  # intervals 0.8 and 0.6 s, median 0.7


def test_neither_unit_nor_gain_matter(ecg: Any) -> None:
    rng = np.random.default_rng(0)
    signal, beats = rng.normal(size=600), np.array([100, 300, 500])
    window = ecg.Window(samples=256, after=16, patch=8)
    a, b = window.read(200 * signal + 50, beats, 1), window.read(2000 * signal - 7, beats, 1)
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_bad_settings_are_refused(ecg: Any) -> None:
    with pytest.raises(ConfigError, match="multiple of patch"):
        ecg.Beats(window=100, patch=8)
    with pytest.raises(ConfigError, match="each of N, S, V, F"):
        ecg.Beats(shares=[1.0, 1.0])
    with pytest.raises(ConfigError, match="each of N, S, V, F"):
        ecg.Beats(shares=[1.0, 1.0, 1.0, float("nan")])
    for key in ("window", "samples_per_epoch", "seed"):
        with pytest.raises(ConfigError, match=key):
            ecg.Beats(**{key: 2**63})
    with pytest.raises(ConfigError, match=r"'232'.*not records of DS1"):
        ecg.Beats(validation_records=["232"]).setup()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be"),
        ("time,mV\n0,1\n", "first line must be"),
        ("seconds,signal,beat\n", "no beat is marked"),
        ("seconds,signal,beat\n0.00,1,0\n0.01,1,0\n", "no beat is marked"),
        ("seconds,signal,beat\n0.00,1,0\n0.01,x,1\n", "line 3 is not 3 numbers"),
        ("seconds,signal,beat\n0.00,1\n", "line 2 is not 3 numbers"),
        ("seconds,signal,beat\n0,00,1,0\n0,01,1,1\n", "line 2 is not 3 numbers"),  # decimals with commas
        ("seconds,signal,beat\n0.00,1,0\n\n0.01,1,1\n", "line 3 is not 3 numbers"),
        ("seconds,signal,beat\n0.00,1,0\n# 0.01,1,1\n", "line 3 is not 3 numbers"),
        ("seconds,signal,beat\n0.00,1,0\n0.01,1e200,1\n", "line 3 has a gap"),
        ("seconds,signal,beat\n0.00,1,0\n0.01,1,0.5\n", "line 3 .*neither 0 nor 1"),
        ("seconds,signal,beat\n" + "".join(f"{i / 100 + (i > 500) * 0.05:.2f},1,1\n" for i in range(1000)), "line 503"),
        ("seconds,signal,beat\n" + "x" * 10**6, "not 3 numbers"),
        ("seconds,signal,beat\n0.00,1,0\n0.01,nan,1\n", "line 3 has a gap"),
        ("seconds,signal,beat\n0.000,1,0\n0.004,2,1\n0.008,1,0\n", "250 samples a second"),
        (b"seconds,signal,beat\n\xff\xfe,1,1\n", "not text in UTF-8"),
    ],
    ids=range(16),
)
def test_bad_files_are_refused(ecg: Any, tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        list(ecg.read_csv(path, None, samples=64, after=8, patch=8))
    assert "bad.csv" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_unit_of_a_file_does_not_matter(ecg: Any, tmp_path: Path) -> None:
    """Volts, millivolts and the units of a converter, and with the mark that Windows begins a file with."""
    rng = np.random.default_rng(0)
    signal, found = rng.normal(size=300), []
    for name, scale, shift in (("V", 1e-6, 0.0), ("mV", 1e-3, 5.0), ("ADC", 200.0, 1024.0)):
        rows = "".join(
            f"{i / 100:.2f},{v * scale + shift!r},{int(i % 90 == 50)}\n" for i, v in enumerate(signal.tolist())
        )
        (tmp_path / f"{name}.csv").write_text("\ufeffseconds,signal,beat\n" + rows, encoding="utf-8")
        found.append([record.signal for record in ecg.read_csv(tmp_path / f"{name}.csv", None, 128, 24, 8)])
    assert len(found[0]) == 3
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_what_is_no_file(ecg: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        list(ecg.read_csv(tmp_path, None, samples=64, after=8, patch=8))


def test_a_run_notices_other_data(ecg: Any) -> None:
    sums = re.findall(r"`([\w.]+)` .*\| ([0-9a-f]{64}) \|", (PACKAGE / "data" / "README.md").read_text())
    assert ecg.Beats().sources() == dict(sums)


def test_a_missing_file_is_named(ecg: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*none\.csv"):
        list(ecg.read_csv(tmp_path / "none.csv", None, samples=64, after=8, patch=8))
