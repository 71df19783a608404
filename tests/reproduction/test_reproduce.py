"""`mambaseq reproduce`: every registered recipe at its tiny scale, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from mambaseq.cli.main import main
from mambaseq.domain import catalog
from mambaseq.reproduction import Recipe
from mambaseq.reproduction.reproduce import _source
from mambaseq.reproduction.tables import Report
from mambaseq.resources import share

NAMES = [entry.name for entry in catalog()["recipes"]]


def reproduce(name: str, out: Path, *more: str) -> int:
    return main(["reproduce", name, "--scale", "tiny", "--device", "cpu", "--out", str(out), *more])


QUICK = {  # lines of recipes that are long even when tiny
    "dna/species_length": ["Mamba", "10-mer naive Bayes"],
    "synthetic/recall": ["gated_delta", "d_model 8"],
    "synthetic/state_tracking": ["mamba3", "gated_delta, negative", "parity", "permutations"],
}
SHIPPED = ("audio/spoken_digits",)  # without files that are brought, a sample of them is taken
MAY_MISS = ("eager_steps_per_s", "mib_at", "peak_gib", "surely")  # measured on GPUs alone; of several seeds


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_and_is_reported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    recipe = catalog()["recipes"].get(name)
    assert isinstance(recipe, Recipe)
    if recipe.brings:  # what it does with the files is tested in its domain
        if name not in SHIPPED:
            assert reproduce(name, out) == 2
            assert "Name the folder that it is in with --data FOLDER." in capsys.readouterr().err
        assert reproduce(name, out, "--data", str(tmp_path)) == 2
        assert f"There is no {tmp_path}" in capsys.readouterr().err
        return
    only = QUICK.get(name, [])
    assert reproduce(name, out, *(["--only", *only] if only else [])) == 0
    printed = capsys.readouterr().out
    report = Report.read(out / ("part.json" if only else "report.json"))
    assert report.markdown() in printed
    assert report.recipe == name
    assert report.seeds == [0]
    assert report.seconds is not None
    assert report.seconds > 0
    assert report.tables
    for table in report.tables:
        assert table.lines
        assert table.about
        keys = {column.key for column in table.columns}
        for line in table.lines:
            assert line.verdict == ""  # tiny ones prove nothing
            missing = {key for key in keys if not line.values.get(key)}
            assert "\n" not in line.name + line.paper + line.note
            if name.startswith("dna/"):  # baselines have no parameters, and intervals stand in notes
                assert missing <= {"parameters", "minutes"}, (line.name, missing)
                continue
            assert all(key.startswith(MAY_MISS) for key in missing), (line.name, missing)
            assert not line.note or line.note.startswith("the state grows by"), line.note


opened: list[str] | None = None  # what is read, while a test wants to know


@functools.cache
def watched() -> None:
    def note(event: str, arguments: tuple[object, ...]) -> None:
        if opened is not None and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(note)  # it stays for good, and notes nothing between tests


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_name_is_told_before_data_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog()["recipes"].get(name)
    watched()
    monkeypatch.setattr(f"{__name__}.opened", read := [])
    assert reproduce(name, tmp_path / "out", "--only", "no such line") == 2
    assert "--only names 'no such line'" in capsys.readouterr().err
    assert not [path for path in read if path.startswith(str(share() / "data"))]
    assert any(path.endswith("run.json") for path in read)  # what is opened is noted


def test_minutes_are_for_recipes_by_the_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("lra", tmp_path / "out", "--minutes", "1") == 2
    assert "does not train by the clock" in capsys.readouterr().err
    assert reproduce("spoken_digits", tmp_path / "out", "--minutes", "-1") == 2
    assert "--minutes must be above 0" in capsys.readouterr().err


def test_steps_are_for_recipes_that_leave_them_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("lra", tmp_path / "out", "--steps", "5") == 2
    assert "has numbers of steps of its own" in capsys.readouterr().err
    assert reproduce("books", tmp_path / "out", "--steps", "0") == 2
    assert "--steps must be at least 1" in capsys.readouterr().err
    assert reproduce("books", tmp_path / "out", "--steps", "5", "--data", str(tmp_path)) == 2
    assert f"There is no {tmp_path / 'books.tar.xz'}" in capsys.readouterr().err


def test_a_run_that_is_started_again_runs_nothing_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reproduce("lra", out, "--only", "s4d", "digits") == 0
    first = Report.read(out / "part.json").seconds
    assert first is not None
    before = {path: path.read_bytes() for path in (out / "trials").iterdir()}
    assert len(before) == 1
    assert reproduce("synthetic/lra", out, "--only", "s4d", "digits", "--seeds", "2") == 0
    assert len(list((out / "trials").iterdir())) == 2
    for path, content in before.items():
        assert path.read_bytes() == content
    report = Report.read(out / "part.json")
    assert [(line.name, len(line.values["digits"])) for line in report.tables[0].lines] == [("s4d", 2)]
    assert [column.key for column in report.tables[0].columns] == ["digits", "parameters"]
    assert report.command == "mambaseq reproduce lra --scale tiny --seeds 2 --only s4d digits"
    assert not (out / "report.json").exists()  # which is that of all lines
    assert report.seconds is not None
    assert report.seconds > first  # with those of the second seed


@pytest.mark.parametrize(("changed", "code"), [("selection", 2), ("selective_copying", 2), ("lra", 0)])
def test_trials_are_those_of_the_settings_of_a_recipe_and_of_what_it_shares(
    changed: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduce("selection", tmp_path, "--only", "dt") == 0
    original = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda m: original(m) + "#" * m.__name__.endswith(f"recipes.{changed}"))
    assert reproduce("selection", tmp_path, "--only", "dt") == code


def test_only_some_seeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reproduce("lra", out, "--only", "s4d", "digits", "--seed", "4", "2") == 0
    assert sorted(path.name.rpartition("_")[2] for path in (out / "trials").iterdir()) == ["seed=2.json", "seed=4.json"]
    report = Report.read(out / "part.json")
    assert report.seeds == [2, 4]
    assert report.command == "mambaseq reproduce lra --scale tiny --seed 2 4 --only s4d digits"
    assert reproduce("lra", out, "--only", "s4d", "digits", "--seed", "0") == 0
    assert not (out / "report.json").exists()


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert reproduce("selectve_copying", out) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'selective_copying'?" in error
    assert "synthetic/selective_copying" in error
    assert not out.exists()
    assert reproduce("lra", out, "--only", "s4d", "digit") == 2
    assert "'digit', which this recipe has not. Did you mean 'digits'?" in capsys.readouterr().err
    assert not (out / "run.json").exists()  # nothing was run: another recipe may have the folder
    assert reproduce("lra", out, "--seeds", "0") == 2
    assert "--seeds" in capsys.readouterr().err
    assert reproduce("lra", out, "--seed", "-1") == 2
    assert "--seed must be at least 0 and below 2^32, not -1" in capsys.readouterr().err
    assert reproduce("lra", out, "--only", "s4d", "digits") == 0
    assert reproduce("selective_copying", out) == 2
    assert "holds another run: recipe 'synthetic/lra', not 'synthetic/selective_copying'" in capsys.readouterr().err
    assert main(["reproduce", "lra", "--scale", "small", "--device", "cpu", "--out", str(out)]) == 2
    assert "scale 'tiny', not 'small'" in capsys.readouterr().err
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "source": "another"}))
    assert reproduce("lra", out, "--only", "s4d", "digits") == 2  # its trials were those of other settings
    assert "source 'another', not" in capsys.readouterr().err
    assert reproduce("lra", out, "--scale", "huge") == 2


def test_the_help_names_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["reproduce", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"recipe": NaN}', "[" * 10_000])
def test_a_damaged_run_json_is_told(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out := tmp_path / "out").mkdir()
    (out / "run.json").write_text(content)
    assert reproduce("lra", out, "--only", "s4d", "digits") == 2
    assert "run.json" in capsys.readouterr().err


def test_a_damaged_pool_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert reproduce("lra", out, "--only", "s4d", "digits") == 0
    shutil.rmtree(out / "trials")
    for pool in (out / "pools").iterdir():
        pool.write_bytes(pool.read_bytes()[:-200])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        assert reproduce("lra", out, "--only", "s4d", "digits") == 2
        gc.collect()
    assert ".npz is damaged" in capsys.readouterr().err
    assert not [one for one in caught if ".npz" in str(one.message)]  # no file is left open


def test_trials_belong_to_the_modules_that_a_recipe_names_as_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = catalog()["recipes"].get("text/books")
    assert recipe.settings
    assert recipe.run.__module__ not in recipe.settings
    before, source, edited = _source(recipe), inspect.getsource, ""
    monkeypatch.setattr(inspect, "getsource", lambda of: source(of) + "# edited" * (of.__name__ == edited))
    for edited in recipe.settings:
        assert _source(recipe) != before, edited
    for edited in (recipe.run.__module__, "mambaseq.reproduction.tables"):
        assert _source(recipe) == before, edited
        assert _source(Recipe(recipe.run)) != _source(recipe)


def test_the_digest_is_of_configurations_too(tmp_path: Path) -> None:
    """And of what they lie over."""
    (tmp_path / "base.yaml").write_text("model: {d_model: 8}\n")
    (tmp_path / "over.yaml").write_text("base: base.yaml\nseed: 3\n")
    recipe = catalog()["recipes"].get("synthetic/lra")
    of = dataclasses.replace(recipe, configs=(str(tmp_path / "over.yaml"),))
    before = _source(of)
    assert before == _source(of) != _source(recipe)
    (tmp_path / "base.yaml").write_text("# a comment\nmodel: {d_model: 8}\n")
    assert _source(of) == before
    (tmp_path / "base.yaml").write_text("model: {d_model: 9}\n")
    assert _source(of) != before
