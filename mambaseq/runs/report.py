"""A run's page: what its domain has to say of it, and what was trained."""

from __future__ import annotations

from mambaseq.domain import catalog
from mambaseq.errors import paragraph
from mambaseq.reporting.page import write_page
from mambaseq.reporting.runs import RunFolder
from mambaseq.reporting.sections import Section, picture, table


def write_report(folder: RunFolder, dataset: str) -> str:
    """Write `report.html` of a finished run where its domain registers a report under the data set's name: the report's
    section, the learning curves and the results. Returns what there is to say: "" where all is well.

    A report that fails, in whatever way, takes nothing from the run.
    """
    if dataset not in catalog()["reports"]:
        return ""
    try:
        section = catalog()["reports"].get(dataset)(folder.path)
        if not isinstance(section, Section):
            raise TypeError(f"it gives a {type(section).__name__}, not a mambaseq.reporting.Section")
        write_page(folder.report, f"{folder.path.name}: {dataset}", section.summary, [section, _training(folder)])
    except Exception as error:  # whatever a third party's function does
        told = paragraph(f"{type(error).__name__}: {error}", 300)
        return f"{folder.path}: the run is complete, and its report {dataset} failed ({told})."
    return ""


def _training(folder: RunFolder) -> Section:
    results = {key: value for key, value in folder.read_results().items() if isinstance(value, int | float | str)}
    curves = picture(folder.curves.read_bytes(), "Learning curves") if folder.curves.is_file() else ""
    steps = f"{results.get('steps', 0):,} steps"
    return Section("Training", steps, curves + table(("result", "value"), list(results.items())))
