"""What is to be generated: options, prompts, conditions and a model's own settings become batches of jobs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.records import columns_of
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, cut, cut_list, did_you_mean, shown
from mambaseq.generation.beams import check_beams
from mambaseq.generation.checks import PENALTIES, check_one_pick, continues
from mambaseq.generation.guidance import check_guidance
from mambaseq.generation.reading import best_even
from mambaseq.generation.sampling import NEUTRAL, check_settings
from mambaseq.generation.states import Begun, load_state
from mambaseq.generation.stopping import StopStrings, check_stop
from mambaseq.limits import check_whole
from mambaseq.outputs import check_taken
from mambaseq.runs.conditions import Conditions
from mambaseq.runs.continuing import Job, Prompt, Under, batches
from mambaseq.runs.conversation import check_text, digest_of, keep, unmarked
from mambaseq.runs.devices import choose_device
from mambaseq.runs.drafting import check_draft_tokens, drafted
from mambaseq.runs.known import Asked, Known
from mambaseq.runs.loading import check_reads_text, own_or_told, writer_of
from mambaseq.runs.prompting import NoSuchRecord, ids_of, ids_of_texts, signals, sources_of, texts_of
from mambaseq.runs.repeating import Written

# Options of `planned` that are not for users, and what others call max_new_tokens.
_INNER = ("checkpoint", "writes", "exactly", "again")
_LENGTHS = ("max_tokens", "max_length", "new_tokens", "max_completion_tokens", "n", "length", "tokens")


class Plan(NamedTuple):
    """What is to be generated.

    checkpoint, prompt: as they were given. new: tokens of each result. hidden: positions at the beginning that are no
    part of the result. writer: its name. dtype: of the weights.
    """

    checkpoint: Path
    loaded: LoadedModel
    jobs: list[list[Job]]
    new: int
    place: torch.device
    settings: dict[str, Any]
    progress: bool
    prompt: str | None
    hidden: int
    writer: str | None
    dtype: str


def planned(
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
    dtype: str | None = None,
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
    """What is to be generated; see `mambaseq.runs.generation.generate_from`, whose options and errors these are.

    exactly: conditions as ids or rows, in place of what is said of them. again: the settings of an earlier result.
    writes: the results go to a file, for which there must be a writer.
    """
    check_whole("--samples", samples, 1)
    check_whole("--seed", seed, 0, 2**63 - 1)
    if max_new_tokens is not None:
        check_whole("--max-new-tokens", max_new_tokens, 1)
    _check_amount(samples, max_new_tokens or 1)
    choices = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    choices |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty}
    choices = {name: value for name, value in choices.items() if value is not None}
    check_settings(1.0 if temperature is None else temperature, **NEUTRAL | choices)
    check_stop(stop)
    check_draft_tokens(draft, draft_tokens)
    if save_state is not None and Path(save_state).suffix.lower() != ".safetensors":
        raise ConfigError(
            f"--save-state writes safetensors, not {cut(Path(save_state).name)}. Give a name that ends in .safetensors."
        )
    if draft is not None and guidance != 1:
        raise ConfigError("--draft does not go with --guidance. Leave one of them out.")
    drawn: dict[str, Any] = {"temperature": temperature, **choices, "guidance": guidance if guidance != 1 else None}
    drawn |= {"stop": stop or None, "save_state": save_state, "from_state": from_state, "draft": draft}
    _check_search(beams, length_penalty, drawn, first_sample + samples)
    several, prompt = _texts_given(prompt, prompt_text, prompts, prompts_key)
    place = choose_device(device)
    loaded = load_model(checkpoint, place, dtype)
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
    writing = writer_of(loaded, writer) if writes or writer is not None else None
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
        with own_or_told(loaded, name):
            check_taken(write, np.asarray(found[0].values[:1]), loaded.tokenizer, writer_options)
    count = max_new_tokens or card.generation.get("max_new_tokens") or card.length
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
        begun = _begun(loaded, found, earlier, place, hidden)
        if save_state is not None:
            keep(begun, save_state, loaded)
        found, hidden = [found[0]._replace(values=begun.ids, begun=begun)], begun.hidden
    settings: dict[str, Any] = {
        "temperature": card.generation.get("temperature", 1.0) if temperature is None else temperature,
        "seed": seed,
    }
    if not signal:
        settings |= _token_settings(loaded, choices, stop) | {"guidance": guidance}
        if beams is not None:
            check_one_pick(loaded.model, "--beams is")
            settings |= {"beams": beams, "length_penalty": 1.0 if length_penalty is None else length_penalty}
        if settings["repetition_penalty"] != 1 or settings["presence_penalty"] != 0:
            check_one_pick(loaded.model, PENALTIES)
        if draft is not None:
            conditioned = any(under is not None for one in found for under in one.conditions)
            speculation = drafted(loaded, draft, draft_tokens, conditioned, place, dtype)
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
        dtype or "float32",
    )


def _check_search(beams: int | None, length_penalty: float | None, drawn: dict[str, Any], results: int) -> None:
    """Raise ConfigError for a search of so many beams for so many results that cannot be, or beside options for drawing
    (`drawn`, by name, those that are given), and for a length_penalty without a search."""
    if beams is None:
        if length_penalty is not None:
            raise ConfigError("--length-penalty is of a search. Give --beams, or leave it out.")
        return
    check_beams(beams, 1.0 if length_penalty is None else length_penalty)
    if wrong := [name.replace("_", "-") for name, value in drawn.items() if value is not None]:
        raise ConfigError(f"--beams searches, and --{wrong[0]} is for drawing. Leave one of them out.")
    if results > beams:
        raise ConfigError(f"--beams {beams} finds no {results} results. Give more, or fewer --samples.")


def _texts_given(
    prompt: str | Sequence[str] | None, prompt_text: str | None, prompts: str | Path | None, prompts_key: str | None
) -> tuple[list[tuple[str, str]] | None, str | None]:
    """Texts that are prompts, each with its name for messages, or None, and else what a reader may read. Raises
    ConfigError for two kinds of prompts."""
    if prompts_key is not None and prompts is None:
        raise ConfigError("--prompts-key is of the file --prompts. Give it, or leave the key out.")
    if prompt_text is not None:
        if prompt is not None or prompts is not None:
            raise ConfigError("--prompt-text is the prompt itself, and another one is given. Leave one of them out.")
        return [("--prompt-text", prompt_text)], None
    if prompts is not None:
        if prompt is not None:
            raise ConfigError("--prompt and --prompts were both given. Leave one of them out.")
        return texts_of(Path(prompts), prompts_key), None
    if prompt is None or isinstance(prompt, str):
        return None, prompt
    return [(f"prompt {number}", text) for number, text in enumerate(prompt)], None


def _begun(
    loaded: LoadedModel, found: Sequence[Prompt], earlier: Begun | None, place: torch.device, hidden: int
) -> Begun:
    """What was read of the only prompt, after an earlier state where there is one. Raises ConfigError for several."""
    if len(found) != 1 or len(found[0].conditions) != 1:
        raise ConfigError("A state is of one prompt under one condition, and there are several. Give one.")
    values, under = np.asarray(found[0].values[:]), found[0].conditions[0]
    if earlier is None:
        return Begun.of(loaded.model, values, under, place, hidden)
    return earlier.on(loaded.model, unmarked(loaded.tokenizer, values))


def _token_settings(loaded: LoadedModel, choices: Mapping[str, Any], stop: str | Sequence[str]) -> dict[str, Any]:
    """How tokens are chosen and what ends a sequence: the run's own settings, and over them those that are given."""
    assert loaded.tokenizer is not None
    end = getattr(loaded.tokenizer, "eos_id", None)
    own = {key: value for key, value in loaded.card.generation.items() if key not in ("max_new_tokens", "temperature")}
    return {
        **NEUTRAL,
        **own,
        **choices,
        "stop_ids": () if end is None else (end,),
        "stop": StopStrings(stop, loaded.tokenizer) if stop else None,
    }


def checked_options(options: dict[str, Any], *further: str) -> dict[str, Any]:
    """The options of `generate_from` and its like. Raises ConfigError for one that there is not.

    further: what only the caller takes.
    """
    takes = [one for one in inspect.signature(planned).parameters if one not in _INNER]
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


def _check_amount(sequences: int, new_tokens: int) -> None:
    limits.SEQUENCES.check(sequences, "--samples")
    limits.GENERATED.check(
        sequences * new_tokens, f"--max-new-tokens {str(new_tokens)[:20]} for {sequences:,} sequences"
    )
