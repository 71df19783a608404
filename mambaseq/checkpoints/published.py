"""Published language models in the folders of other houses, with their tokenizers, as models of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mambaseq.checkpoints.card import ModelCard, check_generation
from mambaseq.checkpoints.dtypes import dtype_of
from mambaseq.checkpoints.export import LoadedModel
from mambaseq.checkpoints.stored import weights_in
from mambaseq.checkpoints.upstream import load_upstream
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError
from mambaseq.plain import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""The files of a published model's tokenizer; the first one is needed."""
GENERATION = "generation_config.json"
"""The published model's defaults of generation."""

_TOKENIZER, _TEXT = "text/hf", "text/text"
_LENGTH, _NEW_TOKENS = 2048, 256
_PADDING = 128  # rows that vocabularies are padded with, to a multiple that suits a GPU


def load_published(
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    length: int | None = None,
) -> LoadedModel:
    """A language model from a folder with config.json and weights (see `load_upstream`) and its tokenizer.json.

    tokenizer: a tokenizer.json, or a folder with one, in place of the model's own. dtype: of the weights: a name in
    `DTYPES`, or "keep" for that of the file, each tensor by itself; fp32 when left out. length: tokens that `predict`
    reads at once by default; 2,048 when left out, on which the published ones were trained.

    The tokenizer is None where there is none. Raises what `load_upstream` raises, and UserError for a tokenizer that
    cannot be read, or does not fit the model's vocabulary.
    """
    folder = Path(folder)
    asked = dtype_of(dtype, others=("keep",))
    model = load_upstream(folder, keep_dtype=dtype == "keep", dtype=asked or torch.float32)
    assert model.spec is not None
    rows = model.spec["encoder"]["vocab_size"]
    found = _tokenizer(folder if tokenizer is None else Path(tokenizer), rows, asked=tokenizer is not None)
    card = ModelCard(
        spec=model.spec,
        length=length or _LENGTH,
        generation={"max_new_tokens": _NEW_TOKENS, **_generation(folder)},
        task="next_token",
    )
    if found is not None:
        card.tokenizer = {"name": _TOKENIZER, "options": found.options}
        card.start_ids = list(getattr(found, "start_ids", [0]))
        card.reader = card.writer = _TEXT
    return LoadedModel(model, card, found, weights_in(folder))


def _tokenizer(source: Path, rows: int, asked: bool) -> Tokenizer | None:
    path = source / TOKENIZER_FILES[0] if source.is_dir() else source
    if not path.is_file() and not asked:
        return None
    kind: Any = catalog()["tokenizers"].get(_TOKENIZER)
    found: Tokenizer = kind.from_folder(source)
    if found.vocab_size > rows or (2 * found.vocab_size < rows and rows - found.vocab_size >= _PADDING):
        raise UserError(
            f"The tokenizer {path} makes {found.vocab_size:,} ids, but the model's vocabulary has {rows:,}, so they do "
            "not belong together. Give the model's own: --tokenizer FILE, a tokenizer.json or a folder with one."
        )
    return found


def _generation(folder: Path) -> dict[str, Any]:
    """The defaults of `mambaseq generate` that a generation_config.json asks for, where it draws tokens."""
    path = folder / GENERATION
    told = read_json(path) if path.is_file() else {}
    if told.get("do_sample") is not True:
        return {}
    found = {key: told[key] for key in ("temperature", "top_k", "top_p") if told.get(key) is not None}
    try:
        check_generation(found)
    except ConfigError as error:
        raise UserError(f"{path}: {error} Mend or remove it.") from error
    return found
