"""The draft of a generation: n-grams, or another run's model of the same tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, shown
from mambaseq.generation.speculation import MOST_GUESSES, Speculation
from mambaseq.resources import NGRAM, check_draft
from mambaseq.runs.known import Known


def check_draft_tokens(draft: object, tokens: int | None) -> None:
    """Raise ConfigError for a number of guesses out of range, or one that is given without a draft."""
    if tokens is None:
        return
    if draft is None:
        raise ConfigError("--draft-tokens is of --draft. Give it, or leave --draft-tokens out.")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MOST_GUESSES:
        raise ConfigError(
            f"--draft-tokens must be a whole number of at least 1 and at most {MOST_GUESSES}, not {shown(tokens)}."
        )


def drafted(
    loaded: LoadedModel,
    draft: str | Path,
    tokens: int | None,
    conditioned: bool,
    place: torch.device,
    dtype: str | None = None,
) -> Speculation:
    """How tokens are guessed for a model.

    draft: "ngram", or the folder of a run or of an exported model. conditioned: whether there is a condition.
    place, dtype: of its weights.
    Raises UserError for a draft that cannot be loaded, has another tokenizer, or does not know the condition.
    """
    check_draft(draft)
    if str(draft) == NGRAM:
        return Speculation.of(NGRAM, tokens)
    other = load_model(draft, place, dtype)
    if loaded.tokenizer is None or other.tokenizer is None or not _equal(loaded.tokenizer, other.tokenizer):
        raise ConfigError(
            f"The draft at {draft} has another tokenizer than the model at {loaded.source.parent}, so its tokens mean "
            'something else. Give --draft a run that was trained with the same one, or "ngram".'
        )
    if conditioned and Known(other).all != Known(loaded).all:
        raise ConfigError(
            f"The draft at {draft} does not take the conditions of the model at {loaded.source.parent}. Give --draft a "
            'run that was trained with the same ones, or "ngram".'
        )
    return Speculation.of(other.model, tokens)


def _equal(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether they are saved as the same options and files."""
    if type(one) is not type(other) or one.vocab_size != other.vocab_size:
        return False
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        folders = Path(first), Path(second)
        if one.save_files(folders[0]) != other.save_files(folders[1]):
            return False
        files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    return files[0] == files[1]
