"""The demo's section on text: bits a byte beside counts, and what the model writes."""

from __future__ import annotations

import html
import math
from pathlib import Path

from mambaseq.reporting import Section, picture, table
from mambaseq.reporting.pictures import learning_curves
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.generation import generate_to
from mambaseq.runs.parsing import parse_config
from mambaseq_text.baselines import unigram_bigram
from mambaseq_text.corpus import CorpusData

PROMPT = "ROMEO:\n"


def report(run: Path) -> Section:
    """Section of a finished `text/corpus` run over bytes."""
    folder = RunFolder(run)
    results = folder.read_results()
    data = parse_config(str(folder.config), []).make_data()
    assert isinstance(data, CorpusData)
    data.setup()
    floors = unigram_bigram(data.raw("train"), data.raw("test"))
    bits = results["test/bits_per_byte"]
    written = generate_to(run, folder.path / "sample.txt", prompt=PROMPT, seed=0).files
    text = written[0].read_text(encoding="utf-8")
    folder.update_results((), **{f"report/{name}": value for name, value in floors.items()})
    body = (
        table(
            ("method", "bits a byte on the test text"),
            [("mambaseq", bits), ("byte bigram", floors["bigram"]), ("byte unigram", floors["unigram"])],
        )
        + picture(learning_curves(folder, 1 / math.log(2), "bits a byte"), "Learning curves")
        + f"<p>What it writes after {html.escape(repr(PROMPT))}:</p><pre>{html.escape(text)}</pre>"
    )
    verdict = "below" if bits < floors["bigram"] else "above"
    summary = f"{bits:.3f} bits a byte on held-out Shakespeare, {verdict} the byte bigram ({floors['bigram']:.3f})"
    return Section("Text: byte by byte", summary, body)
