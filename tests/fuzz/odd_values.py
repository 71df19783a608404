"""Odd values for every setting: `python tests/fuzz/odd_values.py --jobs 2`; one key: `--key data.length`.

Every key of every shipped configuration, the same key of the same class once, is given each of `VALUES` in a
configuration of one training step. A run must go through that step, or refuse the value in a paragraph that names the
key; a value that makes no sense must be refused. Ends with 1 when anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import Case, Place  # noqa: E402 - beside this file
from keys import flat, written  # noqa: E402 - in tests

LONG = "x" * 10_000
VALUES: dict[str, Any] = {
    "null": None,
    "[]": [],
    "{}": {},
    "true": True,
    "''": "",
    "-1": -1,
    "0": 0,
    "nan": float("nan"),
    "inf": float("inf"),
    "2**63": 2**63,
    "long text": LONG,
    "[[[]]]": [[[]]],
    "a NUL": "a\0b",
    "1.5": 1.5,
    "1:30": "1:30",
}
RUNS = ("dna_lm", "odd")  # what the fuzzer's workers warm up with
SMALL: dict[str, Any] = {
    "model.d_model": 16,
    "model.backbone.n_layers": 2,
    "loader.batch_size": 2,
    "loader.num_workers": 0,
    "length_warmup.start": 0,
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.precision": "32-true",
    "trainer.limit_val_batches": 1,
    "trainer.val_check_interval": 1,
    "trainer.enable_progress_bar": False,
}
LENGTHS = {  # what makes the sequences of a dataset short, where that is not data.length
    "synthetic/digits": {},
    "synthetic/pathfinder": {"data.size": 12},
    "synthetic/induction_heads": {"data.length": 96, "data.test_lengths": [64]},
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A key of a configuration, by its name, and one of `VALUES`."""

    config: str
    key: str
    value: str


def names_of_configs() -> list[str]:
    """Those whose data are here: with the project, or fetched."""
    from mambaseq.domain import catalog
    from mambaseq.resources import find
    from mambaseq.runs.settings import read_settings

    shipped = [entry for entry in catalog()["configs"] if entry.target.startswith("mambaseq:")]
    return sorted(entry.name for entry in shipped if _are_here(read_settings(find(entry.target))["data"]))


def _are_here(data: dict[str, Any]) -> bool:
    """Whether all files are there that the settings of a dataset name."""
    from mambaseq.data.cache import locate
    from mambaseq.errors import DataError
    from mambaseq.plain import flatten

    values = [value for key, value in flatten(data).items() if key != "name"]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    try:
        return all(locate(text) for text in texts if isinstance(text, str) and "/" in text)
    except DataError:
        return False


@functools.lru_cache
def small(config: str) -> dict[str, Any]:
    """What the file of a configuration holds, made small enough for a step to take no time."""
    from mambaseq.runs.naming import resolve_config
    from mambaseq.runs.settings import read_settings

    raw = read_settings(resolve_config(config))
    raw.pop("finetune", None)  # whose weights have another size
    for key, value in {**SMALL, **LENGTHS.get(raw["data"]["name"], {"data.length": 96})}.items():
        raw = written(raw, key, value)
    return raw


def owned_keys(config: str) -> Iterator[tuple[str, str]]:
    """The keys of a configuration, each with the name of the class that it is an argument of ("" for the core's)."""
    from mambaseq.runs.parsing import parse_config

    run = parse_config(config, [])
    for key in flat({**run.settings, "trainer": run.trainer}):
        group, _, rest = key.partition(".")
        part = run.settings["data"] if group == "data" else run.settings["model"].get(rest.partition(".")[0], {})
        yield key, part.get("name", "") if group in ("data", "model") and isinstance(part, dict) else ""


@functools.lru_cache
def all_pairs() -> list[Pair]:
    """Every key of every configuration with every value, the same key of the same class once."""
    seen: dict[tuple[str, str], str] = {}
    for config in names_of_configs():
        for owned in owned_keys(config):
            seen.setdefault(owned, config)
    return [Pair(config, key, value) for (key, _), config in seen.items() for value in VALUES]


# what is sensible though it is not above 0, and what must not be 0: ends of keys
NEGATIVE = ("max_steps", "max_epochs", "num_sanity_val_steps", "devices")
ABOVE_0 = (
    *("batch_size", "d_model", "n_layers", "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max"),
    *("dt_init_floor", ".k", "stride", "data.length", "vocab_size", "samples_per_epoch", "n_validation", "n_test"),
    *(
        "checkpoint.every_n_steps",
        "steps_per_stage",
        "sample_rate",
        "epoch_size",
        "accumulate_grad_batches",
        "num_nodes",
    ),
    *("check_val_every_n_epoch", "data.size", "min_length", "max_depth", "max_args", "n_data", "chunk_length"),
    *("top_p", "repetition_penalty", "head.scale", "devices"),
)
BELOW_1 = ("dropout", "label_smoothing", "fraction", "beta1", "beta2", "top_p", "min_p", "min_lr_ratio")


@functools.lru_cache
def actions(config: str) -> dict[str, Any]:
    """The parser's knowledge of each key that is no section: its type and its default."""
    from mambaseq.runs.naming import MODEL_PARTS
    from mambaseq.runs.parser import make_parser
    from mambaseq.runs.parsing import parse_config

    settings = parse_config(config, []).settings
    names = {"data": settings["data"]["name"], **{part: settings["model"][part]["name"] for part in MODEL_PARTS}}
    return {action.dest: action for action in make_parser(names, {})[0]._actions if hasattr(action, "_typehint")}


def senseless(pair: Pair) -> str:
    """Why a value must be refused; "" where it need not be."""
    from mambaseq.specs import fits

    value, action, told = VALUES[pair.value], actions(pair.config).get(pair.key), f"{pair.key}: {pair.value}"
    if action is None:
        return "" if value == {} else told
    hint = action._typehint
    if pair.value in ("nan", "inf", "2**63", "a NUL", "[[[]]]"):
        return "" if (pair.key, pair.value) == ("optimizer.lr", "2**63") else told
    if value is None:
        return "" if action.default is None or hint is Any or type(None) in get_args(hint) else told
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits(value, hint):
        return told
    if number and value < 0 and not pair.key.endswith(NEGATIVE):
        return told
    if number and ((value == 0 and pair.key.endswith(ABOVE_0)) or (value > 1 and pair.key.endswith(BELOW_1))):
        return told
    return ""


def step_all() -> None:
    """A step with each configuration as it is, so that its kernels are compiled and the stores of its data made."""
    from world import call

    from mambaseq.plain import dump_yaml

    for config in {pair.config: None for pair in all_pairs()}:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(dump_yaml(small(config)))
            call("fit", "--config", path, "--out", Path(folder) / "run")


def odd(place: Place) -> Case:
    """The pair of this number."""
    from mambaseq.plain import dump_yaml

    pair = all_pairs()[place.number]
    path = place.folder / "odd.yaml"
    path.write_text(dump_yaml(written(small(pair.config), pair.key, VALUES[pair.value])))
    argv = ["fit", "--config", str(path), "--out", str(place.folder / "run")]
    wrong = {pair.key.rpartition(".")[2]}
    if pair.key.startswith("data.") and isinstance(VALUES[pair.value], str):
        wrong.add(VALUES[pair.value][:40])  # a file that is not there is named itself
    return Case(argv, wrong, senseless=senseless(pair))


def main() -> int:
    from run import run_all, summary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--key", help="this key only, or those below it")
    parser.add_argument("--config", help="the keys that are looked at with this configuration only")
    parser.add_argument("--value", help=f"this value only: {', '.join(VALUES)}")
    parser.add_argument("--world", type=Path, help="a folder that keeps what cases begin from, for the next time")
    parser.add_argument("--report", type=Path, help="write all outcomes there, a line of JSON each")
    arguments = parser.parse_args()
    pairs = all_pairs()
    numbers = [
        number
        for number, pair in enumerate(pairs)
        if arguments.key in (None, pair.key) or pair.key.startswith(f"{arguments.key}.")
        if arguments.config in (None, pair.config) and arguments.value in (None, pair.value)
    ]
    with tempfile.TemporaryDirectory(prefix="odd-") as scratch:
        world, started = arguments.world or Path(scratch) / "world", time.monotonic()
        cases = [{"target": "odd", "seed": 0, "number": number} for number in numbers]
        done = run_all(cases, world, Path(scratch), arguments.jobs, RUNS, arguments.report, report_all=True)
        seconds = time.monotonic() - started
    done.sort(key=lambda outcome: outcome["number"])
    if arguments.report is not None:
        rows = [{**dataclasses.asdict(pairs[outcome["number"]]), **outcome} for outcome in done]
        arguments.report.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for outcome in done:
        for kind, group, _ in outcome["failures"]:
            pair = pairs[outcome["number"]]
            print(f"{kind}: {pair.key}: {pair.value} in {pair.config}: {group}: {outcome['message'][:300]}")
    print(summary(done, seconds))
    return int(any(outcome["failures"] for outcome in done))


if __name__ == "__main__":
    sys.exit(main())
