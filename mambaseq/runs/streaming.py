"""Results that go to their files, or to a player, while they are generated. Beside each file are its settings, by which
it can be made again, and a picture where the writer draws one."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mambaseq import __version__
from mambaseq.atomic import atomic_file, json_text
from mambaseq.conditions import told
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import cut_list
from mambaseq.generation.prompts import parts
from mambaseq.resources import is_resource
from mambaseq.runs.continuing import Job, Progress, ended, n_sequences, pieces
from mambaseq.runs.devices import memory_told
from mambaseq.runs.known import Known
from mambaseq.runs.planning import Plan
from mambaseq.runs.repeating import FORMAT, LATER
from mambaseq.runs.replacing import check_beside, remove_beside


class Sink(Protocol):
    """A result that is being written.

    kept: whether it goes to a file that stays, not into a pipe. count: ids that were written.
    """

    kept: bool
    count: int

    def write(self, ids: np.ndarray) -> None:
        """The next ids, `(n,)`. Raises UserError if they cannot be written."""

    def close(self) -> None:
        """Make the file whole, with what has been written so far."""


class StreamingWriter(Protocol):
    """A writer of a domain that can write while sequences are generated. As every writer, it is called with a path,
    sequences of ids and the tokenizer; options are its keyword arguments."""

    def __call__(self, path: Path, sequences: Any, tokenizer: Tokenizer, **options: Any) -> list[Path]: ...

    def streams(self, tokenizer: Tokenizer) -> bool:
        """Whether sequences of this tokenizer can be written piece by piece."""

    def files(self, path: Path, count: int) -> list[Path]:
        """The files of `count` results. Raises ConfigError for a name that it does not write."""

    def begin(self, file: Path, tokenizer: Tokenizer, total: int, **options: Any) -> Sink:
        """total: how many ids there will be, if nothing ends it earlier."""

    def rate(self, **options: Any) -> float | None:
        """Ids of a second, of what takes time."""

    def picture(self, file: Path, prompt: int, **options: Any) -> bytes | None:
        """A PNG of a file that was written, whose first `prompt` ids were given."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while results were written. files: what there is of them, whole up to where they end."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = files


def streams(writer: Any, plan: Plan) -> bool:
    """Whether the writer can write the results while they are generated."""
    tokenizer = plan.loaded.tokenizer
    if plan.settings.get("stop") is not None or "beams" in plan.settings:  # what stays is known afterwards
        return False
    given = any(job.prompt.given is not None for batch in plan.jobs for job in batch)
    return hasattr(writer, "begin") and tokenizer is not None and not given and bool(writer.streams(tokenizer))


class _Result:
    """A result on its way to its file; the file is begun with the first ids."""

    def __init__(self, plan: Plan, job: Job, number: int, file: Path, writer: StreamingWriter, options: Any) -> None:
        self.plan, self.job, self.number, self.file = plan, job, number, file
        self.writer, self.options = writer, options
        self.prompt = max(len(job.prompt.values) - plan.hidden, 0)
        self.is_ended = self._has_failed = False
        self._sink: Sink | None = None

    def add(self, ids: np.ndarray) -> None:
        """The next ids; those after a stop are left out."""
        if self.is_ended:
            return
        stops = self.plan.settings.get("stop_ids", ())
        kept = ended(ids, 0, stops)
        if self._sink is None:
            assert self.plan.loaded.tokenizer is not None
            total = self.prompt + self.plan.new
            self._sink = self.writer.begin(self.file, self.plan.loaded.tokenizer, total, **self.options)
            if self._sink.kept:
                remove_beside(self.file)
            if self.prompt:
                for part in parts(self.job.prompt.values):
                    self._sink.write(part)
        self._sink.write(kept)
        self.is_ended = bool(stops) and len(kept) > 0 and int(kept[-1]) in stops

    @property
    def added(self) -> int:
        """How many ids were generated and written."""
        return 0 if self._sink is None else max(self._sink.count - self.prompt, 0)

    @property
    def is_kept(self) -> bool:
        return self._sink is not None and self._sink.kept

    @property
    def is_begun(self) -> bool:
        return self._sink is not None

    @property
    def is_complete(self) -> bool:
        """Whether all of it is in the file."""
        return not self._has_failed and (self.added == self.plan.new or self.is_ended)

    def close(self) -> None:
        if self._sink is None:
            return
        try:
            self._sink.close()
        except BaseException:
            self._has_failed = True
            raise


def written(plan: Plan, out: Path, writer: StreamingWriter, options: dict[str, Any], pictures: int) -> list[Path]:
    """Generate and write; see `mambaseq.runs.generation.generate_to`. writer, options: as `loading.writer_of` gives
    them.

    Returns the files. Raises Interrupted, with those that were begun, for a KeyboardInterrupt.
    """
    jobs = plan.jobs
    count = n_sequences(jobs)
    files = writer.files(out, count)
    check_beside(files)
    beginnings = _beginnings(jobs)
    progress = Progress(count * plan.new, writer.rate(**options), "sample", plan.progress)
    results: dict[tuple[int, int], _Result] = {}
    beside = _Beside(progress, set(files[: max(pictures, 0)]))
    current = -1

    def finish() -> None:
        """Make whole what was begun, even if one of them fails."""
        failed: Exception | None = None
        while results:
            result = results.pop(next(iter(results)))
            try:
                result.close()
            except Exception as error:
                failed = failed or error
            try:
                beside.tell(result)
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    try:
        with memory_told("--samples or --max-new-tokens"):
            for number, made in pieces(plan.loaded, jobs, plan.new, plan.place, plan.settings, progress):
                if number != current:
                    finish()
                    current = number
                    for job in jobs[number]:
                        for sample in range(job.first, job.stop):
                            file = files[beginnings[job.place] + sample - jobs[0][0].first]
                            results[job.place, sample] = _Result(plan, job, sample, file, writer, options)
                for job, rows in zip(jobs[number], made, strict=True):
                    for sample, row in enumerate(rows, start=job.first):
                        results[job.place, sample].add(row)
        finish()
    except KeyboardInterrupt as error:
        finish()
        raise Interrupted(beside.files) from error
    except BaseException:
        with contextlib.suppress(Exception):
            finish()
        if kept := [str(file) for file in beside.files if file not in beside.streamed]:
            print(f"mambaseq: written before the error: {cut_list(kept, 5)}", file=sys.stderr)
        raise
    finally:
        progress.close()
    return beside.files


def _beginnings(jobs: list[list[Job]]) -> dict[int, int]:
    """The number of each place's first result among all."""
    widths: dict[int, int] = {}
    for batch in jobs:
        for job in batch:
            widths[job.place] = widths.get(job.place, 0) + job.stop - job.first
    found, total = {}, 0
    for place in sorted(widths):
        found[place], total = total, total + widths[place]
    return found


class _Beside:
    """Writes what stands beside the files. drawn: files that get a picture."""

    def __init__(self, progress: Progress, drawn: Set[Path]) -> None:
        self._progress, self._drawn = progress, drawn
        self._checksums: dict[Path, str] = {}
        self._done: list[_Result] = []

    def _sha256(self, path: Path) -> str:
        if path not in self._checksums:
            with path.open("rb") as file:
                self._checksums[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._checksums[path]

    def tell(self, result: _Result) -> None:
        """Of a result that is closed."""
        if not result.is_begun:
            return
        self._done.append(result)
        if not result.is_kept:
            return
        with atomic_file(result.file.with_suffix(".json"), "w", encoding="utf-8") as file:
            file.write(json_text(_settings(result, self._sha256, self._progress), indent=2, ensure_ascii=False) + "\n")
        png = (
            result.writer.picture(result.file, result.prompt, **result.options) if result.file in self._drawn else None
        )
        if png is not None:
            with atomic_file(result.file.with_suffix(".png")) as picture:
                picture.write(png)

    @property
    def files(self) -> list[Path]:
        """Those that were written, in their order."""
        done = sorted(self._done, key=lambda result: (result.job.place, result.number))
        return [result.file for result in done]

    @property
    def streamed(self) -> set[Path]:
        """Those of `files` that keep nothing."""
        return {result.file for result in self._done if not result.is_kept}


def _settings(result: _Result, sha256: Any, progress: Progress) -> dict[str, Any]:
    plan, job = result.plan, result.job
    source = plan.loaded.source
    prompt: dict[str, Any] | None = None
    if job.prompt.file is not None:
        place = Path(job.prompt.file).absolute()
        prompt = {"file": str(place), "record": job.prompt.number, "name": job.prompt.name}
        if place.is_file():  # a folder is read again as it is then
            prompt["sha256"] = sha256(place)
        if job.prompt.source is not None and Path(job.prompt.source).absolute() != place:
            own = Path(job.prompt.source).absolute()
            prompt |= {"source": str(own), "source_sha256": sha256(own)}
    elif plan.prompt is not None:
        prompt = {"text": plan.prompt}
    return {
        "format": FORMAT,
        "mambaseq": __version__,
        "result": result.file.name,
        "checkpoint": name if is_resource(name := str(plan.checkpoint)) else str(plan.checkpoint.absolute()),
        "weights": source.name,
        "sha256": sha256(source),
        "prompt": prompt,
        "prompt_tokens": result.prompt,
        "condition": None if job.condition is None else told(Known(plan.loaded).all, job.condition),
        "condition_ids": list(job.condition) if isinstance(job.condition, tuple) else job.condition,
        "sample": result.number + job.earlier,
        "seed": plan.settings["seed"],
        "temperature": plan.settings["temperature"],
        "top_k": plan.settings["top_k"],
        "top_p": plan.settings["top_p"],
        **{name: plan.settings[name] for name in LATER},
        "guidance": plan.settings["guidance"],
        "max_new_tokens": plan.new,
        "new_tokens": result.added,
        "complete": result.is_complete,
        "writer": plan.writer,
        "writer_options": result.options,
        "device": plan.place.type,
        "dtype": plan.dtype,
        "real_time": round(progress.real_time, 3) or None,  # not known of a single piece
    }
