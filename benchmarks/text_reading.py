"""How fast text is tokenised on one core: MB/s by `tokenizers` alone and by this project, which give the same ids.

    python benchmarks/text_reading.py --tokenizer tokenizer.json FILE [FILE ...]

Files are plain text. The first reading begins with no word known, the second knows those of the first; a corpus that is
larger than these files is between the two. Times are those of the processor, the best of three; a store's are of all
its processes, with reading, hashing and writing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from mambaseq_text.corpus import CorpusData
from mambaseq_text.tokenization import HFTokenizer

from mambaseq.resources import cores

PIECE = 1 << 20


def best(run: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Seconds of the processor, the least of several runs, and what the last one gave."""
    seconds = []
    for _ in range(times):
        begun = time.process_time()
        found = run()
        seconds.append(time.process_time() - begun)
    return min(seconds), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("files", nargs="+", help="plain text in UTF-8")
    given = parser.parse_args()
    text = "".join(Path(name).read_text(encoding="utf-8") for name in given.files)
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    size = len(text.encode()) / 1e6
    library = HFTokenizer(given.tokenizer)._tokenizer

    def by_library() -> np.ndarray:
        found = library.encode_batch_fast(pieces, add_special_tokens=False)
        return np.concatenate([np.asarray(one.ids) for one in found])

    def by_words(tokenizer: HFTokenizer) -> np.ndarray:
        return np.concatenate([tokenizer.encode_counted(piece)[0] for piece in pieces])

    known = HFTokenizer(given.tokenizer)
    alone, wanted = best(by_library)
    cold, found = best(lambda: by_words(HFTokenizer(given.tokenizer)))
    by_words(known)
    warm, again = best(lambda: by_words(known))
    assert np.array_equal(wanted, found)
    assert np.array_equal(wanted, again)
    loading, _ = best(lambda: HFTokenizer(given.tokenizer))
    print(f"{size:.1f} MB, {len(wanted):,} tokens")
    print(f"tokenizers alone, in batches   {size / alone:6.2f} MB/s a core")
    print(f"no word known before           {size / (cold - loading):6.2f} MB/s a core")
    print(f"words known                    {size / warm:6.2f} MB/s a core")
    for workers in (0, cores()):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["MAMBASEQ_CACHE"] = cache
            options = {"tokenizer": "text/hf", "tokenizer_options": {"path": given.tokenizer}}
            data = CorpusData(files=given.files, workers=workers, duplicates="drop", **options)  # type: ignore[arg-type]
            begun, spent = time.perf_counter(), processor()
            data.setup()
            took, spent = time.perf_counter() - begun, processor() - spent
            print(
                f"a store, {workers} processes beside   {size / spent:6.2f} MB/s a core, {size / took:.2f} of wall time"
            )


def processor() -> float:
    """Seconds of the processor, of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
