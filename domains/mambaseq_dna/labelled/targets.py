"""From the texts of labels to targets: classes, several labels, or values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mambaseq.data.tables import LARGEST
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.files.faults import Faults
from mambaseq_dna.labelled.texts import Where, is_missing, numbered, refuse

Learned = Literal["classes", "multilabels", "values"]

_YES_NO = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0, "yes": 1, "no": 0}


def in_order(names: set[str]) -> list[str]:
    """Names of classes in the order of their numbers: sorted, by value if all are whole numbers.

    >>> in_order({"10", "9", "1"}), in_order({"b", "a", "10"})
    (['1', '9', '10'], ['10', 'a', 'b'])
    """
    if all(re.fullmatch(r"-?\d{1,15}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def class_targets(
    labels: Sequence[str], train: np.ndarray, where: Where, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """The class of each record, `(records,)` int64, and the names of the classes.

    labels: one of each record. train: `(records,)` bool, which are for training. classes: their names in order; None
    for those of the training records.
    Raises DataError that names the record: without a label; of a class that no training record has, or that is not
    among `classes`; and for a class that has no training record, and fewer than two classes.
    """
    texts, index = numbered(labels)
    trained = {texts[number] for number in np.unique(index[train]).tolist() if not is_missing(texts[number])}
    names = in_order(trained) if classes is None else list(classes)
    known = {name: number for number, name in enumerate(names)}
    given = "among data.classes" if classes is not None else "that of any training record"

    def wrong(text: str) -> str:
        if is_missing(text):
            return (
                f"the label is missing ({shown(text)}). Remove the row, or complete it; for values that are partly "
                "unknown, set data.task to values."
            )
        return (
            f"the label {shown(text)} is not {given}.{did_you_mean(text, names)} Known are {cut_list(names, 8)}. "
            "Correct it, remove the row, or give training records of that class."
        )

    refuse(texts, index, lambda text: is_missing(text) or text not in known, where, wrong)
    if missing := [name for name in names if name not in trained]:
        raise DataError(
            f"The class {shown(missing[0])} of data.classes has no training record; training records are of "
            f"{cut_list(in_order(trained), 8)}. Give some, or leave the class out."
        )
    if len(names) < 2:
        raise DataError(
            f"All training records are of one class, {shown(cut_list(names))}. Classification needs two or more: check "
            "data.label, and the splits."
        )
    return np.array([known[text] for text in texts], dtype=np.int64)[index], names


def multilabel_targets(
    columns: Sequence[Sequence[str]],
    names: Sequence[str],
    train: np.ndarray,
    where: Where,
    classes: Sequence[str] | None = None,
    separator: str | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Whether each label applies to each record, `(records, labels)` int64: 1, 0, or -100 where that is unknown; and
    the names of the labels.

    columns: of a column for each label, or one column with labels between separators; names: of the columns. train,
    classes: as in `class_targets`; labels in columns have the order of classes, too.
    Raises DataError that names the record: with anything but 1, 0 (or true, false) and nothing in a column of a label;
    with a label that no training record has, or that is not among `classes`; and for a label that applies to no
    training record. ConfigError for classes that are not the columns.
    """
    if separator is None:
        if classes is not None and sorted(classes) != sorted(names):
            other = next(one for one in [*classes, *names] if (one in classes) != (one in names))
            raise ConfigError(
                f"data.classes and data.label differ: {shown(other)} is in one of them only. Each label has a column; "
                "data.classes gives their order. Leave data.classes out, or name the same."
            )
        found = list(classes or names)
        of = dict(zip(names, columns, strict=True))
        targets = np.stack([_yes_no(of[name], name, where) for name in found], axis=1)
    else:
        sets = [[one.strip() for one in text.split(separator) if one.strip()] for text in columns[0]]
        found = list(classes or in_order({one for row in np.flatnonzero(train).tolist() for one in sets[row]}))
        known = {name: number for number, name in enumerate(found)}
        given = "among data.classes" if classes is not None else "that of any training record"
        faults = Faults()
        targets = np.zeros((len(sets), len(found)), dtype=np.int64)
        for row, labels in enumerate(sets):
            if odd := [label for label in labels if label not in known]:
                place = where(row)
                faults.add(
                    place,
                    ""
                    if faults.named
                    else f"{place}: the label {shown(odd[0])} is not {given}.{did_you_mean(odd[0], found)} Known are "
                    f"{cut_list(found, 8)}. Correct it, or give training records with it.",
                )
                continue
            targets[row, [known[label] for label in labels]] = 1
        faults.check()
    if not found:
        raise DataError("No training record has a label. Check data.label and data.separator.")
    without = np.flatnonzero(~(targets[train] == 1).any(axis=0))
    if len(without):
        raise DataError(
            f"The label {shown(found[without[0]])} applies to no training record. Give some, or leave it out."
        )
    return targets, found


def _yes_no(column: Sequence[str], name: str, where: Where) -> np.ndarray:
    texts, index = numbered(column)
    values = [-100 if is_missing(text) else _YES_NO.get(text.strip().lower(), -1) for text in texts]

    def wrong(text: str) -> str:
        return (
            f"the column {shown(name)} has {shown(text)}. Write 1 where the label applies, 0 where not, and nothing "
            "where it is unknown; labels in one column need data.separator."
        )

    refuse(texts, index, lambda text: not is_missing(text) and text.strip().lower() not in _YES_NO, where, wrong)
    return np.array(values, dtype=np.int64)[index]


def value_targets(columns: Sequence[Sequence[str]], names: Sequence[str], where: Where) -> np.ndarray:
    """Numbers, `(records, columns)` float32, NaN where one is missing. Raises DataError that names the record and
    column for what is no finite number up to 10^9."""
    found = np.empty((len(columns[0]), len(columns)), dtype=np.float64)
    for place, (column, name) in enumerate(zip(columns, names, strict=True)):
        texts, index = numbered(column)
        values = np.array([_number(text) for text in texts])

        def wrong(text: str, name: str = name) -> str:
            if _number(text) == -np.inf:
                return (
                    f"the column {shown(name)} has {shown(text)}, which is not a number. Correct it, leave it empty if "
                    "it is unknown, or set data.task to classes."
                )
            return (
                f"the column {shown(name)} has {shown(text)}, which is not a finite number up to 10^9. Correct it, "
                "choose another unit, or leave it empty."
            )

        refuse(texts, index, lambda text: abs(_number(text)) > LARGEST, where, wrong)
        found[:, place] = values[index]
    return found.astype(np.float32)


def _number(text: str) -> float:
    """A value; NaN where it is missing, infinity for one that is too large, minus infinity for what is no number."""
    if is_missing(text):
        return np.nan
    try:
        value = float(text)
    except ValueError:
        return -np.inf
    return value if abs(value) <= LARGEST else np.inf


def label_columns(label: str | Sequence[str], task: Learned, separator: str | None) -> list[str]:
    """The columns with labels. Raises ConfigError for several of them where a record has one, and for a separator where
    there is nothing to separate."""
    columns = [label] if isinstance(label, str) else [str(one) for one in label]
    if not columns:
        raise ConfigError("data.label names no column. Name one.")
    if len(set(columns)) < len(columns):
        raise ConfigError(f"data.label names a column twice: {cut_list(columns)}. Name each once.")
    if task == "classes" and len(columns) > 1:
        raise ConfigError(
            f"data.label names {len(columns)} columns, but a class is in one. Set data.task to multilabels (a column "
            "of 1 and 0 for each label) or to values, or name one column."
        )
    if task == "multilabels" and (separator is None) == (len(columns) == 1):
        raise ConfigError(
            "Several labels are either in several columns of 1 and 0 (data.label names them), or in one column with "
            "signs between them (data.separator). Set one of the two."
        )
    if task != "multilabels" and separator is not None:
        raise ConfigError(f"data.separator is for data.task multilabels; data.task is {task}. Leave it out.")
    return columns
