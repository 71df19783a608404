"""Generation: continue prompts, and write the results in the domain's own format."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.conditions import told
from mambaseq.data.records import columns_of
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, cut, cut_list, did_you_mean, shown
from mambaseq.generation.beams import check_beams
from mambaseq.generation.checks import PENALTIES, NotFinite, check_one_pick, continues
from mambaseq.generation.guidance import check_guidance
from mambaseq.generation.reading import best_even
from mambaseq.generation.sampling import check_settings
from mambaseq.generation.speculation import Speculation
from mambaseq.generation.states import Begun, load_state
from mambaseq.generation.stopping import StopStrings, check_stop
from mambaseq.generation.values import continue_values
from mambaseq.limits import check_whole
from mambaseq.outputs import check_taken, check_written, output_target
from mambaseq.runs.conditions import Asked, Conditions, Known
from mambaseq.runs.continuing import Job, Progress, Prompt, Under, batches, conditions_of, ended, numbers_of, pieces
from mambaseq.runs.conversation import Conversation, check_text, converse, digest_of, keep, unmarked
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq.runs.drafting import check_draft_tokens, drafted
from mambaseq.runs.loading import check_reads_text, fitting_options
from mambaseq.runs.prompting import NoSuchRecord, ids_of, ids_of_texts, is_file, signals, sources_of, texts_of
from mambaseq.runs.repeating import Written
from mambaseq.runs.replacing import check_not_prompts
from mambaseq.runs.streaming import Plan, streams, written

# Options of `_planned` that are not for users, and what others call max_new_tokens.
_INNER = ("checkpoint", "writes", "exactly", "again")
_LENGTHS = ("max_tokens", "max_length", "new_tokens", "max_completion_tokens", "n", "length", "tokens")


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
    plan = _planned(checkpoint, prompt=prompt, writer=writer, writes=True, again=again, **_checked(options, "pictures"))
    found = _writer(plan.loaded, writer)
    assert found is not None
    check_written(found[1], out)
    if again is not None:
        again.check_result(max(len(plan.jobs[0][0].prompt.values) - plan.hidden, 0), found[2])
    files = getattr(found[1], "files", None)
    count = sum(job.stop - job.first for batch in plan.jobs for job in batch)
    prompts = [job.prompt for batch in plan.jobs for job in batch]
    sources = [path for one in prompts for path in (one.file, one.source) if path]
    sources += [str(one) for one in (prompt, options.get("prompts")) if isinstance(one, str | Path)]
    check_not_prompts(out, {out, *(files(out, count) if files else [])}, sources)
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
        seed, guidance, writer (by which they are to be written; checked first), device, progress; record
        (the number of the only record of the prompt's file that is continued, from 0) and first_sample (the number of
        the first sample); save_state (a file for the state after the prompt), from_state (such a file, which the prompt
        goes on from; the results hold what was read before, too); draft ("ngram", or the folder of a run with a smaller
        model and the same tokenizer: tokens are guessed and checked several at once, one sequence after the other, and
        are what they would be without) and draft_tokens (guesses at once, at most).
    Raises UserError when the run cannot generate, or a setting, the prompt or the condition cannot be used.
    """
    return _collected(_planned(checkpoint, prompt=prompt, **_checked(options)))


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
    plan = _planned(checkpoint, save_state=save_state if lines is None else None, **_checked(options))
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
    write(tokenizer.decode(begun.ids[begun.hidden :]))
    if lines is None:
        for text in conversation.answer():
            write(text)
        return plan.settings.get("draft")
    converse(conversation, lines, write, options.get("prompt", options.get("prompt_text")) is not None)
    if save_state is not None:
        keep(conversation.begun, save_state, plan.loaded)
    return plan.settings.get("draft")


def _collected(plan: Plan) -> Generated:
    with memory_told("--samples or --max-new-tokens"):
        sequences = _sequences(plan.loaded, plan.jobs, plan.new, plan.place, plan.settings, plan.progress)
    # a given prompt is part of the result; made-up start tokens are not
    rows = [row[plan.hidden :] for row in sequences]
    return Generated(rows, plan.loaded, speculation=plan.settings.get("draft"))


def _planned(
    checkpoint: str | Path,
    *,
    prompt: str | Sequence[str] | None = None,
    prompt_text: str | None = None,
    prompts: str | Path | None = None,
    prompts_key: str | None = None,
    condition: Asked | None = None,
    condition_column: str | None = None,
    condition_table: str | Path | None = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    beams: int | None = None,
    length_penalty: float | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    writer: str | None = None,
    writes: bool = False,
    device: str | None = None,
    progress: bool = False,
    record: int | None = None,
    first_sample: int = 0,
    exactly: Sequence[Under] | None = None,
    again: Written | None = None,
    from_state: str | Path | None = None,
    save_state: str | Path | None = None,
    draft: str | Path | None = None,
    draft_tokens: int | None = None,
) -> Plan:
    """What is to be generated; see `generate_from`. exactly: conditions as ids or rows, in place of what is said of
    them."""
    check_whole("--samples", samples, 1)
    check_whole("--seed", seed, 0, 2**63 - 1)
    if max_new_tokens is not None:
        check_whole("--max-new-tokens", max_new_tokens, 1)
    _check_amount(samples, max_new_tokens or 1)
    choices = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    choices |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty}
    choices = {name: value for name, value in choices.items() if value is not None}
    check_settings(**{"temperature": 1.0 if temperature is None else temperature, "top_k": 0, "top_p": 1.0, **choices})
    check_stop(stop)
    check_draft_tokens(draft, draft_tokens)
    if save_state is not None and Path(save_state).suffix.lower() != ".safetensors":
        raise ConfigError(
            f"--save-state writes safetensors, not {cut(Path(save_state).name)}. Give a name that ends in .safetensors."
        )
    if draft is not None and guidance != 1:
        raise ConfigError("--draft does not go with --guidance. Leave one of them out.")
    if beams is not None:
        check_beams(beams, 1.0 if length_penalty is None else length_penalty)
        drawn: dict[str, Any] = {"temperature": temperature, **choices, "guidance": guidance if guidance != 1 else None}
        drawn |= {"stop": stop or None, "save_state": save_state, "from_state": from_state, "draft": draft}
        if wrong := [name.replace("_", "-") for name, value in drawn.items() if value is not None]:
            raise ConfigError(f"--beams searches, and --{wrong[0]} is for drawing. Leave one of them out.")
        if first_sample + samples > beams:
            raise ConfigError(
                f"--beams {beams} finds no {first_sample + samples} results. Give more, or fewer --samples."
            )
    elif length_penalty is not None:
        raise ConfigError("--length-penalty is of a search. Give --beams, or leave it out.")
    if prompts_key is not None and prompts is None:
        raise ConfigError("--prompts-key is of the file --prompts. Give it, or leave the key out.")
    several: list[tuple[str, str]] | None = None
    if prompt_text is not None:
        if prompt is not None or prompts is not None:
            raise ConfigError("--prompt-text is the prompt itself, and another one is given. Leave one of them out.")
        several = [("--prompt-text", prompt_text)]
    elif prompts is not None:
        if prompt is not None:
            raise ConfigError("--prompt and --prompts were both given. Leave one of them out.")
        several = texts_of(Path(prompts), prompts_key)
    elif prompt is not None and not isinstance(prompt, str):
        several, prompt = [(f"prompt {number}", text) for number, text in enumerate(prompt)], None
    place = choose_device(device)
    loaded = load_model(checkpoint, place)
    if again is not None:
        again.check_model(loaded)
    card = loaded.card
    signal = loaded.tokenizer is None
    if signal:
        others = {"stop": stop, "beams": beams, "draft": draft}
        _check_continues(loaded, prompt, [*choices, *(name for name, given in others.items() if given)])
    elif not continues(loaded.model, "tokens"):
        raise ConfigError(
            f"The model at {checkpoint} cannot generate: only a causal model with an lm head can. Give another "
            f"--checkpoint, of a run with the head lm and a causal backbone, such as residual or unet."
        )
    writing = _writer(loaded, writer) if writes or writer is not None else None
    if writing is None and writes:
        raise ConfigError(
            f"The model at {loaded.source} names no writer. Give one: --writer NAME (`mambaseq list writers`)."
        )
    earlier = None
    if from_state is not None:
        check_text(loaded, "--from-state")
        if not (condition is condition_column is condition_table is prompts is None):
            raise ConfigError("--from-state goes on under its own condition, by one --prompt. Leave the others out.")
        earlier = load_state(Path(from_state), loaded.model, digest_of(loaded), place)
        exactly = [] if earlier.condition is None else [earlier.condition]
    elif save_state is not None:
        check_text(loaded, "--save-state")
    sources = sources_of(loaded, prompt) if several is None else []
    if exactly is None:
        read = catalog()["readers"].get(card.reader) if sources and card.reader else None
        there = {} if read is None else {str(path): columns_of(read, path) for path in sources}
        conditions = Conditions(loaded, condition, condition_column, condition_table, there)
    else:
        conditions = Conditions.exactly(exactly)
    if guidance != 1:
        _check_guidance(loaded, guidance, conditions)
    if earlier is not None and prompt is None and several is None:
        found = [Prompt(np.zeros(0, dtype=np.int64), conditions.each or [None])]
    elif several is not None:
        found = ids_of_texts(loaded, several, conditions, None if prompts is None else str(prompts))
    else:
        try:
            found = (signals if signal else ids_of)(loaded, prompt, sources, conditions, record)
        except NoSuchRecord as error:
            raise error if again is None else again.wrong("prompt.record", record, str(error)) from error
    if writing is not None:
        name, write, writer_options = writing
        with _own_or_told(loaded, name):
            check_taken(write, np.asarray(found[0].values[:1]), loaded.tokenizer, writer_options)
    defaults = card.generation
    count = max_new_tokens or defaults.get("max_new_tokens") or card.length
    if not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"The model at {checkpoint} does not say how much to generate (length and generation in "
            f"its model.json); give --max-new-tokens."
        )
    _check_amount(sum(len(one.conditions) for one in found) * samples, count)
    if not signal:
        assert loaded.tokenizer is not None
        for number, one in enumerate(found):
            if not isinstance(one.values, np.ndarray):  # of a reader whose tokens are continued as they are
                continue
            values, given = loaded.tokenizer.continued(one.values, count)
            found[number] = one._replace(values=values, given=given)
    hidden = 0 if prompt is not None or several is not None else len(card.start_ids)
    if earlier is not None or save_state is not None:
        if len(found) != 1 or len(found[0].conditions) != 1:
            raise ConfigError("A state is of one prompt under one condition, and there are several. Give one.")
        one, under = found[0], found[0].conditions[0]
        if earlier is None:
            begun = Begun.of(loaded.model, np.asarray(one.values[:]), under, place, hidden)
        else:
            begun = earlier.on(loaded.model, unmarked(loaded.tokenizer, np.asarray(one.values[:])))
        if save_state is not None:
            keep(begun, save_state, loaded)
        found, hidden = [one._replace(values=begun.ids, begun=begun)], begun.hidden
    settings: dict[str, Any] = {
        "temperature": defaults.get("temperature", 1.0) if temperature is None else temperature,
        "seed": seed,
    }
    if not signal:
        assert loaded.tokenizer is not None
        end = getattr(loaded.tokenizer, "eos_id", None)
        settings |= {
            **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0},
            **{name: value for name, value in defaults.items() if name not in ("max_new_tokens", "temperature")},
            **choices,
            "stop_ids": () if end is None else (end,),
            "stop": StopStrings(stop, loaded.tokenizer) if stop else None,
            "guidance": guidance,
        }
        if beams is not None:
            check_one_pick(loaded.model, "--beams is")
            settings |= {"beams": beams, "length_penalty": 1.0 if length_penalty is None else length_penalty}
        if settings["repetition_penalty"] != 1 or settings["presence_penalty"] != 0:
            check_one_pick(loaded.model, PENALTIES)
        if draft is not None:
            conditioned = any(under is not None for one in found for under in one.conditions)
            speculation = drafted(loaded, draft, draft_tokens, conditioned, place)
            given_too = any(one.given is not None for one in found)
            speculation.check(loaded.model, 1, conditioned, given=given_too)
            settings["draft"] = speculation
    even = signal or best_even(loaded.model)
    return Plan(
        Path(checkpoint),
        loaded,
        list(batches(found, samples, first_sample, even=even, beams=beams or 0, alone=draft is not None)),
        count,
        place,
        settings,
        progress,
        prompt,
        hidden,
        writer or card.writer,
    )


def _checked(options: Mapping[str, Any], *further: str) -> Mapping[str, Any]:
    """The options of `generate_from` and its like. Raises ConfigError for one that there is not.

    further: what only the caller takes.
    """
    takes = [one for one in inspect.signature(_planned).parameters if one not in _INNER]
    for name in options:
        if name not in takes and name not in _INNER:
            near = " Did you mean 'max_new_tokens'?" if name in _LENGTHS else did_you_mean(name, [*takes, *further])
            raise ConfigError(f"generate has no option {shown(name)}.{near} It has: {cut_list(takes, 40, 600)}.")
    return options


def _check_guidance(loaded: LoadedModel, guidance: float, conditions: Conditions) -> None:
    """Raise ConfigError where guidance is none, or the model cannot be guided."""
    known = Known(loaded)
    if loaded.tokenizer is None:
        raise ConfigError("--guidance is for models of tokens, and this one predicts values. Leave it out.")
    check_guidance(guidance)
    if not conditions.by_record and not conditions.each:
        raise ConfigError(
            "--guidance needs a condition that it strengthens. Give one with --condition, or leave it out."
        )
    if needed := [one for one in known.all if not known.may_lack(one)]:
        raise ConfigError(
            f"--guidance compares with the model without its conditions, but it has not learned to do without "
            f"{cut_list(one.name or 'a condition' for one in needed)}. Train with model.encoder.condition_dropout, "
            f"such as 0.1, or leave --guidance out."
        )


def _check_continues(loaded: LoadedModel, prompt: str | None, choices: Sequence[str]) -> None:
    """Raise ConfigError unless the model can continue signals, and no option for tokens is given."""
    where = loaded.source.parent
    check_reads_text(loaded)
    if loaded.card.task not in (None, "next_values") or not continues(loaded.model, "values"):
        raise ConfigError(
            f"The model at {where} cannot generate: it has no tokenizer, and was not trained to predict the next "
            "values of its own channels. Give another --checkpoint, of a run with the head forecast and a causal "
            "backbone, such as residual, on data of next values."
        )
    if choices:
        raise ConfigError(
            f"--{choices[0].replace('_', '-')} is about tokens, but the model at {where} predicts values. Leave it "
            "out; --temperature 0 takes the mean or the median."
        )
    if prompt is None:
        raise ConfigError(f"The model at {where} continues signals. Give one: --prompt FILE.")


def _writer(loaded: LoadedModel, writer: str | None) -> tuple[str, Any, dict[str, Any]] | None:
    """The name, function and options of a model's writer, or of the named one; None where there is none."""
    card = loaded.card
    if (name := writer or card.writer) is None:
        return None
    write = catalog()["writers"].get(name)
    return name, write, fitting_options("writer", name, write, card.writer_options, own=name == card.writer)


def _described(plan: Plan) -> list[dict[str, Any]]:
    """Of each result, in their order: of which prompt it is (its number, its file and record where it has them), which
    of its samples, and by which condition and settings."""
    conditions = Known(plan.loaded).all
    neutral = {
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "guidance": 1,
    }
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
    found = _writer(loaded, writer)
    assert found is not None
    name, write, options = found
    if "described" in inspect.signature(write).parameters:
        options = {**options, "described": described}
    with _own_or_told(loaded, name):
        return write(out, generated.ids, loaded.tokenizer, **options)


@contextlib.contextmanager
def _own_or_told(loaded: LoadedModel, name: str) -> Iterator[None]:
    """Raise ConfigError where a writer that is not the model's own fails on what the model generates."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if name == loaded.card.writer:
            raise
        raise ConfigError(
            f"The writer {shown(name)} cannot write what this model generates "
            f"({' '.join(str(error).split()).rstrip('.')})."
            f"{f' Use its own writer ({shown(loaded.card.writer)}).' if loaded.card.writer else ''}"
        ) from error


def _check_amount(sequences: int, new_tokens: int) -> None:
    limits.SEQUENCES.check(sequences, "--samples")
    limits.GENERATED.check(
        sequences * new_tokens, f"--max-new-tokens {str(new_tokens)[:20]} for {sequences:,} sequences"
    )


def _sequences(
    loaded: LoadedModel,
    jobs: list[list[Job]],
    count: int,
    place: torch.device,
    settings: dict[str, Any],
    shown: bool,
) -> list[np.ndarray]:
    """A sequence for each prompt, condition and sample: `(length,)` int64, or `(length, channels)` float32. Prompts of
    one length are read together, so nothing is padded."""
    if loaded.tokenizer is None:
        return _continued_signals(loaded, jobs, count, place, settings, shown)
    held: dict[tuple[int, int], list[np.ndarray]] = {}
    progress = Progress(_total(jobs, count), None, "token", shown)
    try:
        for number, made in pieces(loaded, jobs, count, place, settings, progress):
            for job, rows in zip(jobs[number], made, strict=True):
                for sample, row in enumerate(rows, start=job.first):
                    held.setdefault((job.place, sample), []).append(row)
    finally:
        progress.close()
    found = []
    prompts = {job.place: job.prompt.values[:] for batch in jobs for job in batch}
    for key in sorted(held):
        begin = prompts[key[0]].astype(np.int64)
        row = ended(np.concatenate([begin, *held.pop(key)]), len(begin), settings.get("stop_ids", ()))
        stop: StopStrings | None = settings.get("stop")
        found.append(row if stop is None else np.concatenate([begin, stop.cut(begin, row[len(begin) :])]))
    return found


def _total(jobs: list[list[Job]], count: int) -> int:
    return count * sum(job.stop - job.first for batch in jobs for job in batch)


def _continued_signals(
    loaded: LoadedModel,
    jobs: list[list[Job]],
    count: int,
    place: torch.device,
    settings: dict[str, Any],
    shown: bool,
) -> list[np.ndarray]:
    found: dict[tuple[int, int], np.ndarray] = {}
    with tqdm(total=len(jobs), unit="batch", disable=not shown or len(jobs) == 1) as bar:
        for batch in jobs:
            width = batch[0].stop - batch[0].first
            try:
                made = continue_values(
                    loaded.model,
                    torch.from_numpy(np.stack([job.prompt.values[:] for job in batch])).to(place),
                    count,
                    condition=conditions_of(batch, place),
                    samples=width,
                    numbers=numbers_of(batch),
                    progress=shown and len(jobs) == 1,
                    **settings,
                ).cpu()
            except NotFinite as error:
                raise NotFinite(f"The model of {loaded.source} cannot generate from this prompt. {error}") from error
            for job, rows in zip(batch, made.unflatten(0, (len(batch), width)).numpy(), strict=True):
                for number, row in enumerate(rows, start=job.first):
                    found[job.place, number] = row
            bar.update()
    return [found[key] for key in sorted(found)]
