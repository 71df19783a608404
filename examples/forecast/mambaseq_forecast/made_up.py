"""Hours that never were: six loads with the rhythms of days and weeks, and an oil temperature that follows them."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np

from mambaseq.arguments import Arguments
from mambaseq_forecast.hours import CHANNELS


def series(rows: int = 2400, seed: int = 0) -> np.ndarray:
    """`(rows, 7)`, an hour a row: rhythms, weather that is remembered for days, noise; oil warms and cools slowly."""
    rng, t = np.random.default_rng(seed), np.arange(rows)
    day, week = np.sin(2 * np.pi * (t - 8) / 24), np.sin(2 * np.pi * t / 168)
    weather = np.zeros(rows)
    for hour in range(1, rows):
        weather[hour] = 0.97 * weather[hour - 1] + rng.normal(0, 0.25)
    sizes = np.array([12.0, 4.0, 10.0, 3.0, 4.0, 1.5])
    mix = rng.normal(0, 0.15, (6, 3)) + np.array([0.7, 0.3, 0.4])
    loads = sizes * (1 + np.stack([day, week, weather], 1) @ mix.T + rng.normal(0, 0.06, (rows, 6)))
    oil = np.full(rows, 25.0)
    for hour in range(1, rows):
        warm = 15 + 4 * weather[hour] + 0.6 * loads[hour, [0, 2]].sum()
        oil[hour] = 0.9 * oil[hour - 1] + 0.1 * warm + rng.normal(0, 0.15)
    return np.concatenate([loads, oil[:, None]], 1)


def run(argv: list[str]) -> None:
    parser = Arguments(prog="mambaseq forecast/made-up", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    begin, hour = datetime.datetime(2025, 1, 1), datetime.timedelta(hours=1)
    rows = enumerate(series(given.rows, given.seed))
    lines = [f"{begin + number * hour},{','.join(f'{value:.2f}' for value in row)}" for number, row in rows]
    given.file.write_text("\n".join([",".join(["date", *CHANNELS]), *lines]) + "\n", encoding="utf-8")
