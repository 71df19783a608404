"""The dataset `dna/labelled`: a class, several labels, or values for each sequence."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mambaseq.data.audited import Audited
from mambaseq.data.baselines import Baseline
from mambaseq.data.module import SequenceData
from mambaseq.data.orders import Balanced, Shuffled
from mambaseq.errors import ConfigError, DataError, cut_list, shown
from mambaseq.limits import EPOCH, SEEDS, WINDOW, check_choice, check_setting
from mambaseq_dna.auditing import audited_dna
from mambaseq_dna.base import Names, names_of
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.tables import table_columns
from mambaseq_dna.labelled.contents import equal_contents
from mambaseq_dna.labelled.headers import header_keys
from mambaseq_dna.labelled.items import Align, LabelledItems, Sequences, fitted
from mambaseq_dna.labelled.layouts import Format, Part, parts_of
from mambaseq_dna.labelled.overlaps import overlapping
from mambaseq_dna.labelled.records import AuditedRecords, Records, SplitRecords, class_counts
from mambaseq_dna.labelled.sources import Reading, is_row, read_source
from mambaseq_dna.labelled.splitting import (
    COPIES,
    GROUPS,
    OVERLAPS,
    TEST,
    TRAIN,
    VALIDATION,
    SplitPlan,
    crossing,
    without_copies,
)
from mambaseq_dna.labelled.targets import Learned, class_targets, label_columns, multilabel_targets, value_targets
from mambaseq_dna.labelled.texts import is_missing, numbered, refuse
from mambaseq_dna.splits import SPLITS, Duplicates
from mambaseq_dna.tokenizer import BaseTokenizer

SHIPPED = "mambaseq:data/gue/prom_core_tata.tsv.xz"
SHIPPED_COLUMNS = ["split", "label", "sequence"]
_LABEL = {"table": "label", "fasta": "label", "bed": "name", "gff": "type", "folder": ""}

_NO_GROUP = (
    "the group is missing ({}), so it is unclear what the record must stay together with. Complete it (a name of its "
    "own, if it belongs to none), or remove the row."
)

logger = logging.getLogger(__name__)


class LabelledData(SequenceData):
    """Sequences with a class, several labels, or values each, from tables, FASTA, folders, or intervals of an assembly.

    A split comes from the folder, file or column that names it, from groups (chromosomes), or is a share of the records
    that are left. Case is folded. See docs/dna/labelled.md for the layouts.

    Args:
        files: files (paths, patterns, `fetched:` or `mambaseq:` names), or a folder: of `train.csv`, `dev.csv`,
            `test.csv` and such, of `train/CLASS/*.txt` and `test/CLASS/*.txt`, or of a folder a class. The default is
            GUE's task prom_core_tata, which ships with the project.
        validation_files: the same for the validation set alone.
        test_files: the same for the test set alone.
        format: what files are: `table` (CSV, TSV, parquet), `fasta`, `bed` or `gff`; `auto` goes by their endings.
        columns: names of the columns of tables without a header line.
        sequence: the column of tables that holds the sequences.
        label: where the label is, or several places, for several labels or values. Of tables: a column, `label` if not
            given. Of FASTA: `field:2` of `>name|label`, `word:1` behind the name, or a key, `label` (of `label=x`) if
            not given. Of BED: `name` if not given, `score`, `strand`, or `column:7` and on. Of GFF: `type` if not
            given, or an attribute. Of a folder a class: its name.
        names: the column of tables that holds names of sequences; `name` or `id` if not given and there is one.
        task: `classes` (one of several), `multilabels` (any of several), or `values` (numbers).
        classes: the names of the classes in their order; those of the training records, sorted, if not given.
        separator: for multilabels in one column: the sign between them.
        split: where the split is (train, validation or dev, test), as for `label`. If not given, the column `split` of
            tables, or the key `split` of FASTA headers, where there is one and the file's name gives no split; `""` is
            none.
        group: where the group is, which is never split: a gene, a chromosome, a family; each record needs one.
            Intervals are grouped by their chromosome if it is not given.
        test_groups: patterns (`*`, `?`) for the groups of the test set, for instance `chr8`.
        validation_groups: the same for the validation set.
        test_fraction: share of the records, or groups, for the test, if nothing else gives a test set.
        validation_fraction: the same for the validation set.
        duplicates: a sequence (or its other strand, or a part of an assembly) that is in two splits is refused
            (`refuse`), or kept in test before validation before training (`drop`).
        assembly: FASTA files that intervals refer to.
        width: bases around the centre of each interval; the interval itself if not given. N stands for what is beyond
            the ends.
        stranded: read intervals on `-` from the other strand.
        features: types of GFF features that are read; all if not given.
        length: the most bases of a sequence; longer ones are cut. As long as the longest if not given.
        align: which part of a longer sequence is kept, and where a padded one stands: `centre`, `start` or `end`.
        pad: fill shorter sequences up to `length` with N.
        reverse_complement: read a training sequence from the other strand with probability 1/2. Not for labels that
            depend on the strand, such as promoters.
        balanced: draw each class equally often in training.
        samples_per_epoch: training sequences that make an epoch of balanced draws; as many as there are if not given.
        seed: of the splits, the order and the strands.
        cache: where token stores are kept; MAMBASEQ_CACHE or the platform's cache folder if not given.
    """

    tokenizer: BaseTokenizer
    tokenizer_name = "dna/base"
    reader = "dna/labelled"
    writer = "dna/fasta"

    def __init__(
        self,
        files: list[str] | str | None = None,
        validation_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        format: Format = "auto",
        columns: list[str] | None = None,
        sequence: str = "sequence",
        label: list[str] | str | None = None,
        names: str | None = None,
        task: Learned = "classes",
        classes: Names = None,
        separator: str | None = None,
        split: str | None = None,
        group: str | None = None,
        test_groups: Names = None,
        validation_groups: Names = None,
        test_fraction: float = 0.1,
        validation_fraction: float = 0.1,
        duplicates: Duplicates = "refuse",
        assembly: list[str] | str | None = None,
        width: int | None = None,
        stranded: bool = True,
        features: list[str] | None = None,
        length: int | None = None,
        align: Align = "centre",
        pad: bool = False,
        reverse_complement: bool = False,
        balanced: bool = False,
        samples_per_epoch: int | None = None,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        if files is None:
            files, columns, split = SHIPPED, columns or SHIPPED_COLUMNS, split or "split"
        for key, value in (("length", length), ("width", width)):
            if value is not None:
                check_setting(f"data.{key}", value, 1, WINDOW.value)
        if samples_per_epoch is not None:
            check_setting("data.samples_per_epoch", samples_per_epoch, *EPOCH)
        check_setting("data.seed", seed, *SEEDS)
        if pad and length is None:
            raise ConfigError("data.pad fills sequences up to data.length, which is not given. Give it.")
        if balanced and task != "classes":
            raise ConfigError(f"data.balanced draws classes, but data.task is {task}. Leave it out.")
        if samples_per_epoch is not None and not balanced:
            raise ConfigError("data.samples_per_epoch is for balanced draws (data.balanced). Leave it out.")
        for key, choice, choices in (
            ("format", format, Format),
            ("task", task, Learned),
            ("align", align, Align),
            ("duplicates", duplicates, Duplicates),
        ):
            check_choice(f"data.{key}", choice, get_args(choices))
        if separator == "":
            raise ConfigError("data.separator is empty. Give the sign between labels, or leave it out.")
        self.files, self.validation_files, self.test_files = files, validation_files, test_files
        self.format, self.columns, self.sequence, self.names = format, columns, sequence, names
        self.task, self.separator = task, separator
        self.classes = names_of("classes", classes) or None
        self.label, self.split, self.group = label, split or None, group
        self._finds_split = split is None
        if label is not None:
            label_columns(label, task, separator)
        self.plan = SplitPlan(
            {TEST: names_of("test_groups", test_groups), VALIDATION: names_of("validation_groups", validation_groups)},
            {TEST: test_fraction, VALIDATION: validation_fraction},
            seed,
        )
        self.duplicates, self.assembly, self.width, self.stranded = duplicates, assembly, width, stranded
        self.features, self.given_length, self.align, self.pad = features, length, align, pad
        self.reverse_complement, self.balanced, self.samples_per_epoch = reverse_complement, balanced, samples_per_epoch
        self.seed, self.cache = seed, cache
        self.tokenizer = BaseTokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self.length = length or 0
        if task == "values":
            self.n_outputs = 1 if label is None or isinstance(label, str) else len(label)
        self._found: SplitRecords | None = None
        self._split_places: dict[Path, str | None] = {}
        self._chosen_by = ""

    @property
    def complement(self) -> list[int]:  # type: ignore[override]
        """The id of each base's partner."""
        return self.tokenizer.complement.tolist()

    def sources(self) -> dict[str, str]:
        sources = self._records.sources
        names = [source.part.path.name for source in sources]
        found = {
            name if names.count(name) == 1 else str(source.part.path): source.checksum
            for name, source in zip(names, sources, strict=True)
        }
        return found | (self._bases.sources() if self._bases is not None else {})

    @property
    def n_records(self) -> int:
        """How many sequences the files hold, before any is left out."""
        return len(self._records.sequences)

    def reader_options(self) -> dict[str, Any]:
        """How `predict` reads files of the same layouts: cut and padded as here."""
        options = {
            "format": self.format,
            "columns": self.columns,
            "sequence": self.sequence,
            "names": self.names,
            "assembly": self.assembly,
            "width": self.width,
            "stranded": self.stranded,
            "features": self.features,
            "length": self.given_length,
            "align": self.align,
            "pad": self.pad,
        }
        return {key: value for key, value in options.items() if value is not None}

    def setup(self) -> None:
        """Read the files, or their stores, and split them. Raises DataError that names file and line for what cannot be
        used, and for copies in two splits; ConfigError for settings that do not fit each other."""
        if self._found is not None:
            return
        found = self._split(refuse_copies=True)
        lengths = self._records.sequences.lengths
        self._tell_cut(lengths)
        if self.given_length is None:
            self.length = int(lengths.max())
            WINDOW.check(self.length, "The longest sequence")
        self.class_names = found.class_names
        self.class_counts = class_counts(found.targets[found.splits == TRAIN]) if found.class_names else None
        self._found = found

    def extremes(self) -> list[tuple[int, str]]:
        self.setup()
        assert self._found is not None
        lengths = self._fitted.lengths[self._found.numbers]
        rows = self._found.numbers[[lengths.argmin(), lengths.argmax()]].tolist()
        return [(int(self._fitted.lengths[row]), self._records.where(row)) for row in rows]

    def _tell_cut(self, lengths: np.ndarray) -> None:
        if self.given_length is None or not (longer := lengths > self.given_length).any():
            return
        logger.warning(
            "data.length: %s of %s sequences are longer than %s bases and are cut (data.align is %s); the longest has "
            "%s.",
            f"{int(longer.sum()):,}",
            f"{len(lengths):,}",
            f"{self.given_length:,}",
            self.align,
            f"{int(lengths.max()):,}",
        )

    @functools.cached_property
    def _parts(self) -> list[Part]:
        parts = parts_of(self.files, self.format)
        for names, split in ((self.validation_files, "validation"), (self.test_files, "test")):
            parts += parts_of(names, self.format, split) if names else []
        paths = [part.path.resolve() for part in parts]
        if len(set(paths)) < len(paths):
            twice = next(path for number, path in enumerate(paths) if path in paths[:number])
            raise ConfigError(f"{twice} is named twice under data. Name every file in one place.")
        return parts

    @functools.cached_property
    def _bases(self) -> Assembly | None:
        """What intervals refer to."""
        needed = any(not is_row(part) for part in self._parts)
        return Assembly(self.assembly, self.cache) if self.assembly and needed else None

    def _labels_of(self, kind: str) -> list[str]:
        """The places of labels in a kind of file."""
        return label_columns(_LABEL[kind] if self.label is None else self.label, self._task, self.separator)

    @property
    def _task(self) -> Learned:
        return self.task  # type: ignore[return-value]

    @functools.cached_property
    def _records(self) -> Records:
        """All records. The label of a folder a class is its name."""
        asked = {self.sequence: "data.sequence", self.names: "data.names", self.group: "data.group"}
        asked |= {self.split: "data.split"} | dict.fromkeys(self._labels_of("table"), "data.label")
        reading = Reading(
            self.sequence, self.columns, self.names, self._bases, self.width, self.stranded, tuple(self.features or ()),
            {column: setting for column, setting in asked.items() if column is not None},
        )  # fmt: skip
        sources = []
        for part in self._parts:
            more = [place for place in (self._split_of(part), self.group) if place is not None]
            if part.kind == "folder" and (more or self._task == "values"):
                raise ConfigError(
                    f"{part.path} is the folder of a class, which has no columns for data.split and data.group, and no "
                    "values. Leave them out."
                )
            places = [*self._labels_of(part.kind), *more] if part.kind != "folder" else []
            sources.append(read_source(part, reading, places, self.cache))
        return Records.of_sources(sources)

    def _split_of(self, part: Part) -> str | None:
        """Where the split of a part's records is: where `data.split` says, or what is called `split`."""
        if part.path not in self._split_places:
            place = self.split
            taken = [*self._labels_of(part.kind), self.group, self.sequence, self.names]
            if self._finds_split and not part.split and part.kind in ("table", "fasta"):
                known = table_columns(part.path, self.columns) if part.kind == "table" else header_keys(part.path)
                place = next((name for name in known if name.lower() == "split" and name not in taken), None)
            self._split_places[part.path] = place
        return self._split_places[part.path]

    def _texts(self, place: str | int, of_labels: bool = False) -> list[str]:
        """What all records have at a place; of_labels: at that one of the places of labels, by its number."""
        found: list[str] = []
        for source in self._records.sources:
            if of_labels and source.part.kind == "folder":
                found += [source.part.label] * len(source)
            else:
                found += source.fields[self._labels_of(source.part.kind)[int(place)] if of_labels else str(place)]
        return found

    @functools.cached_property
    def _groups(self) -> list[str] | None:
        """The group of each record; None if there are none."""
        if self.group is not None:
            groups = self._texts(self.group)
            refuse(*numbered(groups), is_missing, self._records.where, lambda text: _NO_GROUP.format(shown(text)))
            return groups
        sources = self._records.sources
        if any(source.groups is None for source in sources):
            return None
        return [name for source in sources for name in source.groups or ()]

    @functools.cached_property
    def _fitted(self) -> Sequences:
        """What a model is given of each record."""
        sequences = self._records.sequences
        if self.given_length is None:
            return sequences
        return Sequences(sequences.stores, fitted(sequences.places, self.given_length, self.align, self.pad))

    def _split(self, refuse_copies: bool) -> SplitRecords:
        """Splits and targets. refuse_copies: False leaves copies that are refused where they are."""
        records = self._records
        where, count, intervals = records.where, len(records.sequences), records.intervals()
        places = [self._split_of(source.part) for source in records.sources]
        splits = records.splits(places)
        self._chosen_by = self._how(places, splits)
        labels = self._texts(0, of_labels=True) if self._task == "classes" else []
        strata = numbered(labels)[1] if labels else np.zeros(count, dtype=np.int64)
        content = equal_contents(records.sequences, intervals, self.given_length, self.align)
        self.plan.assign(splits, self._groups, content, strata)
        keep = content >= 0
        if not keep.all():
            logger.warning("%s record(s) hold no base but N, and are left out.", f"{int((~keep).sum()):,}")
        if refuse_copies or self.duplicates == "drop":
            others = {
                COPIES: crossing(content, splits),
                OVERLAPS: overlapping(self._fitted.places, splits, intervals),
            }
            if self.group is not None:
                others[GROUPS] = crossing(numbered(self._groups or ())[1], splits)
            keep &= without_copies(splits, others, where, self.duplicates, strata if labels else None)
        if not (splits[keep] == TRAIN).any():
            raise DataError(
                "The training set has no record. Check what data.test_groups, files and copies leave to it."
            )
        numbers = np.flatnonzero(keep)
        targets, names = self._targets(numbers, splits[numbers] == TRAIN)
        if self._task == "values" and (unknown := np.isnan(targets).all(axis=1)).any():
            logger.warning("%s record(s) without any value are left out.", f"{int(unknown.sum()):,}")
            numbers, targets = numbers[~unknown], targets[~unknown]
            if not (splits[numbers] == TRAIN).any():
                raise DataError("No training record has a value. Check data.label, and the file.")
        return SplitRecords(numbers, splits[numbers], targets, names)

    def _how(self, places: Sequence[str | None], splits: np.ndarray) -> str:
        """How sequences come into their splits, for people. splits: those that are given, before any are drawn."""
        how = ["the names of files and folders"] if any(part.split for part in self._parts) else []
        if named := sorted({place for place in places if place}):
            how.append(f"{cut_list(list(map(shown, named)), 3)} of the file")
        how += [f"data.{SPLITS[split]}_groups" for split, patterns in self.plan.groups.items() if patterns]
        if drawn := self.plan.drawn(splits):
            shares = " and ".join(f"{SPLITS[split]} {self.plan.fractions[split]:.0%}" for split in drawn)
            how.append(f"a draw by data.seed {self.seed} ({shares})")
        return ", ".join(how) or "nothing: all are for training"

    def splits_told(self) -> str:
        self.setup()
        assert self._found is not None
        counts = np.bincount(self._found.splits, minlength=len(SPLITS))
        told = ", ".join(f"{name} {int(count):,}" for name, count in zip(SPLITS, counts, strict=True))
        return f"sequences: {told}; chosen by {self._chosen_by}"

    def _targets(self, numbers: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Targets of these records, and the names of classes. train: `(numbers,)` bool, which are for training."""
        chosen = numbers.tolist()
        names = self._labels_of(self._records.sources[0].part.kind)
        columns = [self._texts(place, of_labels=True) for place in range(len(names))]
        texts = [[column[number] for number in chosen] for column in columns]

        def where(row: int) -> str:
            return self._records.where(chosen[row])

        if self._task == "classes":
            return class_targets(texts[0], train, where, self.classes)
        if self._task == "values":
            return value_targets(texts, names, where), []
        return multilabel_targets(texts, names, train, where, self.classes, self.separator)

    def train(self) -> LabelledItems:
        sequences, targets = self._of(TRAIN)
        order: Shuffled | Balanced = Shuffled(len(sequences), self.seed)
        if self.balanced:
            order = Balanced(targets, self.seed, self.samples_per_epoch)
        return LabelledItems(sequences, targets, order, seed=self.seed, augment=self.reverse_complement)

    def validation(self) -> LabelledItems | None:
        return self._held_out(VALIDATION)

    def test(self) -> LabelledItems | None:
        return self._held_out(TEST)

    def _held_out(self, split: int) -> LabelledItems | None:
        sequences, targets = self._of(split)
        if not len(sequences):
            return None
        groups = self._groups
        assert self._found is not None
        if groups is not None:
            groups = [groups[number] for number in self._found.numbers[self._found.splits == split].tolist()]
        return LabelledItems(sequences, targets, groups=groups)

    def _of(self, split: int) -> tuple[Sequences, np.ndarray]:
        self.setup()
        assert self._found is not None
        mine = self._found.splits == split
        return self._fitted.where(self._found.numbers[mine]), self._found.targets[mine]

    def baselines(self) -> dict[str, Baseline]:
        """Fitted to the training sequences in their order, on their own strand; all classes alike if draws are."""
        from mambaseq_dna.baselines.offered import baselines_of

        return baselines_of(self, LabelledItems(*self._of(TRAIN)), balanced=self.balanced)

    def audited(self) -> Audited:
        """The sequences of each split as a model is given them, those included that setup would refuse as copies."""
        found = self._split(refuse_copies=False)
        splits = {}
        for number, name in enumerate(SPLITS):
            mine = np.flatnonzero(found.splits == number)
            if len(mine):
                splits[name] = AuditedRecords(self._records, self._fitted, found, mine)
        return audited_dna(splits)
