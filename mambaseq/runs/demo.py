"""Every domain's demo run on the data that ship with it, and one report."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.reporting.page import write_page
from mambaseq.reporting.runs import RunFolder
from mambaseq.reporting.sections import Section, table
from mambaseq.runs.evaluation import evaluate
from mambaseq.runs.finishing import Outcome
from mambaseq.runs.training import fit


def demo_domains(chosen: list[str] | None) -> list[str]:
    """Domains that have a configuration and a report named "demo". Raises ConfigError for unknown ones."""
    names = catalog()
    able = [d for d in sorted(names.domains) if f"{d}/demo" in names["configs"] and f"{d}/demo" in names["reports"]]
    for domain in chosen or []:
        if domain not in able:
            raise ConfigError(
                f"No domain with a demo is named {shown(domain)}.{did_you_mean(domain, able)} Known: {', '.join(able)}."
            )
    return chosen or able


def demo(out: Path, chosen: list[str] | None = None, steps: int | None = None) -> Outcome:
    """Run the demos and write `out/report.html`. The first that does not finish ends it."""
    began = time.perf_counter()
    domains = demo_domains(chosen)
    sections, rows = [], []
    for number, domain in enumerate(domains, 1):
        folder = RunFolder(out / domain)
        if folder.config.exists():  # an earlier demo's, and nothing else that lies there
            folder.remove()
        print(f"[{number}/{len(domains)}] {domain}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        overrides = (
            [] if steps is None else ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
        )
        outcome = fit(f"{domain}/demo", folder, overrides)
        if outcome.code != 0:
            return outcome
        print(outcome.message, flush=True)
        evaluate(folder, "test", [])
        section = catalog()["reports"].get(f"{domain}/demo")(folder.path)
        seconds = time.perf_counter() - started
        folder.update_results(demo_seconds=round(seconds, 1))
        results = folder.read_results()
        rows.append(
            (domain, results["parameters"], results["train_tokens"], results["tokens_per_second"], round(seconds))
        )
        sections.append(section)
    sections.append(_costs(rows))
    lead = (
        f"One Mamba backbone, {len(domains)} kinds of data, trained here in {time.perf_counter() - began:.0f} seconds."
    )
    write_page(out / "report.html", "mambaseq demo", lead, sections)
    told = [f"{section.title}: {section.summary}" for section in sections]
    return Outcome("finished", "\n".join([*told, "", f"{out / 'report.html'} ({time.perf_counter() - began:.0f} s)"]))


def _costs(rows: list[tuple]) -> Section:
    header = ("domain", "parameters", "tokens trained on", "tokens a second (training)", "seconds in all")
    total = sum(row[-1] for row in rows)
    return Section("What it cost", f"{total} seconds in all", table(header, rows))
