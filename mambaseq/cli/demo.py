"""`mambaseq demo`: every domain's demo run on the data that ship with it, and one report."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mambaseq.cli.arguments import Arguments
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, did_you_mean


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq demo",
        description="Train each domain's demo configuration on the shipped data, test it, and write report.html.",
    )
    parser.add_argument(
        "--out", default="runs/demo", help="folder of the runs and the report; an older one is replaced"
    )
    parser.add_argument("--domains", nargs="*", help="only these domains")
    parser.add_argument("--steps", type=int, help="fewer optimizer steps, to try it out")
    arguments = parser.parse_args(argv)
    return demo(Path(arguments.out), arguments.domains, arguments.steps)


def demo_domains(chosen: list[str] | None) -> list[str]:
    """Domains that have a configuration and a report named "demo". Raises ConfigError for unknown ones."""
    names = catalog()
    able = [d for d in sorted(names.domains) if f"{d}/demo" in names["configs"] and f"{d}/demo" in names["reports"]]
    for domain in chosen or []:
        if domain not in able:
            raise ConfigError(
                f"No domain with a demo is named {domain!r}.{did_you_mean(domain, able)} Known: {', '.join(able)}."
            )
    return chosen or able


def demo(out: Path, chosen: list[str] | None = None, steps: int | None = None) -> int:
    """Run the demos and write `out/report.html`; returns the exit code."""
    from mambaseq.cli.evaluate import evaluate
    from mambaseq.cli.fit import fit
    from mambaseq.reporting.page import write_page
    from mambaseq.reporting.runs import RunFolder

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
        if (code := fit(f"{domain}/demo", folder, overrides)) != 0:
            return code
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
    for section in sections:
        print(f"{section.title}: {section.summary}")
    print(f"\n{out / 'report.html'} ({time.perf_counter() - began:.0f} s)")
    return 0


def _costs(rows: list[tuple]) -> object:
    from mambaseq.reporting.sections import Section, table

    header = ("domain", "parameters", "tokens trained on", "tokens a second (training)", "seconds in all")
    total = sum(row[-1] for row in rows)
    return Section("What it cost", f"{total} seconds in all", table(header, rows))
