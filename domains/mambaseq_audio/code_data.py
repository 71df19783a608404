"""Streams of a neural codec's codes, each one sequence, with conditions as clips have them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.cache import Unchanged
from mambaseq.data.store import smallest_dtype
from mambaseq.data.windows import Interval
from mambaseq.errors import UserError
from mambaseq.limits import SAMPLES, WINDOW, check_choice, check_setting
from mambaseq_audio.clips import ClipData
from mambaseq_audio.code_files import LAYOUTS, Layout, code_recordings, header, read_frames
from mambaseq_audio.codes import MOST_BOOKS, MOST_CODES, CodeFrames
from mambaseq_audio.notices import Notices
from mambaseq_audio.random_clips import RandomClips
from mambaseq_audio.recordings import Recording, are_manifests, names_of
from mambaseq_audio.stores import Levels, SoundStore, identities_of, kept_store
from mambaseq_audio.tiles import Tiles


class CodeData(ClipData):
    """Streams of codes that a neural codec made of sound (EnCodec, DAC, Mimi, ...), a `.npy` file each: several books a
    frame. Every position is a frame, or, with `delay`, has the code of book k of k frames before. For the encoder and
    the head `codes`; bits a token are bits a code.

    A stream begins from nothing, and so does a crop in training and a piece in validation and test. Those predict every
    code of every stream once.

    Args:
        files: a folder of .npy files, a pattern (`*`, `?`, `**`), a resource, or a list of these; or a manifest, or a
            list of manifests: tables that end in .csv, .tsv or .jsonl, with a column `file` and, if wanted, `split`
            and any others.
        vocabulary: codes of a book: each is at least 0 and below it.
        layout: which axis of the arrays comes first, `frames_books` or `books_frames`.
        books: codes of a frame; left out, as many as most files have.
        delay: shift book k by k frames, so that each code of a frame is predicted from those of the books before it.
        pattern: a regular expression with named groups, searched in each file's name without folder and suffix. A
            manifest's columns are groups too, and need no pattern. Without either, all streams are for training.
        condition: the groups that a stream is generated from, each by itself; none if empty.
        condition_numbers: groups that are numbers, such as `[age]`; a stream may lack one.
        split: the group that decides which set a stream is in; the default is `take`, and `split` with a manifest.
        validation: values of that group for the validation set, such as `0-4` or `theo,lucas`, or a list of them where
            they hold commas; `""` for none. All values that neither set takes are for training.
        test: the same for the test set.
        validation_fraction: share of the files that is drawn for the validation set, by `seed`.
        test_fraction: the same for the test set.
        length: frames of the longest sequence. A longer stream is cropped at random in training, and cut into pieces in
            validation and test.
        skip_bad: leave out files that cannot be used, and list them; false lists them in an error.
        seed: of the order of streams and of the crops in training.
    """

    reader = "audio/codes"
    writer: str | None = "audio/codes"
    tokenizer_name = "audio/codes"
    task = "next_token"

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        vocabulary: int,
        layout: Layout = "frames_books",
        books: int | None = None,
        delay: bool = True,
        pattern: str | None = None,
        condition: Sequence[str] = (),
        condition_numbers: Sequence[str] = (),
        split: str | None = None,
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        validation_fraction: float = 0.0,
        test_fraction: float = 0.0,
        length: int = 1024,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        manifest = are_manifests(names_of(files))
        none = None if manifest and split in (None, "split") else ""
        super().__init__(
            files=files,
            pattern="^(?P<take>)" if pattern is None and not manifest else pattern,
            condition=condition,
            condition_numbers=condition_numbers,
            split=split,
            validation=none if validation is None and test is None else validation or "",
            test=none if validation is None and test is None else test or "",
            validation_fraction=validation_fraction or None,
            test_fraction=test_fraction or None,
            length=length,
            skip_bad=skip_bad,
            seed=seed,
        )
        self.layout, self.vocabulary, self.books, self.delay = layout, vocabulary, books, delay

    def _check(self) -> None:
        check_setting("data.length", self.length, 1, WINDOW.value // MOST_BOOKS)
        check_setting("data.vocabulary", self.vocabulary, 1, MOST_CODES)
        check_choice("data.layout", self.layout, LAYOUTS)

    def _found(self) -> list[Recording]:
        return code_recordings(*self.files)

    def _stored(self, found: Sequence[Recording]) -> SoundStore:
        books = self.books or self._books(found)
        self._use(CodeFrames(books, self.vocabulary, self.delay))

        def blocks(one: Recording, notices: Notices) -> Iterator[np.ndarray]:
            yield read_frames(one, self.layout, books, self.vocabulary).reshape(-1)

        paths = list(dict.fromkeys(one.path for one in found))
        files = Unchanged(paths)
        identities = identities_of(paths)
        meta = {
            "codes": [books, self.vocabulary, self.layout],
            "sources": [identities[one.path] for one in found],
            "recordings": [one.name for one in found],
            "skip_bad": [SAMPLES.value] if self.skip_bad else False,
        }
        return kept_store("codes", Levels(found, blocks, self.skip_bad), smallest_dtype(self.vocabulary), meta, files)

    def _books(self, found: Sequence[Recording]) -> int:
        """The books that most files have, by the headers of a thousand; each of the others says what is wrong."""
        counts: Counter[int] = Counter()
        for one in found[:: 1 + len(found) // 1000]:
            with contextlib.suppress(UserError):
                shape, _, dtype, _ = header(one)
                books = shape[-1 if self.layout == "frames_books" else 0] if len(shape) == 2 and all(shape) else 0
                counts[books] += dtype.kind in "iu" and 0 < books <= MOST_BOOKS
        books, files = counts.most_common(1)[0] if counts else (1, 0)
        return books if files else 1

    def _use(self, codec: Any) -> None:
        if isinstance(codec, CodeFrames):  # known once files have been looked at
            self.tokenizer = self.frames = codec
            self.vocab_size, self.n_codes, self.start_ids = codec.vocab_size, codec.books, (codec.codes,)

    def clips(self, split: str) -> list[np.ndarray]:
        """The whole streams of `"train"`, `"validation"` or `"test"`: `(frames, books)`."""
        return [clip.reshape(-1, self.n_codes or 1) for clip in super().clips(split)]

    def _item(self, stream: Interval, start: int, length: int, condition: Any) -> Batch:
        """Frames of a stream, whose place and number are counted in codes."""
        frames = stream.read(start, length).reshape(-1, self.frames.books)
        ids = torch.from_numpy(self.frames.encode(frames).astype(np.int64))
        targets = ids[1:].masked_fill(ids[1:] == self.frames.codes, -100)
        given = None if condition is None else torch.tensor([condition])
        return Batch(inputs=ids[None, :-1], targets=targets[None], condition=given, target_of="code")

    def train(self) -> RandomClips:
        books = self.frames.books
        return RandomClips(*self._members("train"), self.length * books, self.seed, books, make=self._item)

    def _tiles(self, split: str) -> Tiles | None:
        clips, conditions = self._members(split)
        length = self.length * self.frames.books
        return Tiles(clips, length, first=0, conditions=conditions, make=self._item) if clips else None

    def reader_options(self) -> dict[str, Any]:
        return {"layout": self.layout}

    def writer_options(self) -> dict[str, Any]:
        return {"layout": self.layout}
