"""The work of `mambaseq generate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, did_you_mean
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

    Raises UserError when the run cannot generate, or the prompt or condition cannot be used.
    """
    loaded = load_model(checkpoint, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    card = loaded.card
    name = writer or card.writer
    if name is None or loaded.tokenizer is None:
        raise ConfigError(f"The model at {checkpoint} cannot generate: it has no writer or no tokenizer.")
    conditions = condition_ids(loaded, condition)
    ids = prompt_ids(loaded, prompt)
    batch = samples * max(len(conditions), 1)
    place = next(loaded.model.parameters()).device
    chosen = torch.tensor(conditions, device=place).repeat_interleave(samples) if conditions else None
    defaults = card.generation
    tokens = generate(
        loaded.model,
        torch.from_numpy(ids).to(place)[None].repeat(batch, 1),
        max_new_tokens or defaults.get("max_new_tokens") or card.length,
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
    return catalog()["writers"].get(name)(out, sequences, loaded.tokenizer, **card.writer_options)


def condition_ids(loaded: LoadedModel, condition: str | None) -> list[int]:
    """Ids of comma-separated condition names. Raises ConfigError for unknown ones, or where one is needed."""
    names = loaded.card.condition_names
    if condition is None:
        if names:
            raise ConfigError(f"This model is conditional; say what to generate with --condition: {', '.join(names)}.")
        return []
    chosen = [part.strip() for part in condition.split(",")]
    for part in chosen:
        if part not in names:
            known = ", ".join(names) or "none, it is not conditional"
            raise ConfigError(f"No condition is named {part!r}.{did_you_mean(part, names)} The model knows: {known}.")
    return [names.index(part) for part in chosen]


def prompt_ids(loaded: LoadedModel, prompt: str | None) -> np.ndarray:
    """`(length,)` int64 ids of a prompt: of the first record when it is a file, else of the text itself."""
    card = loaded.card
    if prompt is None:
        return np.asarray(card.start_ids, dtype=np.int64)
    assert loaded.tokenizer is not None
    if card.reader is not None and Path(prompt).is_file():
        record = next(
            iter(catalog()["readers"].get(card.reader)(Path(prompt), loaded.tokenizer, **card.reader_options))
        )
        return record.ids.astype(np.int64)
    try:
        ids = loaded.tokenizer.encode(prompt)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The prompt {prompt!r} is neither a file nor something this model's tokenizer reads."
        ) from error
    return ids.astype(np.int64)
