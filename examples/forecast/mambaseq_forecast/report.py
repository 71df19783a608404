"""The section of a run's report: errors of the next hour beside those of two guesses that learn nothing."""

from pathlib import Path

import torch

from mambaseq.reporting import Section, table
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.parsing import parse_config


def report(run: Path) -> Section:
    data = parse_config(str(RunFolder(run).config), []).make_data(setup=True)
    guesses = {"the last hour again": 1, "the same hour a day ago": 24}
    whole = torch.cat([batch.targets for batch in data.validation() or []])
    rows = [(name, (whole[:, hours:] - whole[:, :-hours]).abs().mean().item()) for name, hours in guesses.items()]
    rows.append(("this run", RunFolder(run).read_results()["val/mae"]))
    text = "Mean absolute errors of the next hour, over the channels, in their units, on the validation hours."
    return Section("Hours", text, table(("", "error"), rows))
