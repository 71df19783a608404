"""Text files out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambaseq.atomic import json_text
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.outputs import numbered, output_file


def write_text(path: str | Path, sequences: Sequence[np.ndarray], tokenizer: Tokenizer) -> list[Path]:
    """Write sequences of ids as UTF-8 text, each file whole or not at all; returns the files written.

    A path that ends in `.jsonl` gets an object `{"text": ...}` a line. Otherwise one sequence goes to `path`
    itself, as it is, and several go to `NAME-000.txt`, `NAME-001.txt`, ... beside it.
    Raises UserError when the disk is full or the place is not writable.
    """
    path = Path(path)
    texts = [tokenizer.decode(np.asarray(ids)) for ids in sequences]
    if path.suffix.lower() == ".jsonl":
        contents = {path: "".join(json_text({"text": text}, ensure_ascii=False) + "\n" for text in texts)}
    else:
        contents = dict(zip(numbered(path, len(texts), ".txt"), texts, strict=True))
    for file, content in contents.items():
        with output_file(file) as target:
            target.write(content.encode("utf-8"))
    return list(contents)
