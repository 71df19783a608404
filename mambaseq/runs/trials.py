"""What a sweep tries: its YAML, the settings of a grid, and those that a search proposes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from mambaseq.atomic import json_text
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut, cut_list, did_you_mean, shown
from mambaseq.limits import TRIALS
from mambaseq.plain import read_yaml
from mambaseq.runs.naming import whole_keys
from mambaseq.specs import fits

Mode = Literal["min", "max"]

_DIGITS = 6  # of a number that is drawn: more would not be told apart, and are hard to read
_STEPS = 2**53  # of a range: floats, which Optuna calculates with, count no further
_STARTING = 10  # trials of a search that are drawn at random, as many as Optuna's own default
_DECIDES = (".name", "model.backbone.pattern", "model.backbone.mlp")  # ends of keys on which depends which others exist


def _exact(value: float) -> Fraction:
    """A number as it is written: 0.1 is a tenth."""
    return Fraction(str(value))


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones where both ends and the step are.

    log: whether their logarithms are drawn evenly. step: distance of the numbers that are drawn, from low on.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    @property
    def steps(self) -> int:
        """How many steps the last number is from low; of a range with a step."""
        return (_exact(self.high) - _exact(self.low)) // _exact(self.step or 1)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number that can be tried: the step may not reach high."""
        return self.low, self.high if self.step is None else self.drawn(self.steps)

    def drawn(self, value: float) -> float:
        """A number as it is tried, from what Optuna draws: with a step, the number of steps from low. Optuna does not
        draw the numbers themselves, since it refuses those that float arithmetic puts beside its own grid."""
        if self.step is not None:
            number = _exact(self.low) + int(value) * _exact(self.step)
            return int(number) if self.whole else float(number)
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), float(self.low)), float(self.high))

    def has(self, value: Any) -> bool:
        """Whether a value is a number that can be tried."""
        low, high = self.ends
        if not fits(value, int if self.whole else float) or not low <= value <= high:
            return False
        return self.step is None or self.drawn(self.place(value)) == value

    def place(self, value: float) -> float:
        """What Optuna draws for a number that is tried."""
        return value if self.step is None else round((_exact(value) - _exact(self.low)) / _exact(self.step))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep's YAML.

    source: what messages call it. config: a registered name or a file. settings: of all trials, over the config's.
    grid: values of each key, all combinations of which are tried; or search: for each key a range, or values to choose
    from, of which `trials` are proposed, by generators seeded with (seed, number of the trial). seeds: of which each
    trial has a run each; the config's own when empty. metric, mode: what is to be the smallest ("min") or largest
    ("max"); None for what the config's checkpoint.monitor says.
    """

    source: str
    config: str
    settings: dict[str, Any]
    grid: dict[str, list[Any]]
    search: dict[str, Range | list[Any]]
    trials: int
    seeds: list[int]
    seed: int
    metric: str | None
    mode: Mode | None

    def grid_settings(self) -> list[dict[str, Any]]:
        """The settings of a grid's trials, the last key's values changing fastest."""
        return list(self._combined())

    def _combined(self) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))

    def tries(self, number: int, settings: Mapping[str, Any]) -> bool:
        """Whether trial `number` may have these settings, read back from JSON."""
        spaces = self.grid or self.search
        if settings.keys() != spaces.keys():
            return False
        if self.grid:
            return number < self.trials and _same(
                dict(settings), next(itertools.islice(self._combined(), number, None))
            )
        return all(
            space.has(settings[key]) if isinstance(space, Range) else any(_same(settings[key], one) for one in space)
            for key, space in self.search.items()
        )

    def to_check(self) -> Iterator[dict[str, Any]]:
        """Settings that together have each value of each key, and both ends of each range; with all combinations of
        those values on which it depends what other keys there are."""
        others = {key: found for key, found in self._values().items() if not key.endswith(_DECIDES)}
        for fixed in self.first_values():
            yield fixed
            for key, found in others.items():
                for value in found[1:]:
                    yield fixed | {key: value}

    def first_values(self) -> Iterator[dict[str, Any]]:
        """The first value of each key, with all combinations of those on which it depends what other keys there are."""
        values = self._values()
        first = {key: found[0] for key, found in values.items()}
        deciding = {key: found for key, found in values.items() if key.endswith(_DECIDES)}
        for chosen in itertools.product(*deciding.values()):
            yield first | dict(zip(deciding, chosen, strict=True))

    def checks(self) -> int:
        """The number of settings of `to_check`."""
        values = self._values()
        others = sum(len(found) - 1 for key, found in values.items() if not key.endswith(_DECIDES))
        return math.prod(len(found) for key, found in values.items() if key.endswith(_DECIDES)) * (1 + others)

    def _values(self) -> dict[str, list[Any]]:
        return {
            key: list(one.ends) if isinstance(one, Range) else one for key, one in (self.grid or self.search).items()
        }


def _same(read: Any, value: Any) -> bool:
    """Whether a value is what JSON gives back for another, of the same types."""
    return json_text(read) == json_text(value)


def told(settings: Mapping[str, Any]) -> str:
    """Settings of a trial, for a line."""
    return cut_list([f"{key} {cut(value, 40)}" for key, value in settings.items()], 8, 400)


_OF_A_RANGE = ("low", "high", "log", "step")
_ELSEWHERE = {"min": "low", "from": "low", "start": "low", "max": "high", "to": "high", "stop": "high", "end": "high"}
"""What other programs call the ends of a range."""
_KEYS = ("config", "settings", "grid", "search", "trials", "seeds", "seed", "metric", "mode")
_REMEDY = "A sweep is a YAML mapping with config and either grid or search."


def read_plan(plan: str | Path | Mapping[str, Any]) -> Plan:
    """A sweep from its YAML file, or from what such a file would hold.

    Raises ConfigError that names the file and the key for what is no sweep.
    """
    if isinstance(plan, Mapping):
        return _plan(json.loads(json_text(dict(plan), default=str)), "The sweep", None)
    try:
        raw = read_yaml(plan, _REMEDY)
    except UserError as error:
        raise ConfigError(str(error)) from error
    return _plan(raw, str(plan), Path(plan).parent)


def _plan(raw: dict[str, Any], source: str, folder: Path | None) -> Plan:
    def refuse(problem: str) -> ConfigError:
        return ConfigError(f"{cut(source, 200)}: {problem}")

    for key in raw:
        if key not in _KEYS:
            near = did_you_mean(str(key)[:80], _KEYS)
            raise refuse(f"there is no key {shown(key)}.{near} Known: {', '.join(_KEYS)}.")
    config = raw.get("config")
    if not isinstance(config, str) or not config:
        raise refuse(f"config must name a configuration or its YAML file, not {shown(config)}.")
    beside = None if folder is None else folder / config
    if config not in catalog()["configs"] and not Path(config).is_file() and beside is not None and beside.is_file():
        config = str(beside)
    if config not in catalog()["configs"] and Path(config).is_file():
        config = str(Path(config).resolve())  # so that the sweep can go on from another folder
    sections = {}
    for key in ("settings", "grid", "search"):
        value = raw.get(key, {})
        if not isinstance(value, Mapping):
            raise refuse(f"{key} must hold keys of the configuration and their values, not {shown(value)}.")
        try:
            sections[key] = whole_keys(value)
        except ConfigError as error:
            raise refuse(f"{key}: {error}") from error
    settings, grid, search = sections.values()
    if bool(grid) == bool(search):
        raise refuse("give either grid (keys, each with a list of values) or search (keys, each with a range).")
    if both := sorted(settings.keys() & (grid | search).keys()):
        raise refuse(f"{cut_list(both)} is in settings and in {'grid' if grid else 'search'}. Leave one of them out.")
    for key, values in grid.items():
        _check_choices(key, values, refuse)
    spaces = {key: _space(key, value, refuse) for key, value in search.items()}
    trials: Any = raw.get("trials", math.prod(map(len, grid.values())) if grid else None)
    if grid and "trials" in raw:
        raise refuse("trials is of a search; a grid tries all combinations of its values. Leave it out.")
    if not fits(trials, int) or trials < 1:
        raise refuse(f"trials must say how many settings the search tries, at least 1, not {shown(trials)}.")
    seeds, seed = raw.get("seeds", []), raw.get("seed", 0)
    if not fits(seeds, list[int]) or len({*seeds}) < len(seeds) or not all(0 <= one < 2**32 for one in seeds):
        raise refuse(f"seeds must be a list of different whole numbers from 0 to 2**32 - 1, not {shown(seeds)}.")
    if seeds and "seed" in grid | search | settings:
        raise refuse("seed is a key of the trials, and seeds gives each of them several. Leave one of them out.")
    if not fits(seed, int) or seed < 0:
        raise refuse(f"seed must be a whole number of at least 0, not {shown(seed)}.")
    TRIALS.check(trials * max(len(seeds), 1), f"{cut(source, 200)}")
    metric, mode = raw.get("metric"), raw.get("mode")
    if not fits(metric, str | None) or metric == "":
        raise refuse(f"metric must name a metric of the validation, such as val/loss, not {shown(metric)}.")
    if mode not in (None, "min", "max"):
        raise refuse(f"mode must be min or max, not {shown(mode)}.")
    plan = Plan(source, config, settings, grid, spaces, trials, list(seeds), seed, metric, mode)
    combined = dataclasses.replace(TRIALS, unit="configurations to be checked before the first trial")
    combined.check(plan.checks(), f"{cut(source, 200)}: {'grid' if grid else 'search'}, with all names combined,")
    return plan


def _check_choices(key: str, values: Any, refuse: Any) -> None:
    if not isinstance(values, list) or not values:
        raise refuse(f"{cut(key)} must be a list of values to try, not {shown(values)}.")
    if len({repr(value) for value in values}) < len(values):
        raise refuse(f"{cut(key)} has a value twice: {shown(values)}.")


def _space(key: str, value: Any, refuse: Any) -> Range | list[Any]:
    """What a search draws a key's values from."""
    if isinstance(value, Mapping) and value.keys() == {"choices"}:
        value = value["choices"]
    if isinstance(value, list):
        _check_choices(key, value, refuse)
        return value
    takes = f"{cut(key)} must be a list of values, or {{low: ..., high: ...}} with log: true or a step"
    if not isinstance(value, Mapping):
        raise refuse(f"{takes}, not {shown(value)}.")
    if "choices" in value:
        raise refuse(f"{cut(key)} has choices, or low and high, not both: {shown(value)}.")
    if unknown := [name for name in value if name not in _OF_A_RANGE]:
        name = str(unknown[0])[:80]
        near = did_you_mean(_ELSEWHERE.get(name, name), (*_OF_A_RANGE, "choices"))
        raise refuse(f"{cut(key)}: there is no key {shown(unknown[0])}.{near} {takes}.")
    if missing := [name for name in ("low", "high") if name not in value]:
        raise refuse(f"{takes}; there is no {' and no '.join(missing)} in {shown(value)}.")
    low, high, log, step = value["low"], value["high"], value.get("log", False), value.get("step")
    if not (fits(low, float) and fits(high, float) and low < high):
        raise refuse(f"{cut(key)} must have low and high, finite numbers, the first below the second.")
    if not math.isfinite(float(high) - float(low)):
        raise refuse(f"{cut(key)}: high - low, of {high} and {low}, is more than a number can be. Narrow the range.")
    if not fits(log, bool) or (log and low <= 0):
        raise refuse(f"{cut(key)}: log must be true or false, and low above 0 with it, not {shown(log)} and {low}.")
    if step is not None and (log or not fits(step, float) or not 0 < step <= high - low):
        raise refuse(f"{cut(key)}: step must be a number above 0, no larger than the range, and not with log.")
    space = Range(low, high, log, step)
    if step is not None and space.steps > _STEPS:
        raise refuse(f"{cut(key)}: step {step} is too small for {low} to {high}. Give a larger one, or none.")
    return space


def check_optuna() -> None:
    """Raise ConfigError when what proposes a search's settings is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"search needs the package optuna, and it cannot be imported ({str(error)[:100]}). Install it: pip install "
            f"'mambaseq[sweep]'. A grid needs nothing more."
        ) from error


def propose(
    plan: Plan, number: int, former: Sequence[tuple[dict[str, Any], float | None]], mode: Mode
) -> dict[str, Any]:
    """The settings of a search's trial `number`, by Optuna's TPE: a function of the plan, the number and the trials
    before it, so that a sweep that was interrupted proposes what it would have.

    former: settings and score of each trial before, None where it diverged, which counts as worse than all others.
    """
    import numpy as np
    import optuna

    spaces: dict[str, Any] = {}
    for key, space in plan.search.items():
        if not isinstance(space, Range):  # by their places: values may be lists, which Optuna does not take
            spaces[key] = optuna.distributions.CategoricalDistribution(list(range(len(space))))
        elif space.step is not None:
            spaces[key] = optuna.distributions.IntDistribution(0, space.steps)
        elif space.whole:
            spaces[key] = optuna.distributions.IntDistribution(int(space.low), int(space.high), space.log)
        else:
            spaces[key] = optuna.distributions.FloatDistribution(space.low, space.high, space.log)
    drawn = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=_STARTING)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line a study otherwise
    try:
        study = optuna.create_study(
            sampler=sampler, direction=optuna.study.StudyDirection.MAXIMIZE if mode == "max" else None
        )
        for settings, score in former:
            places = {
                key: space.place(settings[key])
                if isinstance(space, Range)
                else [*map(repr, space)].index(repr(settings[key]))
                for key, space in plan.search.items()
            }
            state = optuna.trial.TrialState.PRUNED if score is None else optuna.trial.TrialState.COMPLETE
            study.add_trial(optuna.trial.create_trial(params=places, distributions=spaces, value=score, state=state))
        asked = study.ask(spaces).params
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {
        key: space.drawn(asked[key]) if isinstance(space, Range) else space[asked[key]]
        for key, space in plan.search.items()
    }
