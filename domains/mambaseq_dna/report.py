"""The demo's section on DNA: accuracy on the held-out region beside strong counts of words."""

from __future__ import annotations

from pathlib import Path

from scipy.stats import binomtest

from mambaseq.cli.config import parse_config
from mambaseq.cli.evaluate import evaluate
from mambaseq.reporting import Section, picture, table
from mambaseq.reporting.pictures import confusion_matrix, learning_curves
from mambaseq.reporting.runs import RunFolder
from mambaseq_dna.baselines import kmer_baseline
from mambaseq_dna.species import SpeciesData

LONGER = 4096


def report(run: Path) -> Section:
    """Section of a finished `dna/species` run: test accuracy at the length of training and at 4 kb."""
    folder = RunFolder(run)
    results = folder.read_results()
    rows: list[tuple[object, ...]] = []
    summary = ""
    data = None
    for length in (None, LONGER):
        overrides = [] if length is None else ["--data.length", str(length)]
        settings = parse_config(str(folder.config), overrides)
        data = settings.make_data()
        assert isinstance(data, SpeciesData)
        data.setup()
        if length is None:
            found = {name: results[name] for name in results if name.startswith("test/")}
        else:
            found = evaluate(folder, "test", overrides, progress=False)
            folder.update_results(
                **found_at(length, found), **{k: v for k, v in results.items() if k.startswith("test/")}
            )
        counts = found["test/confusion"]
        n = sum(map(sum, counts))
        correct = sum(counts[i][i] for i in range(len(counts)))
        interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
        baseline = kmer_baseline(data, 6)
        where = f"{data.length:,} bases"
        rows.append((where, "mambaseq", correct / n, f"{interval.low:.3f} to {interval.high:.3f}", n))
        rows.append((where, baseline.name, baseline.accuracy, f"{baseline.low:.3f} to {baseline.high:.3f}", baseline.n))
        folder.update_results(
            **{
                f"report/accuracy_{data.length}": correct / n,
                f"report/low_{data.length}": float(interval.low),
                f"report/baseline_{data.length}": baseline.accuracy,
            }
        )
        if length is None:
            verdict = "ahead of" if correct / n > baseline.accuracy else "behind"
            summary = (
                f"{correct / n:.3f} of {n} held-out windows of {where} labelled right (chance {1 / len(counts):.2f}), "
                f"{verdict} {baseline.name} ({baseline.accuracy:.3f})"
            )
    assert data is not None
    names = list(data.class_names)
    body = (
        f"<p>Which of {len(names)} mammals does a window of DNA come from? Trained on region ENm001, tested on ENm002, "
        "which lies on another chromosome; upper case, no N.</p>"
        + table(("window", "method", "accuracy", "95% interval", "windows"), rows)
        + picture(learning_curves(folder), "Learning curves")
        + picture(confusion_matrix(results["test/confusion"], names), "Confusion matrix on the held-out region")
    )
    return Section("DNA: species of a window", summary, body)


def found_at(length: int, found: dict[str, object]) -> dict[str, object]:
    """Results at another length under names of their own."""
    return {f"{name}@{length}": value for name, value in found.items()}
