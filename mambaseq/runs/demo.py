"""Every domain's demo run on the data that ship with it, and one report."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, did_you_mean, shown
from mambaseq.reporting.numbers import duration
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


def demo(out: Path, chosen: list[str] | None = None, steps: int | None = None, redraw: bool = False) -> Outcome:
    """Run the demos and write `out/report.html`. Stops at the first that does not finish.

    redraw: train nothing; write the page again from the runs that are there.
    Raises ConfigError for unknown domains, UserError where there is no run, or none that has finished, to redraw.
    """
    began = time.perf_counter()
    domains = demo_domains(chosen)
    if redraw and chosen is None:
        domains = [domain for domain in domains if RunFolder(out / domain).config.is_file()] or domains
    sections, rows = [], []
    for number, domain in enumerate(domains, 1):
        folder = RunFolder(out / domain)
        print(f"[{number}/{len(domains)}] {domain}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        if not redraw:
            outcome = _train(domain, folder, steps)
            if outcome.code != 0:
                return outcome
        elif "steps" not in folder.require().read_results():
            raise UserError(
                f"The run {folder.path} has not finished. Resume it with: mambaseq fit --resume {folder.path}"
            )
        sections.append(catalog()["reports"].get(f"{domain}/demo")(folder.path))
        if not redraw:
            folder.update_results(demo_seconds=round(time.perf_counter() - started, 1))
        results = folder.read_results()
        seconds = round(results.get("demo_seconds", results["train_seconds"]))
        rows.append((domain, results["parameters"], results["train_tokens"], results["tokens_per_second"], seconds))
    sections.append(_costs(rows))
    lead = (
        f"One Mamba backbone on {_counted(len(domains))} of data: trained, tested and drawn here, from the shipped "
        f"samples alone, in {duration(sum(row[-1] for row in rows))}."
    )
    write_page(out / "report.html", "mambaseq demo", lead, sections)
    told = [f"{section.title}: {section.summary}" for section in sections]
    return Outcome("finished", "\n".join([*told, "", f"{out / 'report.html'} ({time.perf_counter() - began:.0f} s)"]))


def _train(domain: str, folder: RunFolder, steps: int | None) -> Outcome:
    """Train a domain's demo anew, and test it."""
    if folder.config.exists():  # what an earlier demo wrote, and nothing else
        folder.remove()
    overrides = [] if steps is None else ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    outcome = fit(f"{domain}/demo", folder, overrides)
    if outcome.code == 0:
        print(outcome.message, flush=True)
        evaluate(folder, "test", [])
    return outcome


def _counted(kinds: int) -> str:
    words = ("no kind", "one kind", "two kinds", "three kinds", "four kinds", "five kinds")
    return words[kinds] if kinds < len(words) else f"{kinds} kinds"


def _costs(rows: list[tuple]) -> Section:
    header = ("domain", "parameters", "tokens trained on", "tokens a second (training)", "seconds in all")
    total = sum(row[-1] for row in rows)
    links = ", ".join(f'<a href="{domain}/report.html">{domain}</a>' for domain, *_ in rows)
    pages = f"<p>Each run has a page of its own: {links}.</p>"
    return Section("What it cost", f"{duration(total)} in all", table(header, rows) + pages)
