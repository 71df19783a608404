"""Data sets of the Hugging Face Hub, as `datasets` finds their files, and tokenizers there."""

from __future__ import annotations

import re
from pathlib import Path

from mambaseq.errors import ConfigError, DataError, UserError, cut_list, did_you_mean, shown

SCHEME = "hub:"
_NAME = re.compile(r"hub:(?P<name>[^:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:]+))?(?::(?P<split>[^:]+))?")
SPLIT_OF = {"data.validation_files": "validation", "data.test_files": "test"}
_REMEDY = (
    "Check the name and the network (private ones need the variable HF_TOKEN), or download its files and name them"
)


def is_hub(name: str) -> bool:
    """Whether a name is that of a data set or a tokenizer of the Hub."""
    return name.startswith(SCHEME)


def hub_files(name: str, key: str) -> list[str]:
    """The files of a split of a data set: addresses with the revision that is there now, or paths.

    name: `hub:OWNER/NAME`, then, where wanted, `@REVISION`, `:CONFIG` and `:SPLIT`; OWNER/NAME may be a folder here.
        The split is by default that of `key`, the setting with the name: `train`, `validation` or `test`.
    Raises ConfigError for a name of another form, DataError for a data set that is not there or has no such split or no
    files (one that is made by a script).
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"{key} holds {shown(name)}, which is not of the form hub:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]."
        )
    import datasets

    split = found["split"] or SPLIT_OF.get(key, "train")
    try:
        builder = datasets.load_dataset_builder(found["name"], found["config"], revision=found["revision"])
    except Exception as error:  # a dozen kinds, by what is not there
        reason = shown(" ".join(str(error).split()), 300)
        raise DataError(f"{name} cannot be looked up ({type(error).__name__}: {reason}). {_REMEDY}.") from error
    splits = {str(one): list(files) for one, files in (builder.config.data_files or {}).items()}
    if not splits:
        raise DataError(f"{name} has no files that `datasets` reads without running code. {_REMEDY}.")
    if split not in splits:
        raise DataError(
            f"{name} has no split {shown(split)}.{did_you_mean(split, splits)} It has: {cut_list(splits, 8)}. Name "
            f"one: {SCHEME}{found['name']}:{builder.config.name}:{next(iter(splits))}."
        )
    return splits[split]


def pinned(address: str) -> str | None:
    """The revision in an address of the Hub that can mean one content only; None for another address."""
    found = re.match(r"hf://[^@]+@([0-9a-f]{40})/", address)
    return None if found is None else found[1]


def hub_tokenizer(name: str) -> Path:
    """The tokenizer.json of a model of the Hub, downloaded with those beside it that say more of it.

    name: `hub:OWNER/NAME`. Raises DataError if it is not there, ConfigError for a name of another form.
    """
    from mambaseq.checkpoints.hub import download_tokenizer_files

    found = re.fullmatch(r"hub:([^:@/]+/[^:@/]+)(?:@([^:]+))?", name)
    if found is None:
        raise ConfigError(f"The tokenizer {shown(name)} is not of the form hub:OWNER/NAME[@REVISION].")
    try:
        return download_tokenizer_files(found[1], revision=found[2])
    except UserError as error:
        raise DataError(f"{name}: {error} Or give the path of a tokenizer.json.") from error
