"""The targets, by name."""

from __future__ import annotations

from collections.abc import Callable

from cases import Case, Place
from fetching import fetch
from inputs import audio, ecg, fasta, prompts, text, training_data
from odd_values import odd, step_all
from run_files import checkpoint, model_json, records, run_config, store, tokenizer, weights
from settings import config, options, overrides

# how many of a hundred cases each target gets, and with `--quick`: most for those that take little time
TARGETS: dict[str, tuple[Callable[[Place], Case], int, float]] = {
    "fasta": (fasta, 9, 16),
    "audio": (audio, 9, 12),
    "text": (text, 9, 12),
    "ecg": (ecg, 5, 0),
    "training_data": (training_data, 4, 1),
    "model_json": (model_json, 11, 7),
    "weights": (weights, 8, 10),
    "tokenizer": (tokenizer, 4, 0),
    "run_config": (run_config, 6, 1),
    "checkpoint": (checkpoint, 4, 1),
    "records": (records, 2, 0.5),
    "store": (store, 3, 0.5),
    "config": (config, 8, 3),
    "overrides": (overrides, 6, 2),
    "options": (options, 5, 16),
    "prompts": (prompts, 3, 4),
    "fetch": (fetch, 4, 7),
    "odd": (odd, 0, 0),  # all of its cases by `odd_values.py`
}
# runs without which there is nothing to do for a target
NEEDS = {"audio": "audio", "ecg": "ecg", "text": "text", "tokenizer": "pieces"}
# what is imported, compiled or kept at first use of a target, and is to be by no case; asked for among the runs
WARM: dict[str, Callable[[], None]] = {"odd": step_all}
