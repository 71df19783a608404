"""The targets, by name."""

from __future__ import annotations

from collections.abc import Callable

from cases import Case, Place
from fetching import fetch
from inputs import audio, ecg, fasta, prompts, text, training_data
from odd_values import odd, step_all
from run_files import checkpoint, model_json, records, run_config, store, tokenizer, weights
from settings import config, options, overrides

# how many of a hundred cases each target gets
TARGETS: dict[str, tuple[Callable[[Place], Case], int]] = {
    "fasta": (fasta, 9),
    "audio": (audio, 9),
    "text": (text, 9),
    "ecg": (ecg, 5),
    "training_data": (training_data, 4),
    "model_json": (model_json, 11),
    "weights": (weights, 8),
    "tokenizer": (tokenizer, 4),
    "run_config": (run_config, 6),
    "checkpoint": (checkpoint, 4),
    "records": (records, 2),
    "store": (store, 3),
    "config": (config, 8),
    "overrides": (overrides, 6),
    "options": (options, 5),
    "prompts": (prompts, 3),
    "fetch": (fetch, 4),
    "odd": (odd, 0),  # all of its cases by `odd_values.py`
}
# runs without which there is nothing to do for a target
NEEDS = {"audio": "audio", "ecg": "ecg", "text": "text", "tokenizer": "pieces"}
# what is imported, compiled or kept at first use of a target, and is to be by no case; asked for among the runs
WARM: dict[str, Callable[[], None]] = {"odd": step_all}
