"""The text of `--help` after `--config NAME`: all keys that a configuration can have, and what each is."""

from __future__ import annotations

import argparse
import re

import jsonargparse

OF_CLASSES = {
    "callbacks": "a list of callbacks (Lightning's, or of `mambaseq list callbacks`), each",
    "logger": "true for CSV files and TensorBoard, false for none, or loggers, each",
    "plugins": "a list of plugins (precision, clusters, ...), each",
    "strategy": "how several devices work together: auto, ddp, fsdp2, ..., or a class",
    "profiler": "what measures a step: parts (drawn on the run's page), simple, advanced, ..., or a class",
    "accelerator": "what to train on: auto, cpu, gpu, ..., or a class",
}
"""What `trainer.KEY` takes, for the keys that name classes of Lightning's."""

_ROLE = re.compile(r":[a-z]+(?:\s+[a-z]+)?:\s*`~?([^`]+)`")  # as in :class:`torch.nn.Module`
_TYPE = re.compile(r"type:\s+<class\s+'TrainerClasses'>,\s+")


def keys_text(parser: jsonargparse.ArgumentParser, titles: dict[str, str]) -> str:
    """The keys of a configuration's parser, section by section. titles: the title of a section, by its name; the
    default is the first line of its class's docstring."""
    parser.usage = argparse.SUPPRESS
    parser.description = (
        "Keys of the configuration, each given as --key value. The defaults are those of each class; --print_config "
        "prints what this configuration sets."
    )
    sections = parser.groups or {}
    parser._optionals.title = "general"
    for name, group in sections.items():
        title = titles.get(name) or f": {_small((group.title or '').rstrip('.:'))}"
        group.title = f"{name}{title}"
    for action in parser._actions:
        if action.dest in {*sections, "help"}:  # a section is not given as a whole
            action.help = argparse.SUPPRESS
    text = _TYPE.sub("", parser.format_help())
    return _ROLE.sub(lambda role: re.sub(r"\s", "", role[1]).rpartition(".")[2], text)


def _small(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text
