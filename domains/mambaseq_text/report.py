"""The demo's section on text: bits a byte next to count models, and generated text."""

from __future__ import annotations

import html
import math
from pathlib import Path

from mambaseq.reporting import Section, drawing, side_by_side, table
from mambaseq.reporting.charts import Bar, bars
from mambaseq.reporting.curves import loss_charts
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
    rows = [("mambaseq", bits), ("byte bigram", floors["bigram"]), ("byte unigram", floors["unigram"])]
    chart = drawing(
        bars([Bar(name, value, 0 if name == "mambaseq" else 2) for name, value in rows]),
        "Bits a byte on the test text: fewer are better",
    )
    figures = table(("method", "bits a byte on the test text"), rows)
    sample = text.removeprefix(PROMPT)
    begun = f"<strong>{html.escape(PROMPT)}</strong>"
    body = (
        "<p>Trained on the first nine tenths of Shakespeare's plays, tested on the last.</p>"
        f'<div class="wide">{side_by_side(chart + figures, loss_charts(folder, 1 / math.log(2), "bits a byte"))}</div>'
        f"<p>What it writes after {html.escape(repr(PROMPT))}:</p><pre>{begun}{html.escape(sample)}</pre>"
    )
    verdict = "below" if bits < floors["bigram"] else "above"
    summary = f"{bits:.3f} bits a byte on held-out Shakespeare, {verdict} the byte bigram ({floors['bigram']:.3f})"
    head = f"{chart}<pre>{begun}{html.escape(_first_lines(sample))}</pre>"
    return Section("Text: byte by byte", summary, body, head)


def _first_lines(text: str, most: int = 140) -> str:
    """The beginning of a text, up to the last complete line or word within so many characters."""
    if len(text) <= most:
        return text
    part = text[:most]
    return part[: max(part.rfind("\n"), part.rfind(" "), 1)] + " …"
