"""Species and genome data: no leak between splits, none through case or N, the augmentation really
applied."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_dna import domain
from mambaseq_dna.baselines import kmer_baseline, kmer_frequencies
from mambaseq_dna.genome import GenomeData
from mambaseq_dna.species import SpeciesData
from mambaseq_dna.splits import stretches_without_n
from mambaseq_dna.tokenizer import BaseTokenizer, fold_case

from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.windows import GridWindows, Interval
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError

FOLD = BaseTokenizer()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def shipped(cache: str) -> SpeciesData:
    data = SpeciesData(length=1024, cache=cache)
    data.setup()
    return data


def fasta(folder: Path, name: str, **records: str) -> str:
    path = folder / name
    path.write_text("".join(f">{record}\n{letters}\n" for record, letters in records.items()))
    return str(path)


def bases(n: int, seed: int = 0) -> str:
    return FOLD.decode(np.random.default_rng(seed).integers(0, 4, n))


def inputs_of(windows: Any, n: int = 400) -> Iterator[np.ndarray]:
    return (windows[index].inputs[0].numpy() for index in range(n))


def positions(windows: GridWindows) -> Iterator[tuple[str, int, int]]:
    for interval, start, _ in windows.places():
        yield str(interval.store.folder), start, start + windows.span


def test_everything_registered_can_be_loaded() -> None:
    found = catalog()
    for kind in ("tokenizers", "datasets", "readers", "writers"):
        for name in getattr(domain, kind):
            assert callable(found[kind].get(f"dna/{name}"))
    assert SpeciesData.tokenizer_name in found["tokenizers"]
    assert SpeciesData.reader in found["readers"]
    assert SpeciesData.writer in found["writers"]


def test_shipped_species(shipped: SpeciesData) -> None:
    assert shipped.class_names == ["human", "galago", "mouse", "cow", "dog"]
    splits = shipped.splits
    for groups, region in ((splits.train, "ENm001"), (splits.validation, "ENm001"), (splits.test, "ENm002")):
        for group in groups:
            names = {interval.store.meta["sources"][0]["name"] for interval in group.intervals}
            assert names == {f"{group.name}.{region}.fa.gz"}


def test_fixed_windows_are_tiles_equally_many_and_always_the_same(shipped: SpeciesData, cache: str) -> None:
    for split in ("validation", "test"):
        windows = getattr(shipped, split)()
        again = getattr(SpeciesData(length=1024, cache=cache), split)()
        places = list(positions(windows))
        assert places == list(positions(again))
        assert len(set(Counter(group for _, _, group in windows.places()).values())) == 1
        for (folder, _, stop), (other, start, _) in itertools.pairwise(sorted(places)):
            assert folder != other or start >= stop
    few = SpeciesData(length=1024, cache=cache, n_test=7, n_validation=3)
    assert (len(few.test() or ()), len(few.validation() or ())) == (35, 15)


def test_no_window_has_n_and_none_is_in_two_splits(shipped: SpeciesData) -> None:
    claimed: dict[tuple[str, int], np.ndarray] = {}

    def claim(interval: Interval, start: int, split: int) -> None:
        key = (str(interval.store.folder), interval.record)
        owner = claimed.setdefault(key, np.zeros(int(interval.store.lengths[interval.record]), np.uint8))
        taken = owner[start : start + 1024]
        assert set(np.unique(taken)) <= {0, split}
        taken[:] = split

    train = shipped.train()
    for index in range(1500):
        interval, start, _, _ = train.draw(index)
        assert (fold_case(interval.read(start, 1024)) < 4).all()
        claim(interval, start, 1)
    for split, windows in ((2, shipped.validation()), (3, shipped.test())):
        assert windows is not None
        for interval, start, _ in windows.places():
            assert (fold_case(interval.read(start, 1024)) < 4).all()
            claim(interval, start, split)


def test_training_windows_are_uniform_over_species_and_seeded(shipped: SpeciesData, cache: str) -> None:
    train = shipped.train()
    labels = Counter(int(train[index].targets) for index in range(1500))  # type: ignore[arg-type]
    assert all(labels[label] / 1500 == pytest.approx(0.2, abs=0.04) for label in range(5))
    again = SpeciesData(length=1024, cache=cache).train()
    other = SpeciesData(length=1024, cache=cache, seed=1).train()
    assert all(torch.equal(train[index].inputs, again[index].inputs) for index in (0, 17, 10**6))
    assert not any(torch.equal(train[index].inputs, other[index].inputs) for index in (0, 17, 10**6))


def test_augmentation_turns_half_of_the_training_windows_and_no_other(cache: str) -> None:
    plain, augmented = (
        SpeciesData(length=64, cache=cache, n_test=4, reverse_complement=flip) for flip in (False, True)
    )
    turned = []
    for one, two in zip(inputs_of(plain.train()), inputs_of(augmented.train()), strict=True):
        assert two.tolist() in (one.tolist(), FOLD.reverse_complement(one).tolist())
        turned.append(one.tolist() != two.tolist())
    assert np.mean(turned) == pytest.approx(0.5, abs=0.1)
    for one, two in zip(inputs_of(plain.test(), 20), inputs_of(augmented.test(), 20), strict=True):
        assert one.tolist() == two.tolist()


def test_case_is_no_clue(tmp_path: Path) -> None:
    files = {
        "upper": [fasta(tmp_path, "upper.fa", a=bases(300), b=bases(100, 1))],
        "lower": [fasta(tmp_path, "lower.fa", a=bases(300, 2).lower(), b=bases(100, 3).lower())],
    }
    data = SpeciesData(species=files, length=50, test_records=["b"], cache=str(tmp_path))
    seen = {int(item.targets): int(item.inputs.max()) for item in map(data.train().__getitem__, range(40))}  # type: ignore[arg-type]
    assert seen == {0: 3, 1: 3}


def test_n_splits_records_and_nothing_is_joined(tmp_path: Path) -> None:
    letters = "N" * 5 + bases(30) + "n" + bases(20, 1) + "NNN" + bases(9, 2)
    ids = BaseTokenizer("keep").encode(letters)
    assert stretches_without_n(ids, 0, len(ids)).tolist() == [[5, 35], [36, 56], [59, 68]]
    assert stretches_without_n(ids, 10, 60).tolist() == [[10, 35], [36, 56], [59, 60]]
    assert stretches_without_n(ids, 0, 5).tolist() == []
    files = {
        "x": [fasta(tmp_path, "x.fa", a=letters, t=bases(40, 5))],
        "y": [fasta(tmp_path, "y.fa", a=bases(50, 6), t=bases(40, 7))],
    }
    train = SpeciesData(species=files, test_records=["t"], cache=str(tmp_path)).splits.train[0]
    # the last tenth of the 68 bases is for validation, so that the third stretch ends at 62
    assert [(found.start, found.stop) for found in train.intervals] == [(5, 35), (36, 56), (59, 62)]


def test_stretches_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq_dna.splits._CHUNK", 4)
    ids = FOLD.encode("ACGTACGTNNACGTACGTN")
    assert stretches_without_n(ids, 0, len(ids)).tolist() == [[0, 8], [10, 18]]


def test_splitting_by_record_names(tmp_path: Path) -> None:
    files = {
        name: [fasta(tmp_path, f"{name}.fa", chr1=bases(400, k), chr2=bases(300, k + 1), chr3=bases(200, k + 2))]
        for k, name in ((0, "x"), (10, "y"))
    }
    data = SpeciesData(
        species=files, length=20, test_records=["chr3"], validation_records=["chr2"], cache=str(tmp_path)
    )
    for split, record in (("train", "chr1"), ("validation", "chr2"), ("test", "chr3")):
        groups = getattr(data.splits, split)
        assert {interval.store.names[interval.record] for group in groups for interval in group.intervals} == {record}
    whole = SpeciesData(species=files, length=20, validation_fraction=0, cache=str(tmp_path))
    assert whole.validation() is None
    assert whole.test() is None
    with pytest.raises(DataError, match=r"'chr9' of data.test_records matches no record and no file.*chr1"):
        SpeciesData(species=files, test_records=["chr9"], cache=str(tmp_path)).setup()


def test_settings_that_cannot_be(cache: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two species or more"):
        SpeciesData(species={"x": ["x.fa"]})
    with pytest.raises(ConfigError, match=r"validation_fraction must be in \[0, 1\)"):
        SpeciesData(validation_fraction=1.0)
    with pytest.raises(ConfigError, match="at least 1"):
        SpeciesData(length=0)
    with pytest.raises(DataError, match=r"no data file .*none\.fa"):
        SpeciesData(species={"x": ["none.fa"], "y": ["none.fa"]}).setup()
    told = r"validation set: no stretch of '.*' is as long as a window.*ENm001.*Lower data"
    with pytest.raises(DataError, match=told):
        SpeciesData(length=2**18, cache=cache).validation()
    lengths = {"long": 900, "short": 90}
    files = {name: [fasta(tmp_path, f"{name}.fa", a=bases(n, n))] for name, n in lengths.items()}
    with pytest.raises(DataError, match=r"training set: no stretch of 'short'.*record 'a' of short\.fa"):
        SpeciesData(species=files, length=100, cache=str(tmp_path)).train()


def test_loaders_take_the_data(shipped: SpeciesData) -> None:
    module = SequenceDataModule(shipped, batch_size=4)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert (batch.inputs.shape, batch.inputs.dtype, batch.targets.shape) == ((4, 1024), torch.int64, (4,))
    assert (batch.mask, batch.condition) == (None, None)


def test_genome_predicts_every_base_once(tmp_path: Path) -> None:
    letters = bases(205)
    path = fasta(tmp_path, "g.fa", train=bases(500, 1), test=letters)
    data = GenomeData(fasta=[path], length=20, test_records=["test"], cache=str(tmp_path))
    test = data.test()
    assert test is not None
    targets = torch.cat([test[index].targets[0] for index in range(len(test))])  # type: ignore[index]
    assert FOLD.decode(targets.numpy()) == letters[1:201]
    assert all(torch.equal(test[k].inputs[0, 1:], test[k].targets[0, :-1]) for k in range(len(test)))  # type: ignore[index]


def test_genome_draws_by_position(tmp_path: Path) -> None:
    path = fasta(tmp_path, "g.fa", large=bases(1000), small=bases(100, 1))
    data = GenomeData(fasta=[path], length=9, validation_fraction=0, cache=str(tmp_path))
    train = data.train()
    drawn = np.mean([train.draw(index)[0].record for index in range(3000)])
    assert drawn == pytest.approx(91 / (91 + 991), abs=0.015)


@pytest.mark.parametrize("lowercase", ["fold", "keep", "unscored"])
def test_lower_case_and_n_in_a_genome(tmp_path: Path, lowercase: Any) -> None:
    letters = "ACGTacgtNNacGG"
    path = fasta(tmp_path, "g.fa", a=letters)

    def expected(ids: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs = ids if lowercase == "keep" else fold_case(ids)
        targets = np.where(fold_case(ids[1:]) == 4, -100, inputs[1:].astype(int))
        if lowercase == "unscored":
            targets = np.where(ids[1:] >= 5, -100, targets)
        return tuple(inputs[:-1].tolist()), tuple(targets.tolist())

    def drawn(reverse_complement: bool) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        data = GenomeData(
            fasta=[path],
            length=13,
            lowercase=lowercase,
            drop_n=False,
            validation_fraction=0,
            reverse_complement=reverse_complement,
            cache=str(tmp_path),
        )
        batches = [data.train()[index] for index in range(30)]
        return {(tuple(b.inputs[0].tolist()), tuple(b.targets[0].tolist())) for b in batches}  # type: ignore[index]

    keep = BaseTokenizer("keep")
    ids = keep.encode(letters)
    assert drawn(False) == {expected(ids)}
    assert drawn(True) == {expected(ids), expected(keep.reverse_complement(ids))}


def test_kmer_frequencies_by_hand() -> None:
    ids = FOLD.encode("ACGTN")[None]
    single = kmer_frequencies(ids, 2, both_strands=False)[0]
    assert {FOLD.decode(np.array(divmod(k, 4))): float(v) for k, v in enumerate(single) if v} == {
        "AC": pytest.approx(1 / 3),
        "CG": pytest.approx(1 / 3),
        "GT": pytest.approx(1 / 3),
    }
    both = kmer_frequencies(ids, 2)[0]
    assert both.shape == (10,)  # 6 pairs, and AT CG GC TA, which are their own partners
    assert sorted(both[both > 0].tolist()) == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


@pytest.mark.parametrize("length", [7, 200])
def test_kmer_frequencies_of_both_strands_agree(length: int) -> None:
    ids = np.random.default_rng(0).integers(0, 5, length).astype(np.uint8)
    turned = FOLD.reverse_complement(ids)
    np.testing.assert_array_equal(kmer_frequencies(ids, 3), kmer_frequencies(turned, 3))


def test_baseline_is_above_chance(cache: str) -> None:
    data = SpeciesData(length=4096, cache=cache)
    found = kmer_baseline(data, k=3)
    assert found.n == len(data.test() or ())
    assert 0.4 < found.low < found.accuracy < found.high < 0.9
