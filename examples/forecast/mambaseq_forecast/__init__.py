"""What this domain brings. Nothing is imported before it is used, and this file imports no torch."""

from mambaseq.domain import Domain

domain = Domain(
    name="forecast",
    summary="hourly loads and an oil temperature: what comes next?",
    datasets={"hours": ("mambaseq_forecast.hours:Hours", "seven channels of a CSV file, split by time")},
    configs={"hours": ("mambaseq_forecast:configs/hours.yaml", "the next 24 hours by quantiles; two minutes on a CPU")},
    reports={"hours": ("mambaseq_forecast.report:report", "errors beside those of the last value")},
    commands={"made-up": ("mambaseq_forecast.made_up:run", "write a file like the one that ships: FILE")},
)
