"""A run's page: how it went, what came of it, what was set, and what its domain has to say of it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mambaseq.domain import catalog
from mambaseq.errors import UserError, cut, paragraph
from mambaseq.plain import flatten, read_yaml
from mambaseq.reporting import Section, drawing, side_by_side, table
from mambaseq.reporting.charts import Bar, bars, confusion
from mambaseq.reporting.curves import loss_charts, other_charts
from mambaseq.reporting.evaluation import beside_baselines, pictures, remarks
from mambaseq.reporting.numbers import number
from mambaseq.reporting.page import write_page
from mambaseq.reporting.runs import Point, RunFolder
from mambaseq.runs.config import RunConfig
from mambaseq.runs.finishing import Facts, Outcome

_BADGES = {"finished": ("good", "finished"), "diverged": ("bad", "diverged"), "interrupted": ("bad", "interrupted")}
_STAGES = {"val": "validation", "test": "test"}
_LARGEST_TABLE = 60  # classes: more are not drawn
_LARGEST = 1e300  # a larger number is nobody's result


def has_section(settings: RunConfig) -> bool:
    """Whether a domain has something to say of runs on this data set."""
    return settings.settings["data"]["name"] in catalog()["reports"]


def write_report(folder: RunFolder, settings: RunConfig, outcome: Outcome) -> str:
    """Write `report.html` of a run that has ended, however it did: a line of what it is, curves, results, settings that
    are not the defaults, size and speed; where its domain registers a report under the data set's name and the run has
    finished, that section first, then those of callbacks that have one. Returns what there is to say: "" where all is
    well.

    A report that fails, in whatever way, takes nothing from the run, nor the rest of its page.
    """
    dataset = settings.settings["data"]["name"]
    sections, notes = [], [] if outcome.status == "finished" else [outcome.message]
    wanted: list[tuple[str, Callable[[Path], Any]]] = []
    if outcome.status == "finished" and has_section(settings):
        wanted.append((f"its report {dataset}", lambda path: catalog()["reports"].get(dataset)(path)))
    for callback in settings.callbacks():
        if callable(show := getattr(callback, "section", None)):
            wanted.append((f"what {type(callback).__name__} shows of it", show))
    failures = []
    for what, show in wanted:
        try:
            section = show(folder.path)
            if section is None and what != f"its report {dataset}":
                continue
            if not isinstance(section, Section):
                raise TypeError(f"it gives a {type(section).__name__}, not a mambaseq.reporting.Section")
            sections.append(section)
        except Exception as error:  # a third party's function may raise anything
            reason = paragraph(f"{type(error).__name__}: {error}", 300)
            ended = "complete" if outcome.status == "finished" else outcome.status
            failures.append(f"{folder.path}: the run is {ended}, but {what} failed ({reason}).")
    notes += failures
    told = "\n".join(failures)
    try:
        _write(folder, settings, outcome, sections, notes)
    except UserError as error:  # a full disk: the run is complete all the same
        return f"{told}\n{error}".lstrip()
    except Exception as error:  # text of a section that no file can hold
        reason = paragraph(f"{type(error).__name__}: {error}", 300)
        return f"{told}\n{folder.path}: its page could not be written ({reason}).".lstrip()
    return told


def _write(folder: RunFolder, settings: RunConfig, outcome: Outcome, sections: list[Section], notes: list[str]) -> None:
    results, facts, logged = folder.read_results(), outcome.facts, folder.log()
    assert facts is not None
    results = {key: value for key, value in results.items() if not isinstance(value, int | float) or _is_number(value)}
    if results:
        results = _losses(logged, _whole(results, "exported_step") or 0) | results
    badges = [_BADGES[outcome.status]]
    again = max(len(folder.starts()) - 1, int(facts.resumed))  # a start may have ended before it logged anything
    if again > 0:
        badges.append(("soft", f"resumed {'once' if again == 1 else f'{again} times'}"))
    if "device" in results:
        badges.append(("soft", str(results["device"])))
    charts = loss_charts(folder, facts.scale, facts.unit) or "<p>Nothing was logged: the run was too short.</p>"
    more = other_charts(folder)
    more = f"<details><summary>Everything else that was logged</summary>{more}</details>" if more else ""
    body = f'<div class="wide">{side_by_side(charts, _results(results))}</div>{more}{_tables(results, facts)}'
    body += "".join(pictures(of, place) for place, of in folder.read_evaluation().items() if isinstance(of, Mapping))
    sections.append(Section("How it went", "", body))
    if beside := _beside(results):
        sections.append(Section("Beside baselines", "", beside))
    sections += [
        _costs(results, facts, logged),
        *_parts(folder),
        _settings(folder, settings),
    ]
    write_page(
        folder.report, folder.path.name, _lead(settings, results, facts, logged), sections, badges=badges, notes=notes
    )


def _losses(logged: Mapping[str, list[Point]], step: int) -> dict[str, Any]:
    """The validation losses that were logged after a step, or else last; they are no metric of a run's results."""
    losses = {name: points for name, points in logged.items() if name.startswith("val/") and name.endswith("/loss")}
    return {
        name: next((point for point in points if point.step == step - 1), points[-1]).value
        for name, points in losses.items()
    }


def _lead(settings: RunConfig, results: Mapping[str, Any], facts: Facts, logged: Mapping[str, list[Point]]) -> str:
    """What was trained, on what, for how long, and how good it is."""
    model, dataset = settings.settings["model"], settings.settings["data"]["name"]
    backbone = model["backbone"]
    of = [name for one in backbone.get("tiers") or [backbone.get("pattern") or []] for name in one]
    mixer = " and ".join(sorted({str(name).rstrip("*") for name in of})) or model["mixer"]["name"]
    steps = _whole(results, "steps") or max((points[-1].step + 1 for points in logged.values()), default=0)
    said = f"{facts.parameters:,} parameters of {mixer} on {dataset}, {steps:,} steps"
    metrics = [key for key, value in results.items() if key.startswith("val/") and _is_number(value)]
    metrics.sort(key=lambda key: key.endswith("/loss"))  # what has a meaning of its own comes first
    word = settings.settings["checkpoint"]["monitor"].removeprefix("val/")
    best = next((key for key in metrics if f"/{key}".endswith(f"/{word}")), metrics[0] if metrics else "")
    if not results:
        last = logged.get("train/loss", [])
        return f"{said}." + (f" Its last training loss was {number(last[-1].value)}." if last else "")
    if not best:
        return f"{said}."
    exported = _whole(results, "exported_step")
    at = f", by the weights of step {exported:,}" if exported not in (None, steps) else ""
    return f"{said}: {best} {number(float(results[best]))}{at}."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _whole(results: Mapping[str, Any], key: str) -> int | None:
    """A number of the results; None for what somebody else has written there."""
    value = results.get(key, "")
    return int(value) if _is_number(value) else None


def _results(results: Mapping[str, Any]) -> str:
    """Metrics by stage."""
    stages = [stage for stage in _STAGES if any(key.startswith(f"{stage}/") for key in results)]
    names = {
        key.partition("/")[2]: None
        for key, value in results.items()
        if key.partition("/")[0] in stages and _is_number(value)
    }
    rows = [[name, *(cell for stage in stages for cell in _figure(results, stage, name))] for name in names]
    if not rows:
        return "<p>There are no results: no validation set, or none that was reached.</p>"
    notes = ""
    for stage in stages:
        changed = results.get(f"{stage}/changed_settings")
        if isinstance(changed, Mapping) and changed:
            words = cut(", ".join(f"{key} {value}" for key, value in changed.items()), 300)
            notes += f"<p>The {_STAGES[stage]} was done with {html.escape(words)}.</p>"
        notes += "".join(f"<p><strong>{html.escape(told)}</strong></p>" for told in remarks(results, stage))
    header = [
        word for stage in stages for word in (_STAGES[stage], *([_INTERVAL] if _has_intervals(results, stage) else []))
    ]
    return table(("metric", *header), rows, alike="rows") + notes


_INTERVAL = "95% interval"


def _has_intervals(results: Mapping[str, Any], stage: str) -> bool:
    return any(key.startswith(f"{stage}/") and key.endswith("/intervals") for key in results)


def _figure(results: Mapping[str, Any], stage: str, name: str) -> list[object]:
    """A metric of a stage, and its interval where the stage has any."""
    value = results.get(f"{stage}/{name}", "")
    cells: list[object] = [float(value) if _is_number(value) else ""]
    if _has_intervals(results, stage):
        place, _, word = f"{stage}/{name}".rpartition("/")
        pair = _between(results, place).get(word)
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair)):
            cells.append(f"{pair[0]:.3f} to {pair[1]:.3f}")
        else:
            cells.append("")
    return cells


def _tables(results: Mapping[str, Any], facts: Facts) -> str:
    """Tables of classes and of lengths among the results, drawn."""
    drawn = []
    for key, counts in results.items():
        if key.partition("/")[0] not in _STAGES or not isinstance(counts, list):
            continue
        size = len(facts.class_names)
        if counts and len(counts) == size <= _LARGEST_TABLE and all(_counts(row, size) for row in counts):
            drawn.append(drawing(confusion(counts, facts.class_names), key))
        if key.rpartition("/")[2] == "bits_by_length" and all(map(_is_row, counts)):
            rows = [Bar(f"{low:,.0f} tokens or more, {n:,.0f} targets", bits) for low, n, bits in counts]
            drawn.append(drawing(bars(rows, " bits"), key))
    return f'<div class="wide">{side_by_side(*drawn)}</div>' if drawn else ""


def _is_row(row: object) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(map(_is_number, row))


def _beside(results: Mapping[str, Any]) -> str:
    """Baselines on the records of each set that they were measured on."""
    told = ""
    for key, found in results.items():
        place, _, word = key.rpartition("/")
        if word == "baselines" and place.partition("/")[0] in _STAGES:
            own = {
                name: float(value)
                for whole, value in results.items()
                if _is_number(value) and whole.startswith(f"{place}/") and "/" not in (name := whole[len(place) + 1 :])
            }
            told += beside_baselines(found, own, _between(results, place), place)
    return told


def _between(results: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The intervals of a set's metrics, by name."""
    found = results.get(f"{place}/intervals")
    metrics = found.get("metrics") if isinstance(found, Mapping) else None
    return metrics if isinstance(metrics, Mapping) else {}


def _counts(row: object, size: int) -> bool:
    return isinstance(row, list) and len(row) == size and all(isinstance(n, int) and 0 <= n < 2**53 for n in row)


def _costs(results: Mapping[str, Any], facts: Facts, logged: Mapping[str, list[Point]]) -> Section:
    """Size, speed and memory."""

    def last(name: str) -> float | None:
        points = logged.get(f"train/{name}")
        return points[-1].value if points else None

    spent = logged.get("train/loss", [Point(0, 0.0, None, None)])[-1]
    tokens, seconds, rate = (
        value if _is_number(value := results.get(key)) else other
        for key, other in (
            ("train_tokens", spent.tokens),
            ("train_seconds", spent.seconds),
            ("tokens_per_second", last("tokens_per_second")),
        )
    )
    rows: list[tuple[str, object]] = [("parameters", facts.parameters)]
    rows += [("tokens trained on", round(tokens))] if tokens is not None else []
    rows += [("seconds of training alone", round(seconds) if seconds > 10 else float(seconds))] if seconds else []
    rows += [("tokens a second, without each start's first batch", round(rate))] if rate is not None else []
    devices = _whole(results, "devices") or 1
    rows += [(f"of each of {devices} devices", round(rate / devices))] if rate is not None and devices > 1 else []
    rows += [("most memory, GiB", memory)] if (memory := last("memory_gib")) else []
    rows += [("share of the GPU's peak", share)] if (share := last("mfu")) else []
    return Section("Size and speed", "", table(("", ""), rows, alike="rows"))


def _parts(folder: RunFolder) -> list[Section]:
    """Where the time of a step goes, if it was measured."""
    found = folder.read_parts()
    parts = found.get("milliseconds")
    parts = (
        {str(name)[:60]: float(ms) for name, ms in parts.items() if _is_number(ms)} if isinstance(parts, dict) else {}
    )
    if not (whole := sum(parts.values())) > 0:
        return []
    largest = max(parts.values())
    rows = [Bar(f"{name}, {ms / whole:.0%}", ms, 0 if ms == largest else 2) for name, ms in parts.items()]
    told = f"A batch takes {number(whole)} ms, without validation and checkpoints (mean of {_whole(found, 'batches')})."
    return [Section("Where the time of a step goes", "", f"<p>{told}</p>{drawing(bars(rows, ' ms'))}")]


def _settings(folder: RunFolder, settings: RunConfig) -> Section:
    """Settings that are not the defaults, and all of them."""
    text = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else settings.yaml
    now = flatten(read_yaml(folder.config) if folder.config.is_file() else {})
    defaults = settings.defaults()
    rows = [
        (key, _told(value), _told(defaults[key]) if key in defaults else "")
        for key, value in now.items()
        if key not in defaults or not _same(value, defaults[key])
    ]
    body = table(("setting", "value", "default"), rows)
    body += f"<details><summary>All settings</summary><pre>{html.escape(text)}</pre></details>"
    return Section("Settings that differ from the defaults", "", body)


def _same(value: object, default: object) -> bool:
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(_same, value, default))
    return value == default or (str(value) == str(default) and not isinstance(default, str))


def _told(value: object) -> str:
    """A setting as it is written in YAML, a list without its brackets."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return cut(", ".join(map(_told, value)) if isinstance(value, list | tuple) and value else str(value), 200)
