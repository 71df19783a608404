"""Which set a clip is in: by values of its name or manifest, by lists of names, or drawn."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mambaseq.conditions import composed
from mambaseq.data.cache import locate
from mambaseq.errors import ConfigError, DataError, did_you_mean, shown
from mambaseq_audio.recordings import Recording

SPLITS = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}
"""What a manifest's column `split` says for each set."""


def selection_parts(selection: str | Sequence[str]) -> list[str]:
    """The values in a selection: the items of a list, or the parts of a string between commas."""
    parts = [part.strip() for part in selection.split(",")] if isinstance(selection, str) else selection
    return [composed(part) for part in parts if part]


def selector(selection: str | Sequence[str]) -> Callable[[str], bool]:
    """A function that tells which values a selection takes: `"theo,lucas"`, `"0-4,9"` or `["Smith, Ann", "0-4"]`, with
    names, numbers and ranges of numbers; `""` takes none.

    >>> [take for take in ("0", "03", "7", "9") if selector("0-4,9")(take)]
    ['0', '03', '9']
    """
    names, ranges = set(), []
    for part in selection_parts(selection):
        names.add(part)
        if bounds := re.fullmatch(r"(\d{1,300})(?:-(\d{1,300}))?", part):
            ranges.append((int(bounds[1]), int(bounds[2] or bounds[1])))
    return lambda value: (
        composed(value) in names or (value.isdecimal() and any(a <= int(value) <= b for a, b in ranges))
    )


def drawn_clips(
    found: Sequence[Recording],
    kinds: Sequence[tuple[str, ...]],
    fractions: Mapping[str, float],
    taken: set[int],
    seed: int,
    files: str,
) -> dict[str, set[int]]:
    """Numbers of the clips of sets that are drawn by the seed: whole files, spread over kinds of clips, each of which
    keeps one for training.

    kinds: of each clip. fractions: the share of files for each set; none of those with 0. taken: clips of other sets.
    files: as they were given, for the message.

    Raises DataError for too few files.
    """
    wanted = {name: fraction for name, fraction in fractions.items() if fraction}
    if not wanted:
        return {}
    by_file: dict[str, list[int]] = {}
    for i, one in enumerate(found):
        by_file.setdefault(os.path.realpath(one.path), []).append(i)
    free = [members for members in by_file.values() if not taken.intersection(members)]
    alike: dict[tuple[str, ...], list[list[int]]] = {}
    for members in free:
        alike.setdefault(kinds[members[0]], []).append(members)
    rng = np.random.default_rng(seed)
    line = []
    for kind in sorted(alike):
        line += [alike[kind][i] for i in rng.permutation(len(alike[kind])).tolist()[1:]]
    names = [name for name, fraction in wanted.items() for _ in range(max(1, round(fraction * len(free))))]
    if len(names) > len(line):
        raise DataError(
            f"{files} has too few files ({len(free):,}) to draw {' and '.join(wanted)} from: each condition "
            "keeps one for training. Add some, or set data.validation_fraction and data.test_fraction to 0."
        )
    chosen: dict[str, set[int]] = {name: set() for name in wanted}
    for number, which in enumerate(rng.permutation(len(names)).tolist()):
        chosen[names[which]].update(line[(2 * number + 1) * len(line) // (2 * len(names))])
    return chosen


def check_words(found: Sequence[Recording], values: Sequence[str]) -> None:
    """Raise DataError for a clip whose manifest says another split than those of `SPLITS`."""
    known = [word for words in SPLITS.values() for word in words]
    for one, value in zip(found, values, strict=True):
        if value not in known:
            raise DataError(
                f"{one}: the split is {shown(value)}.{did_you_mean(value, known)} Write train, validation or test."
            )


def check_selection(split: str, selection: str | Sequence[str], values: set[str], group: str) -> None:
    """Raise ConfigError for selected values that no clip has.

    split: the set, for the message. values: those of all clips, of the group that decides.
    """
    for part in selection_parts(selection):
        if not any(map(selector([part]), values)):
            known = sorted(values)
            raise ConfigError(
                f"data.{split} asks for {shown(part)}, but no clip has this "
                f"{group}.{did_you_mean(part, known)} There are: "
                f"{', '.join(known[:8])[:300]}{', ...' if len(known) > 8 else ''}. Correct it; data.{split}: '' "
                "chooses none, and names with commas go into a list."
            )


def listed_clips(paths: Sequence[Path], name: str, files: str) -> set[int]:
    """Numbers of the clips that a list names: a text file with the end of a path in each line.

    paths: of all clips. files: as they were given, for the message.

    Raises DataError for a list that cannot be read or names none, and for a name that no clip has.
    """
    names = [tuple(map(composed, path.parts)) for path in paths]
    by_name = defaultdict(list)
    for i, parts in enumerate(names):
        by_name[parts[-1]].append(i)
    members: set[int] = set()
    for file in locate(name):
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(
                f"{file} cannot be read as a list of clips: {error}. Write one name a line, in UTF-8."
            ) from error
        for number, line in enumerate(lines, start=1):
            if not (wanted := composed(line.strip())):
                continue
            parts = Path(wanted).parts or (wanted,)
            hits = [i for i in by_name.get(parts[-1], ()) if names[i][-len(parts) :] == parts]
            if not hits:
                raise DataError(
                    f"Line {number} of {file} names {shown(wanted, 200)}, which is not among the clips of "
                    f"{files}. Correct the line, or add the clip."
                )
            members.update(hits)
    if not members:
        raise DataError(f"{name} names no clip. Write one name a line, or leave the list out.")
    return members
