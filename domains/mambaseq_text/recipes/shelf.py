"""What the recipe on books reads: whole books for training, validation and test, in bytes or in word pieces, and what
count models and compressors make of them."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.atomic import atomic_folder
from mambaseq.benchmarking.block import autocast
from mambaseq.data.archives import unpack
from mambaseq.errors import DataError
from mambaseq.generation.scoring import Scorer
from mambaseq.models import SequenceModel
from mambaseq.reproduction import Context
from mambaseq_text.baselines import interpolated
from mambaseq_text.recipes.shakespeare import nats
from mambaseq_text.tokenization import TextTokenizer

ARCHIVE = "books.tar.xz"
SHA256 = "db76ecc424fc4dee84bfe6713b01b7fa7cddc302dbaba9ad3f204c6fb7b03d19"
SOURCE = (
    "plain text of eleven novels of Standard Ebooks (GitHub repositories standardebooks/NAME, folder src/epub/text; "
    "CC0, public domain in the United States) in folders train, valid and test, packed with tar and xz"
)
TOKENIZER = "gpt_neox_20b_tokenizer.json"
TOKENIZER_SHA256 = "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"
TOKENIZER_SOURCE = (
    "the tokenizer of GPT-NeoX-20B (Apache-2.0), as 20B_tokenizer.json in the GitHub repository BlinkDL/ChatRWKV, "
    "commit 965e40b85288a91c94c02bfa56adc3ce0fa20a82"
)
MOST_ORDER = 6  # of the count models; on these books the fifth is best


class Texts(NamedTuple):
    """Whole books, `(length,)` uint8 each. Each has a line end before it, which is not predicted: so all bytes of a
    book are, whatever the tokens."""

    train: list[np.ndarray]
    validation: list[np.ndarray]
    test: list[np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Texts:
        """The .txt files in the folders train, valid and test, each in the order of their names.

        Raises DataError for a folder without one.
        """
        found = []
        for name in ("train", "valid", "test"):
            files = sorted((folder / name).glob("*.txt"))
            if not files:
                raise DataError(f"{folder / name} holds no .txt file. Unpack the books again.")
            found.append([np.frombuffer(b"\n" + file.read_bytes(), dtype=np.uint8) for file in files])
        return cls(*found)

    def beginnings(self, trained: int, held_out: int) -> Texts:
        """At most so many bytes of each training book, and of each held-out one, up to the end of a character."""

        def cut(book: np.ndarray, most: int) -> np.ndarray:
            if len(book) <= most:
                return book
            return book[: most - int(np.argmax((book[most::-1] & 0xC0) != 0x80))]

        most = trained, held_out, held_out
        return Texts(*([cut(book, size) for book in books] for books, size in zip(self, most, strict=True)))


def unpacked(context: Context) -> Path:
    """The folder of the books that the user has brought."""
    archive = context.brought(ARCHIVE, SHA256, SOURCE)
    folder = context.folder / "books"
    if not folder.is_dir():
        # another process may be first
        with contextlib.suppress(FileExistsError), atomic_folder(folder, replace=False) as temporary:
            unpack(archive, temporary)
    return folder


class Split(NamedTuple):
    """Books as ids, `(length,)` each, and how many bytes all but their first ids stand for."""

    books: list[Tensor]
    n_bytes: int

    def bits(self, model: SequenceModel, length: int, positions: int) -> float:
        """A byte, in pieces of `length` that know only themselves; so many positions at once."""
        total = sum(nats(model, book, length, max(positions // length, 1)) for book in self.books)
        return total / self.n_bytes / math.log(2)

    def carried(self, model: SequenceModel) -> float:
        """A byte, each book read from its beginning to its end by the state passed on; nan where the state grows with
        the text."""
        if not all(mixer.bounded_state for mixer in model.backbone.mixers()):
            return math.nan
        scorer = Scorer(model)
        with autocast(self.books[0].device):
            total = sum(scorer.document([book.cpu().numpy()]).nats for book in self.books)
        return -total / self.n_bytes / math.log(2)


class Tokens(NamedTuple):
    """The books in one kind of tokens. train: all training books, one after the other, `(length,)`."""

    train: Tensor
    train_bytes: int
    validation: Split
    test: Split
    vocab_size: int

    @classmethod
    def of(cls, texts: Texts, tokenizer: TextTokenizer, device: torch.device) -> Tokens:
        def read(books: Sequence[np.ndarray]) -> Split:
            made = [tokenizer.encode_counted(book.tobytes().decode()) for book in books]
            ids = [torch.from_numpy(one.astype(np.int32)).to(device) for one, _ in made]
            return Split(ids, sum(int(counts[1:].sum()) for _, counts in made))

        train = torch.cat(read(texts.train).books)
        held_out = read(texts.validation), read(texts.test)
        return cls(train, sum(map(len, texts.train)), *held_out, tokenizer.vocab_size)

    @property
    def bytes_per_token(self) -> float:
        return self.train_bytes / len(self.train)


def floors(texts: Texts) -> dict[str, float]:
    """Bits a byte of the validation and test books: a Markov model of the order that is best on validation, gzip and xz
    of each book by itself, and what xz adds for the books behind the training books."""
    train = np.concatenate(texts.train)
    found: dict[str, float] = {}
    sizes = {
        name: sum(len(book) - 1 for book in books)
        for name, books in (("validation", texts.validation), ("bits", texts.test))
    }
    counted = interpolated(train, [*texts.validation, *texts.test], MOST_ORDER)
    n = len(texts.validation)
    validation, test = counted[:, :n].sum(1), counted[:, n:].sum(1)
    order = int(validation.argmin())
    found["order"] = order
    for name, bits in (("validation", validation), ("bits", test)):
        found |= {f"unigram {name}": bits[0] / sizes[name], f"Markov {name}": bits[order] / sizes[name]}
    contents = {"validation": [book[1:].tobytes() for book in texts.validation]}
    contents["bits"] = [book[1:].tobytes() for book in texts.test]
    known = train.tobytes()
    with ThreadPoolExecutor() as pool:  # xz takes a minute for all, and leaves Python to others meanwhile
        before, *behind = pool.map(_xz, [known, *(known + b"".join(some) for some in contents.values())])
    for (name, some), size in zip(contents.items(), behind, strict=True):
        found[f"gzip {name}"] = 8 * sum(len(gzip.compress(one, 9)) for one in some) / sizes[name]
        found[f"xz {name}"] = 8 * sum(map(_xz, some)) / sizes[name]
        found[f"xz behind {name}"] = 8 * (size - before) / sizes[name]
    return found


def _xz(content: bytes) -> int:
    """Its size by `xz -9`, whose memory goes by that of the content."""
    window = max(2 ** (len(content) - 1).bit_length(), 2**12)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(window, 2**26)}]
    return len(lzma.compress(content, filters=filters))
