"""The section of a run's report: errors of the next hour beside those of two guesses that learn nothing."""

from pathlib import Path

from mambaseq.reporting import Section, table
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.parsing import parse_config
from mambaseq_forecast.hours import Hours


def report(run: Path) -> Section:
    data = parse_config(str(RunFolder(run).config), []).make_data(setup=True)
    assert isinstance(data, Hours)
    guesses = {"the last hour again": 1, "the same hour a day ago": 24}
    first, last = data.bounds[1] + 1, data.bounds[2]  # the hours that the run is asked for
    past = {name: data.values[first - hours : last - hours] for name, hours in guesses.items() if hours <= first}
    rows = [(name, (data.values[first:last] - guess).abs().mean().item()) for name, guess in past.items()]
    rows.append(("this run", RunFolder(run).read_results()["val/mae"]))
    text = "Mean absolute errors of the next hour, over the channels, in their units, on the validation hours."
    return Section("Hours", text, table(("", "error"), rows))
