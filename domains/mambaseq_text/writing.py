"""Text files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.atomic import json_text
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError
from mambaseq.outputs import numbered, output_file, writes

_ROWS = (".jsonl", ".ndjson")


def _check_text(begun: np.ndarray, tokenizer: Tokenizer | None, **_: Any) -> None:
    if tokenizer is None or not isinstance(tokenizer.decode(begun), str):
        raise ConfigError(
            "The writer text writes what a tokenizer of text reads, and this is none. Use the model's own."
        )


@writes("Text is", ".txt", ".text", ".md", *_ROWS, takes=_check_text)
def write_text(
    path: str | Path,
    sequences: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    *,
    described: Sequence[Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write sequences of ids as UTF-8 text, each file whole or not at all; returns the files written.

    A path that ends in `.jsonl` or `.ndjson` gets an object a line: what `described` says of the sequence, and its
    `"text"`. Otherwise one sequence goes to `path` itself, as it is, and several go to `NAME-000.txt`, `NAME-001.txt`,
    ... beside it.
    Raises ConfigError for another ending; UserError when the disk is full or the place is not writable.
    """
    path = Path(path)
    texts = [tokenizer.decode(np.asarray(ids)) for ids in sequences]
    if path.suffix.lower() in _ROWS:
        about = [{} for _ in texts] if described is None else described
        rows = ({**of, "text": text} for of, text in zip(about, texts, strict=True))
        contents = {path: "".join(json_text(row, ensure_ascii=False) + "\n" for row in rows)}
    else:
        contents = dict(zip(numbered(path, len(texts), ".txt"), texts, strict=True))
    for file, content in contents.items():
        with output_file(file) as target:
            target.write(content.encode("utf-8"))
    return list(contents)
