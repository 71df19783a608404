"""The work of `mambaseq generate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.cli.devices import choose_device
from mambaseq.cli.loading import condition_ids, fitting_options
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.generation import generate


def generate_to(
    checkpoint: str | Path,
    out: Path,
    *,
    prompt: str | None = None,
    condition: str | None = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    writer: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[Path]:
    """Generate and write; settings that are None are the run's own. Returns the files written.

    Raises UserError when the run cannot generate, or a setting, the prompt or the condition cannot be used.
    """
    for option, value in (("--samples", samples), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1, not {value}.")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed must be at least 0 and below 2^63, not {seed}.")
    if prompt is not None and out.is_file() and _is_file(prompt) and out.samefile(prompt):
        raise ConfigError(f"--out {out} is the prompt's file and would be overwritten. Give another name.")
    place = choose_device(device)
    loaded = load_model(checkpoint, place)
    card = loaded.card
    name = writer or card.writer
    if name is None or loaded.tokenizer is None:
        raise ConfigError(f"The model at {checkpoint} cannot generate: it has no writer or no tokenizer.")
    write = catalog()["writers"].get(name)
    writer_options = fitting_options("writer", name, write, card.writer_options, own=name == card.writer)
    conditions = condition_ids(loaded, condition)
    ids = prompt_ids(loaded, prompt)
    batch = samples * max(len(conditions), 1)
    chosen = torch.tensor(conditions, device=place).repeat_interleave(samples) if conditions else None
    defaults = card.generation
    count = max_new_tokens or defaults.get("max_new_tokens") or card.length
    if count < 1:
        raise ConfigError(f"The model at {checkpoint} does not say how much to generate; give --max-new-tokens.")
    tokens = generate(
        loaded.model,
        torch.from_numpy(ids).to(place)[None].repeat(batch, 1),
        count,
        temperature=defaults.get("temperature", 1.0) if temperature is None else temperature,
        top_k=defaults.get("top_k", 0) if top_k is None else top_k,
        top_p=defaults.get("top_p", 1.0) if top_p is None else top_p,
        seed=seed,
        condition=chosen,
        stop_ids=() if (end := getattr(loaded.tokenizer, "eos_id", None)) is None else (end,),
        progress=progress,
    )
    # what was made up to begin from is not part of the result; a prompt that was given is
    sequences = [row for row in tokens.cpu().numpy()[:, 0 if prompt is not None else len(ids) :]]
    try:
        return write(out, sequences, loaded.tokenizer, **writer_options)
    except (TypeError, ValueError, AttributeError) as error:
        if name == card.writer:
            raise
        raise ConfigError(
            f"The writer {name!r} cannot write what this model generates ({' '.join(str(error).split()).rstrip('.')})."
            f"{f' Use its own writer ({card.writer!r}).' if card.writer else ''}"
        ) from error


def prompt_ids(loaded: LoadedModel, prompt: str | None) -> np.ndarray:
    """`(length,)` int64 ids of a prompt: of the first record when it is a file, else of the text itself."""
    card = loaded.card
    if prompt is None:
        return np.asarray(card.start_ids, dtype=np.int64)
    assert loaded.tokenizer is not None
    if card.reader is not None and _is_file(prompt):
        records = catalog()["readers"].get(card.reader)(Path(prompt), loaded.tokenizer, **card.reader_options)
        record = next(iter(records), None)
        if record is None:
            raise ConfigError(f"The prompt file {prompt} holds no record. Give another one, or the prompt itself.")
        return record.ids.astype(np.int64)
    try:
        ids = loaded.tokenizer.encode(prompt)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The prompt {prompt!r} is neither a file nor something this model's tokenizer reads."
        ) from error
    return ids.astype(np.int64)


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except OSError:  # too long for a file's name
        return False
