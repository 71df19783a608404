"""Generation: continue prompts, and write the results in the domain's own format."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.records import Record
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut_list, shown
from mambaseq.generation import generate
from mambaseq.generation.decode import NotFinite, check_whole, continues
from mambaseq.generation.guidance import check_guidance
from mambaseq.generation.sampling import check_settings
from mambaseq.generation.values import continue_values
from mambaseq.outputs import output_target
from mambaseq.runs.conditions import Conditions, Given, Known
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq.runs.loading import columns_given, fitting_options, records_of

_AT_ONCE = 256  # sequences that are generated together: their states are in memory


class Generated(NamedTuple):
    """What was generated.

    ids: one for each prompt, condition and sample, in this order: `(length,)` int64, or for a signal `(length,
        channels)` float32. model: what generated them. files: those written.
    """

    ids: list[np.ndarray]
    model: LoadedModel
    files: list[Path] = []  # noqa: RUF012 - nobody adds to it

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
    checkpoint: str | Path, out: Path, *, prompt: str | None = None, writer: str | None = None, **options: Any
) -> Generated:
    """Generate and write. Returns what was generated, with the files. options: see `generate_from`.

    Raises UserError when the run cannot generate, or a setting, the prompt or the condition cannot be used.
    """
    output_target(out, folder=True)  # the writer decides whether it may be one
    if prompt is not None and out.is_file() and _is_file(prompt) and out.samefile(prompt):
        raise ConfigError(f"--out {out} is the prompt's file and would be overwritten. Give another name.")
    generated = generate_from(checkpoint, prompt=prompt, writer=writer, writes=True, **options)
    return generated._replace(files=_write(generated, out, writer))


def generate_from(
    checkpoint: str | Path,
    *,
    prompt: str | None = None,
    condition: Given | Sequence[Given] | None = None,
    condition_column: str | None = None,
    condition_table: str | Path | None = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    writer: str | None = None,
    writes: bool = False,
    device: str | None = None,
    progress: bool = False,
) -> Generated:
    """Generate sequences. Settings that are None are the run's own.

    Every record of a prompt's file is continued, under every condition, `samples` times: sequences are in this order.
    Each is what it would be without the others.
    condition_column, condition_table: each record under a condition of its own instead; see
        `mambaseq.runs.conditions.Conditions`.
    guidance: see `mambaseq.generation.generate`.
    writer: by which they are to be written; checked first, and must be there if it `writes`.
    Raises UserError when the run cannot generate, or a setting, the prompt or the condition cannot be used.
    """
    check_whole("--samples", samples, 1)
    check_whole("--seed", seed, 0, 2**63 - 1)
    if max_new_tokens is not None:
        check_whole("--max-new-tokens", max_new_tokens, 1)
    _check_amount(samples, max_new_tokens or 1)
    check_settings(1.0 if temperature is None else temperature, top_k or 0, 1.0 if top_p is None else top_p)
    place = choose_device(device)
    loaded = load_model(checkpoint, place)
    card = loaded.card
    signal = loaded.tokenizer is None
    if signal:
        _check_continues(loaded, prompt, top_k, top_p)
    elif not continues(loaded.model, "tokens"):
        raise ConfigError(
            f"The model at {checkpoint} cannot generate: only a causal model with an lm head can. Give another "
            f"--checkpoint, of a run with the head lm and a causal backbone, such as residual or unet."
        )
    if _writer(loaded, writer) is None and writes:
        raise ConfigError(
            f"The model at {loaded.source} names no writer. Give one: --writer NAME (`mambaseq list writers`)."
        )
    conditions = Conditions(loaded, condition, condition_column, condition_table)
    if guidance != 1:
        _check_guidance(loaded, guidance, conditions)
    prompts = _signals(loaded, str(prompt), conditions) if signal else _ids(loaded, prompt, conditions)
    defaults = card.generation
    count = max_new_tokens or defaults.get("max_new_tokens") or card.length
    if not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"The model at {checkpoint} does not say how much to generate (length and generation in "
            f"its model.json); give --max-new-tokens."
        )
    _check_amount(sum(len(prompt.conditions) for prompt in prompts) * samples, count)
    if not signal:
        assert loaded.tokenizer is not None
        for number, one in enumerate(prompts):
            values, given = loaded.tokenizer.continued(one.values, count)
            prompts[number] = one._replace(values=values, given=given)
    settings: dict[str, Any] = {
        "temperature": defaults.get("temperature", 1.0) if temperature is None else temperature,
        "seed": seed,
    }
    if not signal:
        end = getattr(loaded.tokenizer, "eos_id", None)
        settings |= {
            "top_k": defaults.get("top_k", 0) if top_k is None else top_k,
            "top_p": defaults.get("top_p", 1.0) if top_p is None else top_p,
            "stop_ids": () if end is None else (end,),
            "guidance": guidance,
        }
    with memory_told("--samples or --max-new-tokens"):
        sequences = _sequences(loaded, prompts, samples, count, place, settings, progress)
    # a given prompt is part of the result; made-up start tokens are not
    sequences = sequences if prompt is not None else [row[len(card.start_ids) :] for row in sequences]
    return Generated(sequences, loaded)


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


def _check_continues(loaded: LoadedModel, prompt: str | None, top_k: int | None, top_p: float | None) -> None:
    """Raise ConfigError unless the model can continue signals, and no option for tokens is given."""
    where = loaded.source.parent
    if loaded.card.task not in (None, "next_values") or not continues(loaded.model, "values"):
        raise ConfigError(
            f"The model at {where} cannot generate: it has no tokenizer, and was not trained to predict the next "
            "values of its own channels. Give another --checkpoint, of a run with the head forecast and a causal "
            "backbone, such as residual, on data of next values."
        )
    if top_k is not None or top_p is not None:
        raise ConfigError(
            f"--top-k and --top-p choose among tokens, but the model at {where} predicts values. Leave them out; "
            "--temperature 0 takes the mean or the median."
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


def _write(generated: Generated, out: Path, writer: str | None = None) -> list[Path]:
    """Write sequences by the model's own writer, or another one. Returns the files.

    Raises ConfigError where there is none, or another one cannot write them.
    """
    loaded, card = generated.model, generated.model.card
    found = _writer(loaded, writer)
    assert found is not None
    name, write, options = found
    try:
        return write(out, generated.ids, loaded.tokenizer, **options)
    except (TypeError, ValueError, AttributeError) as error:
        if name == card.writer:
            raise
        raise ConfigError(
            f"The writer {shown(name)} cannot write what this model generates "
            f"({' '.join(str(error).split()).rstrip('.')})."
            f"{f' Use its own writer ({shown(card.writer)}).' if card.writer else ''}"
        ) from error


def _check_amount(sequences: int, new_tokens: int) -> None:
    limits.SEQUENCES.check(sequences, "--samples")
    limits.GENERATED.check(
        sequences * new_tokens, f"--max-new-tokens {str(new_tokens)[:20]} for {sequences:,} sequences"
    )


_Under = int | tuple[int, ...] | None  # see mambaseq.conditions


class _Prompt(NamedTuple):
    """What is continued, `(length, ...)` int64 or `(length, channels)` float32, and under which conditions, ids or
    rows; [None] where none is given. given: what is known of what is added; see `mambaseq.generation.generate`."""

    values: np.ndarray
    conditions: Sequence[_Under]
    given: np.ndarray | None = None


class _Job(NamedTuple):
    """Samples `[first, stop)` of a prompt under a condition.

    place: among all (prompt, condition). earlier: how many samples prompts before it have that are equal to it, under
    the same condition.
    """

    place: int
    prompt: np.ndarray
    condition: _Under
    first: int
    stop: int
    earlier: int
    given: np.ndarray | None


def _sequences(
    loaded: LoadedModel,
    prompts: list[_Prompt],
    samples: int,
    count: int,
    place: torch.device,
    settings: dict[str, Any],
    progress: bool,
) -> list[np.ndarray]:
    """A sequence for each prompt, condition and sample: `(length,)` int64, or `(length, channels)` float32. Prompts of
    one length are read together, so nothing is padded."""
    go_on: Any = generate if loaded.tokenizer is not None else continue_values
    found: dict[tuple[int, int], np.ndarray] = {}
    batches = list(_batches(prompts, samples))
    with tqdm(total=len(batches), unit="batch", disable=not progress or len(batches) == 1) as bar:
        for batch in batches:
            given = None
            if batch[0].condition is not None:
                given = torch.tensor([job.condition for job in batch], device=place)
            width = batch[0].stop - batch[0].first
            more: dict[str, Any] = {}
            if batch[0].given is not None:
                more["given"] = torch.from_numpy(np.stack([job.given for job in batch if job.given is not None]))
            try:
                made = go_on(
                    loaded.model,
                    torch.from_numpy(np.stack([job.prompt for job in batch])).to(place),
                    count if batch[0].given is None else len(batch[0].given),
                    condition=given,
                    samples=width,
                    numbers=torch.tensor(
                        [list(range(job.earlier + job.first, job.earlier + job.stop)) for job in batch]
                    ),
                    progress=progress and len(batches) == 1,
                    **settings,
                    **more,
                ).cpu()
            except NotFinite as error:
                raise NotFinite(f"The model of {loaded.source} cannot generate from this prompt. {error}") from error
            for job, rows in zip(batch, made.unflatten(0, (len(batch), width)).numpy(), strict=True):
                for number, row in enumerate(rows, start=job.first):
                    found[job.place, number] = _ended(row, len(job.prompt), settings.get("stop_ids", ()))
            bar.update()
    return [found[key] for key in sorted(found)]


def _batches(prompts: list[_Prompt], samples: int) -> Iterator[list[_Job]]:
    """Jobs with one prompt length and one number of samples, at most `_AT_ONCE` sequences together."""
    by_shape: dict[tuple[int, int], list[_Job]] = {}
    seen: collections.Counter[tuple[bytes, _Under]] = collections.Counter()
    place = -1
    for prompt, conditions, given in prompts:
        for condition in conditions:
            place += 1
            earlier = seen[prompt.tobytes(), condition] * samples
            seen[prompt.tobytes(), condition] += 1
            for first in range(0, samples, _AT_ONCE):
                stop = min(first + _AT_ONCE, samples)
                job = _Job(place, prompt, condition, first, stop, earlier, given)
                by_shape.setdefault((len(prompt), stop - first), []).append(job)
    for (_, width), jobs in by_shape.items():
        at_once = max(1, _AT_ONCE // width)
        for begin in range(0, len(jobs), at_once):
            yield jobs[begin : begin + at_once]


def _ended(row: np.ndarray, prompt: int, stop_ids: Sequence[int]) -> np.ndarray:
    """The sequence up to its first stop. What follows was generated only because others in the batch were longer."""
    if not stop_ids:
        return row
    stops = np.flatnonzero(np.isin(row[prompt:], list(stop_ids)))
    return row[: prompt + int(stops[0]) + 1] if len(stops) else row


def _prompt_records(loaded: LoadedModel, reader: str, prompt: str, conditions: Conditions) -> list[Record]:
    """The records of a prompt's file, from the model's reader. Raises ConfigError where there is none, or an empty
    one."""
    found = []
    read = catalog()["readers"].get(reader)
    options = fitting_options("reader", reader, read, loaded.card.reader_options, own=True)
    options = {**options, **columns_given(reader, read, conditions.fields)}
    for record in records_of(read, Path(prompt), loaded.tokenizer, options):
        if not len(record):
            raise ConfigError(
                f"The prompt file {prompt} has an empty record, {shown(record.name, 300)}, and a prompt has at "
                f"least one {'step' if loaded.tokenizer is None else 'token'}. Remove it."
            )
        if conditions.by_record:
            record = dataclasses.replace(record, condition=conditions.of(record, record.source or prompt))
        found.append(record)
        limits.SEQUENCES.check(len(found), f"The prompt file {prompt}")
    if not found:
        raise ConfigError(f"The prompt file {prompt} holds no record. Give another one, or the prompt itself.")
    return found


def _under(record: Record, conditions: Conditions) -> Sequence[_Under]:
    """The conditions of a prompt."""
    return [record.condition] if conditions.by_record else conditions.each or [None]


def _signals(loaded: LoadedModel, prompt: str, conditions: Conditions) -> list[_Prompt]:
    """`(length, channels)` float32 for every record of a prompt's file. Raises ConfigError for a file that the model's
    reader does not read as signals with its channels."""
    card, channels = loaded.card, loaded.card.spec["encoder"].get("n_channels")
    if not _is_file(prompt):
        raise ConfigError(f"--prompt {shown(prompt)} is not a file, and a signal is read from a file. Check the path.")
    if card.reader is None:
        raise ConfigError(f"The model at {loaded.source.parent} names no reader, so no prompt can be read.")
    found = []
    for record in _prompt_records(loaded, card.reader, prompt, conditions):
        signal = record.signal
        if signal is None or signal.ndim != 2 or (channels is not None and signal.shape[1] != channels):
            kind = "ids" if signal is None else f"a signal {signal.shape}"
            raise ConfigError(
                f"The record {shown(record.name, 300)} of {prompt} is {kind}, but the model reads (length, "
                f"{channels}). Give a file with its channels."
            )
        found.append(_Prompt(signal.astype(np.float32), _under(record, conditions)))
    return found


def _ids(loaded: LoadedModel, prompt: str | None, conditions: Conditions) -> list[_Prompt]:
    """`(length,)` int64 ids of each prompt: every record of a file, or the text itself."""
    card = loaded.card
    if prompt is not None and card.reader is not None and _is_file(prompt):
        found = []
        for record in _prompt_records(loaded, card.reader, prompt, conditions):
            assert record.ids is not None  # from a reader that has a tokenizer
            found.append(_Prompt(record.ids.astype(np.int64), _under(record, conditions)))
        return found
    if conditions.by_record:
        raise ConfigError(
            "--condition-column is of the records of a file, and --prompt is none. Say on what with --condition."
        )
    if prompt is None:
        return [_Prompt(np.asarray(card.start_ids, dtype=np.int64), conditions.each or [None])]
    assert loaded.tokenizer is not None
    try:
        ids = loaded.tokenizer.encode(prompt)
    except UserError as error:
        raise ConfigError(
            f"--prompt {shown(prompt)} is not a file, and cannot be used as the prompt itself. {error}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--prompt {shown(prompt)} is neither a file nor text that this model's tokenizer reads."
        ) from error
    return [_Prompt(ids.astype(np.int64), conditions.each or [None])]


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except OSError:  # too long for a file's name
        return False
