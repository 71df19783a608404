"""The demo's section on DNA: accuracy on the held-out region, next to strong k-mer baselines."""

from __future__ import annotations

from pathlib import Path

from mambaseq.metrics.bootstrap import wilson
from mambaseq.reporting import Section, drawing, side_by_side, table
from mambaseq.reporting.charts import Bar, bars, confusion
from mambaseq.reporting.curves import loss_charts
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.evaluation import evaluate
from mambaseq.runs.parsing import parse_config
from mambaseq_dna.baselines import kmer_baseline
from mambaseq_dna.species import SpeciesData

LENGTHS = (1024, 4096)


def report(run: Path) -> Section:
    """Section of a finished `dna/species` run: accuracy on the test region at 1 kb and at 4 kb."""
    folder = RunFolder(run)
    rows: list[tuple[object, ...]] = []
    chart: list[Bar | str] = []
    summaries, matrices = [], []
    for length in LENGTHS:
        overrides = ["--data.length", str(length)]
        data = parse_config(str(folder.config), overrides).make_data()
        assert isinstance(data, SpeciesData)
        counts = evaluate(folder, "test", overrides, progress=False)["test/confusion"]
        n, correct = sum(map(sum, counts)), sum(row[i] for i, row in enumerate(counts))
        interval = wilson(correct, n)
        data.setup()
        baseline = kmer_baseline(data, 6)
        where = f"{length:,} bases"
        rows.append((where, "mambaseq", correct / n, f"{interval.low:.3f} to {interval.high:.3f}", n))
        between = f"{baseline.low:.3f} to {baseline.high:.3f}"
        rows.append((where, baseline.name, baseline.accuracy, between, baseline.n))
        verdict = "ahead of" if correct / n > baseline.accuracy else "behind"
        summaries.append(f"{correct / n:.3f} at {where}, {verdict} {baseline.name} ({baseline.accuracy:.3f})")
        matrices.append(drawing(confusion(counts, data.class_names), f"The held-out region, windows of {where}"))
        chart += [
            f"Windows of {where}",
            Bar("mambaseq", correct / n, 0, (interval.low, interval.high)),
            Bar(baseline.name, baseline.accuracy, 2, (baseline.low, baseline.high)),
        ]
        folder.update_results(
            **{
                f"report/accuracy_{length}": correct / n,
                f"report/low_{length}": float(interval.low),
                f"report/baseline_{length}": baseline.accuracy,
            }
        )
    species, chance = ", ".join(data.class_names), 1 / len(data.class_names)
    accuracy = drawing(bars(chart, mark=(chance, f"chance {chance:.2f}")), "Accuracy, with 95% intervals")
    body = (
        f"<p>Which mammal does a window of DNA come from: {species}? Trained on ENCODE region ENm001 at "
        "2,048 bases, tested on ENm002, which lies on another chromosome; upper case, no N. Chance is "
        f"{chance:.2f}.</p>"
        + f'<div class="wide">{side_by_side(accuracy, loss_charts(folder, unit="loss (nats)"))}</div>'
        + table(("window", "method", "accuracy", "95% interval", "windows"), rows)
        + f'<div class="wide">{side_by_side(*matrices)}</div>'
    )
    return Section("DNA: species of a window", "; ".join(summaries), body, accuracy)
