"""Names: lazy, collisions named with both origins, suggestions, broken plugins apart."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from mambaseq.domain import CORE, KINDS, Domain, build_catalog, catalog
from mambaseq.errors import ConfigError
from mambaseq.registry import Registry, allow_imports, import_target


def point(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name=name, value=value, group="mambaseq.domains")


def test_collision_names_both_origins() -> None:
    registry: Registry = Registry("mixer", {"mamba": ("a.b:C", "first")}, origin="core")
    with pytest.raises(ConfigError, match=r"mamba.*a\.b:C \(from core\).*x\.y:Z \(from plugin 1\.0\)"):
        registry.add("mamba", "x.y:Z", "second", "plugin 1.0")


def test_unknown_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'mamba'"):
        catalog()["mixers"].entry("mambda")


def test_import_paths_work_below_what_is_allowed_alone() -> None:
    mixers, path = catalog()["mixers"], "mambaseq.mixers.mamba:Mamba"
    with pytest.raises(
        ConfigError, match=r"'mambaseq\.mixers\.mamba:Mamba' is an import path.*--allow-import mambaseq"
    ):
        mixers.get(path)
    for allowed in ("mambaseq", "mambaseq.mixers", "mambaseq.mixers.mamba"):
        with allow_imports("nothing_else", allowed):
            assert mixers.get(path) is mixers.get("mamba")
    for other in ("mamba", "mambaseq.mix", "mambaseq.mixers.mamba2"):
        with allow_imports(other), pytest.raises(ConfigError, match="--allow-import"):
            mixers.get(path)
    with pytest.raises(ConfigError, match="--allow-import"):  # with the block the permission ends
        mixers.get(path)


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("mixers", "tiny:TinyTokens", r"'tiny:TinyTokens' is not a mambaseq\.mixers\.base\.Mixer"),
        ("datasets", "tiny:read_digits", r"is not a mambaseq\.data\.module\.SequenceData"),
        ("readers", "tiny:TinyTokens", r"a function is needed"),
        ("datasets", "tiny:SequenceData", r"defined in 'mambaseq\.data\.module', which --allow-import does not allow"),
        ("readers", "tiny:np", r"defined in null, which --allow-import does not allow"),
        ("datasets", "tiny:Nothing", r"has no 'Nothing'"),
        ("datasets", "tiny:TinyTokens.setup", r"not an import path"),
        ("datasets", ":TinyTokens", r"not an import path"),
        ("datasets", "tiny:", r"not an import path"),
        ("recipes", "tiny:TinyTokens", r"must be a registered name"),
    ],
)
def test_an_import_path_names_what_is_wanted_where_it_is_defined(kind: str, path: str, message: str) -> None:
    with allow_imports("tiny"), pytest.raises(ConfigError, match=message):
        catalog()[kind].get(path)


def test_a_class_that_cannot_be_made_is_refused() -> None:
    with allow_imports("mambaseq"), pytest.raises(ConfigError, match="leaves out setup, train"):
        catalog()["datasets"].get("mambaseq.data.module:SequenceData")


@pytest.mark.parametrize("prefix", ["", ".", "a:b", "a/b", "a.", "1a", "a b"])
def test_only_modules_can_be_allowed(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--allow-import takes the name of a module"):
        allow_imports(prefix)


def test_what_a_plugin_registers_is_of_its_kind() -> None:
    registry: Registry = Registry("mixer", wanted="mambaseq.mixers.base:Mixer")
    registry.add("theirs/wrong", "tiny:TinyTokens", "no mixer", "their-plugin 1.0")
    with pytest.raises(ConfigError, match=r"theirs/wrong.*their-plugin 1\.0.*is not a mambaseq\.mixers\.base\.Mixer"):
        registry.get("theirs/wrong")


@pytest.mark.parametrize("target", ["nowhere.at.all:X", "mambaseq.batch:Nothing", "plain"])
def test_bad_targets_are_explained(target: str) -> None:
    with pytest.raises(ConfigError, match=target.split(":")[0].rpartition(".")[2]):
        import_target(target)


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_loads_and_has_a_summary(kind: str) -> None:
    for entry in catalog()[kind]:
        assert entry.summary
        if kind != "configs":
            loaded = entry.load()
            assert callable(loaded.run if kind == "recipes" else loaded), entry


def test_shipped_domains_register_like_a_third_party() -> None:
    points = {p.name for p in importlib.metadata.entry_points(group="mambaseq.domains")}
    assert {"dna", "audio", "text"} <= points
    assert {"dna", "audio", "text"} <= set(catalog().domains)
    assert not any(name.split("/")[0] in points for kind in CORE.values() for name in kind)


def test_broken_plugins_are_reported_and_take_nothing_down(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fine_plugin.py").write_text(
        "from mambaseq.domain import Domain\ndomain = Domain('fine', 'works', heads={'h': ('m:H', 's')})\n"
    )
    (tmp_path / "raising_plugin.py").write_text("raise RuntimeError('boom')\n")
    (tmp_path / "wrong_plugin.py").write_text("domain = 3\n")
    (tmp_path / "half_plugin.py").write_text(
        "from mambaseq.domain import Domain\n"
        "domain = Domain('half', 'names', heads={'a': ('m:A', 's')}, commands={'b': 'm:b'})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = build_catalog(
        [
            point("raising", "raising_plugin:domain"),
            point("missing", "no_such_plugin:domain"),
            point("wrong", "wrong_plugin:domain"),
            point("half", "half_plugin:domain"),
            point("fine", "fine_plugin:domain"),
            point("other", "fine_plugin:domain"),
        ]
    )
    assert set(made.domains) == {"fine"}
    assert "fine/h" in made["heads"]
    assert "half/a" not in made["heads"]
    reasons = {label.split(" = ")[0]: reason for label, reason in made.broken.items()}
    assert set(reasons) == {"raising", "missing", "wrong", "half", "other"}
    assert "boom" in reasons["raising"]
    assert "no_such_plugin" in reasons["missing"]
    assert "int" in reasons["wrong"]


def test_domain_fields_are_the_kinds() -> None:
    assert set(KINDS) == set(Domain("x", "y").__dict__) - {"name", "summary"}


def test_help_and_list_and_wrong_names_import_nothing_heavy() -> None:
    commands = [["--help"], ["list"], ["list", "mixers"], ["fit", "--config", "dna/dmo"]]
    code = (
        "import sys; from mambaseq.cli.main import main; "
        f"codes = [main(words) for words in {commands}]; "
        "heavy = {'torch', 'lightning', 'numba', 'datasets', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}, {codes}' if heavy or codes != [0, 0, 0, 2] else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mamba2") > 1
    assert "Did you mean 'dna/demo'" in done.stderr
