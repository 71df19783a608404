"""Generation: continue prompts, and write the results in the domain's own format."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mambaseq.checkpoints import LoadedModel
from mambaseq.conditions import told
from mambaseq.errors import ConfigError
from mambaseq.generation.sampling import NEUTRAL
from mambaseq.generation.speculation import Speculation
from mambaseq.generation.states import Begun
from mambaseq.generation.stopping import StopStrings
from mambaseq.limits import check_whole
from mambaseq.outputs import check_written, output_target
from mambaseq.runs.continuing import n_sequences, sequences_of
from mambaseq.runs.conversation import Conversation, check_text, converse, keep
from mambaseq.runs.devices import memory_told
from mambaseq.runs.known import Known
from mambaseq.runs.loading import own_or_told, writer_of
from mambaseq.runs.planning import Plan, checked_options, planned
from mambaseq.runs.prompting import is_file
from mambaseq.runs.repeating import Written
from mambaseq.runs.replacing import check_not_prompts
from mambaseq.runs.streaming import streams, written


class Generated(NamedTuple):
    """What was generated.

    ids: one for each prompt, condition and sample, in this order: `(length,)` int64, or for a signal `(length,
        channels)` float32. model: what generated them. files: those written. speculation: what came of drafts.
    """

    ids: list[np.ndarray]
    model: LoadedModel
    files: list[Path] = []  # noqa: RUF012 - nobody adds to it
    speculation: Speculation | None = None

    @property
    def sequences(self) -> list[Any]:
        """Each one decoded by the tokenizer: text, bases, a waveform. A signal stays as it is."""
        if self.model.tokenizer is None:
            return self.ids
        return [self.model.tokenizer.decode(ids) for ids in self.ids]

    def _repr_html_(self) -> str:
        import html

        shown = "".join(f"<li><pre>{html.escape(str(one)[:2000])}</pre></li>" for one in self.sequences[:10])
        return f"<ol>{shown}</ol>"


def generate_to(
    checkpoint: str | Path,
    out: Path,
    *,
    prompt: str | Sequence[str] | None = None,
    writer: str | None = None,
    pictures: int = 0,
    again: Written | None = None,
    **options: Any,
) -> Generated:
    """Generate and write. Returns what was generated, with the files; without ids if it went straight to them, as sound
    does (see `mambaseq.runs.streaming`).

    pictures: draw at most so many of the results, where the writer draws them. again: the settings of an earlier
        result, which model, prompt and writer must be those of (`mambaseq.runs.repeating`). options: see
        `generate_from`.

    Raises mambaseq.runs.streaming.Interrupted, a KeyboardInterrupt that has the files, when it is interrupted after
    some were begun; UserError when the run cannot generate, or a setting, the prompt or the condition cannot be used.
    """
    check_whole("--pictures", pictures, 0)
    output_target(out, folder=True)  # the writer decides whether it may be one
    for source in (prompt, options.get("prompts")):
        if isinstance(source, str | Path) and out.is_file() and is_file(str(source)) and out.samefile(source):
            raise ConfigError(f"--out {out} is the prompt's file and would be overwritten. Give another name.")
    plan = planned(
        checkpoint, prompt=prompt, writer=writer, writes=True, again=again, **checked_options(options, "pictures")
    )
    found = writer_of(plan.loaded, writer)
    assert found is not None
    check_written(found[1], out)
    if again is not None:
        again.check_result(max(len(plan.jobs[0][0].prompt.values) - plan.hidden, 0), found[2])
    files = getattr(found[1], "files", None)
    prompts = [job.prompt for batch in plan.jobs for job in batch]
    sources = [path for one in prompts for path in (one.file, one.source) if path]
    sources += [str(one) for one in (prompt, options.get("prompts")) if isinstance(one, str | Path)]
    check_not_prompts(out, {out, *(files(out, n_sequences(plan.jobs)) if files else [])}, sources)
    if streams(found[1], plan):
        files_made = written(plan, out, *found[1:], pictures)
        return Generated([], plan.loaded, files_made, plan.settings.get("draft"))
    generated = _collected(plan)
    return generated._replace(files=_write(generated, out, writer, _described(plan)))


def generate_from(checkpoint: str | Path, *, prompt: str | Sequence[str] | None = None, **options: Any) -> Generated:
    """Generate sequences. Settings that are None are the run's own.

    Every record of a prompt's files is continued, under every condition, `samples` times: sequences are in this order.
    Each is what it would be without the others.

    prompt: a text, what the run's reader reads (a file, a folder, a pattern), or several texts.
    options: prompt_text (in place of prompt, a text that is never a file's name), prompts (a file of texts: .txt has
        one in each line, .jsonl an object with it under `prompts_key`, or "text" or "prompt"), `condition`,
        `condition_column` and `condition_table` (each record under a condition of its own instead; see
        `mambaseq.runs.conditions.Conditions`), samples, max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, presence_penalty, stop (texts: each result ends before the first that is generated), beams
        and length_penalty (see `mambaseq.generation.beams`; the best are kept, nothing is drawn),
        seed, guidance, writer (by which they are to be written; checked first), device, dtype (of the weights: see
        `mambaseq.checkpoints.load_model`), progress; record (the number of the only record of the prompt's file that is
        continued, from 0) and first_sample (the number of the first sample); save_state (a file for the state after the
        prompt), from_state (such a file, which the prompt goes on from; the results hold what was read before, too);
        draft ("ngram", or the folder of a run with a smaller model and the same tokenizer: tokens are guessed and
        checked several at once, one sequence after the other, and are what they would be without) and draft_tokens
        (guesses at once, at most).
    Raises UserError when the run cannot generate, or a setting, the prompt or the condition cannot be used.
    """
    return _collected(planned(checkpoint, prompt=prompt, **checked_options(options)))


def generate_text(
    checkpoint: str | Path,
    write: Callable[[str], None],
    *,
    lines: Iterable[str] | None = None,
    save_state: str | Path | None = None,
    **options: Any,
) -> Speculation | None:
    """Give the text of one result out while it is generated, in whole characters, the prompt first.

    lines: further turns, each of which is given and then answered; the state is kept between them. save_state: as in
        `generate_from`; with `lines` the state after the last turn. options: see `generate_from`.
    Returns what came of drafts, where there are any.
    Raises UserError as `generate_from` does, and for several results or a model that generates no text.
    """
    plan = planned(checkpoint, save_state=save_state if lines is None else None, **checked_options(options))
    check_text(plan.loaded, "Generation without --out", "Give --out FILE.")
    if (
        "beams" in plan.settings
        or len(plan.jobs) != 1
        or len(plan.jobs[0]) != 1
        or plan.jobs[0][0].stop - plan.jobs[0][0].first != 1
    ):
        if lines is not None:
            raise ConfigError(
                "--interactive takes turns with one text, drawn as it comes. Give one prompt or none, and leave "
                "--samples and --beams out."
            )
        raise ConfigError(
            "Several results, or those of --beams, cannot be shown while they are generated. Give --out FILE."
        )
    job, place, tokenizer = plan.jobs[0][0], plan.place, plan.loaded.tokenizer
    assert tokenizer is not None
    begun = job.prompt.begun
    if begun is None:
        begun = Begun.of(plan.loaded.model, np.asarray(job.prompt.values[:]), job.condition, place, plan.hidden)
    conversation = Conversation(plan.loaded, begun, plan.new, plan.settings)
    beginning = tokenizer.decode(begun.ids[begun.hidden :])
    if lines is None:
        answer = conversation.answer()
        first = next(answer, "")  # before anything is shown: kernels may be compiled for it, which is said
        write(beginning)
        for text in itertools.chain([first], answer):
            write(text)
        return plan.settings.get("draft")
    write(beginning)
    converse(conversation, lines, write, options.get("prompt", options.get("prompt_text")) is not None)
    if save_state is not None:
        keep(conversation.begun, save_state, plan.loaded)
    return plan.settings.get("draft")


def _collected(plan: Plan) -> Generated:
    with memory_told("--samples or --max-new-tokens"):
        sequences = sequences_of(plan.loaded, plan.jobs, plan.new, plan.place, plan.settings, plan.progress)
    # a given prompt is part of the result; made-up start tokens are not
    rows = [row[plan.hidden :] for row in sequences]
    return Generated(rows, plan.loaded, speculation=plan.settings.get("draft"))


def _described(plan: Plan) -> list[dict[str, Any]]:
    """Of each result, in their order: of which prompt it is (its number, its file and record where it has them), which
    of its samples, and by which condition and settings."""
    conditions = Known(plan.loaded).all
    neutral = {**NEUTRAL, "guidance": 1}
    settings = {"max_new_tokens": plan.new, **plan.settings}
    for name in ("stop_ids", "draft", *(("seed", "temperature") if "beams" in settings else ())):
        settings.pop(name, None)
    stop: StopStrings | None = settings.pop("stop", None)
    settings = {name: value for name, value in settings.items() if neutral.get(name) != value}
    settings |= {} if stop is None else {"stop": stop.strings}
    found, number, last = [], -1, None
    for job in sorted((job for batch in plan.jobs for job in batch), key=lambda job: (job.place, job.first)):
        number, last = number + (job.prompt is not last), job.prompt
        file = job.prompt.source or job.prompt.file
        about: dict[str, Any] = {"prompt": number}
        if file:  # a text that was given is named for messages alone
            about |= {"file": file, **({"record": job.prompt.name} if job.prompt.name else {})}
        if job.condition is not None:
            about["condition"] = told(conditions, job.condition)
        found += [{**about, "sample": sample, "settings": settings} for sample in range(job.first, job.stop)]
    return found


def _write(generated: Generated, out: Path, writer: str | None, described: list[dict[str, Any]]) -> list[Path]:
    """Write sequences by the model's own writer, or another one. Returns the files.

    described: what is said of each, for writers that say it.

    Raises ConfigError where there is none, or another one cannot write them.
    """
    loaded = generated.model
    found = writer_of(loaded, writer)
    assert found is not None
    name, write, options = found
    if "described" in inspect.signature(write).parameters:
        options = {**options, "described": described}
    with own_or_told(loaded, name):
        return write(out, generated.ids, loaded.tokenizer, **options)
