"""What a model of DNA must beat: each baseline finds what it can find, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from mambaseq_dna.baselines import kmers, linear, network, offered
from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.offered import baselines_of
from mambaseq_dna.baselines.positions import around, words_around
from mambaseq_dna.labelled.data import LabelledData
from mambaseq_dna.tokenizer import BaseTokenizer, complement
from mambaseq_dna.tracks import AnnotatedData
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData

MOTIF = np.array([2, 0, 3, 0, 2, 2, 1, 0])


class Made(SequenceData):
    """Sequences of two classes, told apart by what `mark` does to those of the second."""

    tokenizer = BaseTokenizer()
    class_names = ("plain", "marked")

    def __init__(self, mark, length: int = 80, to=lambda ids, label: label) -> None:
        self.mark, self.length, self.to = mark, length, to

    def setup(self) -> None:
        pass

    def _items(self, seed: int, count: int) -> list[Batch]:
        rng = np.random.default_rng(seed)
        items = []
        for number in range(count):
            ids, label = rng.integers(0, 4, self.length), number % 2
            ids = self.mark(ids, rng) if label else ids
            items.append(Batch(torch.from_numpy(ids)[None], torch.tensor([self.to(ids, label)])))
        return items

    def train(self) -> list[Batch]:
        return self._items(0, 300)

    def validation(self) -> list[Batch]:
        return self._items(1, 80)

    def test(self) -> list[Batch]:
        return self._items(2, 100)


def with_gc(ids, rng):
    return np.where(rng.random(len(ids)) < 0.4, rng.integers(1, 3, len(ids)), ids)


def with_n(ids, rng):
    return np.where(rng.random(len(ids)) < 0.1, 4, ids)


def with_motif(ids, rng):
    at = rng.integers(len(ids) - len(MOTIF))
    word = MOTIF if rng.random() < 0.5 else complement(MOTIF.astype(np.uint8))[::-1]  # on either strand
    return np.concatenate([ids[:at], word, ids[at + len(MOTIF) :]])


def with_start(ids, rng):
    return np.concatenate([[2, 0, 3, 3], ids[4:]])


QUICK = ("GC alone", "N alone", "length alone", "k-mer logistic regression", "one-hot logistic regression")


@pytest.mark.parametrize(
    ("mark", "found"),
    [
        (with_gc, {"GC alone": 0.9, "k-mer logistic regression": 0.9, "k-mer naive Bayes": 0.9}),
        (with_n, {"N alone": 0.98}),
        (with_motif, {"k-mer logistic regression": 0.8, "k-mer naive Bayes": 0.8}),
        (with_start, {"one-hot logistic regression": 0.9}),
    ],
)
def test_each_baseline_finds_what_it_can(mark, found: dict[str, float]) -> None:
    data = Made(mark)
    test = data.test()
    truth = np.array([int(item.targets) for item in test])
    offers = baselines_of(data)
    assert [*offers] == [*QUICK, "k-mer naive Bayes", "small CNN"]
    right = {
        name: (np.asarray(offers[name](test).outputs).argmax(1) == truth).mean()
        for name in offers
        if name != "small CNN"
    }
    for name, share in right.items():
        assert share >= found.get(name, 0.3), (name, share)
    assert right["length alone"] == 0.5
    for alone in {"GC alone", "N alone"} - found.keys():
        assert right[alone] < 0.72


def test_the_network_learns_and_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Made(lambda ids, rng: np.concatenate([[2, 0, 3, 3] * 3, ids[12:]]), length=24)
    train, held_out, test = (Examples.read(items) for items in (data.train(), data.validation(), data.test()))
    before = torch.random.get_rng_state()
    model, note = network.trained(train, held_out, 2, width=16, epochs=12)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (network.answered(model, test).argmax(1) == test.targets).mean() > 0.85
    assert "12 epochs, step" in note
    monkeypatch.setattr(network, "_PIECE", 30)
    long = Examples.of(np.resize(test.ids, (2, 61)))
    pieces = Examples(long.ids, np.array([0, 30, 61, 91, 122]), np.zeros(4, np.int64))
    pieces = network.answered(model, pieces)
    assert network.answered(model, long) == pytest.approx(pieces.reshape(2, 2, 2).mean(1), abs=1e-6)
    _, note = network.trained(train, held_out, 2, seconds=1e-9, width=8)
    assert "stopped after 0 s, in epoch 1 of 100, step 1 of 1" in note


def test_of_values_and_several_labels() -> None:
    """Regression of the share of GC, and two labels of which one is rich GC; unknown targets are left out."""
    value = Made(with_gc, to=lambda ids, label: float(((ids == 1) | (ids == 2)).mean()) if len(ids) else 0)
    value.class_names = ()
    test = value.test()
    truth = np.array([float(item.targets) for item in test])
    offers = baselines_of(value)
    assert "k-mer ridge regression" in offers
    for name in ("GC alone", "k-mer ridge regression"):
        told = np.asarray(offers[name](test).outputs)[:, 0]
        assert np.corrcoef(told, truth)[0, 1] > 0.98, name
    model, _ = network.trained(
        *(Examples.read(items) for items in (value.train(), value.validation())), 1, width=8, epochs=2
    )
    assert network.answered(model, Examples.read(test)).shape == (100, 1)

    class Labels(Made):
        def _items(self, seed: int, count: int) -> list[Batch]:
            return [
                Batch(item.inputs, torch.tensor([[int(item.targets), -100 if k % 3 else k % 2]]), target_of="sequence")
                for k, item in enumerate(super()._items(seed, count))
            ]

    labels = Labels(with_gc)
    told = np.asarray(baselines_of(labels)["GC alone"](labels.test()).outputs)
    assert told.shape == (100, 2)
    assert ((told[:, 0] > 0) == np.arange(100) % 2).mean() > 0.9


def examples(n: int = 60, length: int = 50, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    ids = rng.choice(5, size=(n, length), p=[0.3, 0.2, 0.2, 0.28, 0.02])
    return Examples.of(ids, rng.integers(0, 3, n))


@pytest.mark.parametrize("both", [False, True])
def test_words_are_counted_as_by_hand(both: bool) -> None:
    """Against strings, in a dense and a sparse matrix, and naive Bayes against scikit-learn."""
    of = examples(20, 30)
    k, letters = 3, "ACGT"
    words = ["".join(letters[word // 4**place % 4] for place in (2, 1, 0)) for word in range(4**k)]
    turned = str.maketrans("ACGT", "TGCA")
    counts = np.zeros((20, 64))
    for row in range(20):
        text = "".join("ACGTN"[base] for base in of.ids[of.bounds[row] : of.bounds[row + 1]])
        for at in range(28):
            word = text[at : at + 3]
            if "N" not in word:
                counts[row, words.index(word)] += 1
                if both:
                    counts[row, words.index(word.translate(turned)[::-1])] += 1
    table = kmers.tallied(of, k, 3, both)
    expected = np.stack([counts[of.targets == label].sum(0) for label in range(3)], 1)
    assert table.tolist() == expected.tolist()
    place, width = kmers.columns(k, both)
    by_column = np.zeros((20, width))
    np.add.at(by_column.T, place, counts.T)
    found = kmers.frequencies(of, k, both)
    dense = np.asarray(found.todense() if sparse.issparse(found) else found)
    assert dense == pytest.approx(by_column / by_column.sum(1, keepdims=True), abs=1e-6)
    second = MultinomialNB(alpha=0.5).fit(counts, of.targets)
    told = np.log(np.bincount(of.targets) / 20) + kmers.summed(of, k, offered._log_shares(table, 0.5)) * (1 + both)
    ours = told if not both else np.log(np.bincount(of.targets) / 20) + counts @ offered._log_shares(table, 0.5)
    theirs = second.predict_joint_log_proba(counts)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_linear_models_are_those_of_scikit_learn() -> None:
    of = examples(80, 40)
    features = kmers.frequencies(of, 2, False)
    features = np.asarray(features.todense() if sparse.issparse(features) else features, dtype=np.float64)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(features, of.targets)
    ours = linear.logistic(features, of.targets, 3, 0.1)
    assert ours(features) == pytest.approx(model.decision_function(features), abs=1e-3)
    thin = linear.logistic(sparse.csr_matrix(features), of.targets, 3, 0.1)  # not centred: the same but for the bias
    assert thin(sparse.csr_matrix(features)) == pytest.approx(ours(features), abs=2e-3)
    one = linear.logistic(features, np.full(80, 1), 3, 0.1)
    assert one(features).argmax(1).tolist() == [1] * 80
    as_is = LogisticRegression(C=0.1, max_iter=300).fit(features, of.targets).decision_function(features)
    assert linear.logistic(features, of.targets, 3, 0.1, scaled=False)(features) == pytest.approx(as_is, abs=1e-3)
    rng = np.random.default_rng(1)
    values = np.where(rng.random((80, 2)) < 0.8, rng.normal(size=(80, 2)), np.nan)
    fitted = linear.ridge(features, values, [3.0])[0]
    scaled = StandardScaler().fit_transform(features)
    for column in range(2):
        known = ~np.isnan(values[:, column])
        second = Ridge(alpha=3.0).fit(scaled[known], values[known, column])
        assert fitted(features)[:, column] == pytest.approx(second.predict(scaled), abs=1e-6)


def test_bases_are_told_by_the_words_around_them() -> None:
    """A base's class is whether A stands before it: words of three bases know that, words of one do not."""
    rng = np.random.default_rng(0)

    def made(n: int) -> Examples:
        ids = rng.integers(0, 4, (n, 50))
        targets = (np.roll(ids, 1, axis=1) == 0).astype(np.int64)
        targets[:, 0] = -100
        return dataclasses.replace(Examples.of(ids), targets=targets.ravel(), per_token=True)

    train, held_out, test = made(200), made(20), made(20)
    told = around(train, held_out, test, 2)
    said = np.concatenate([of.argmax(1) for of in told.outputs]).reshape(20, 50)[:, 1:-1]
    assert (said == test.targets.reshape(20, 50)[:, 1:-1]).mean() > 0.99
    assert int(told.note.split()[2]) >= 3
    words = words_around(Examples.of(np.array([[0, 1, 2, 4, 3]])), 3)
    assert words.tolist() == [-1, 0 * 16 + 1 * 4 + 2, -1, -1, -1]


def test_sequences_are_cut_drawn_and_put_apart() -> None:
    of = examples(5, 10)
    pieces = of.pieces(12, 3)
    assert (pieces.lengths.tolist(), len(pieces)) == ([4, 6] * 5, 10)
    assert pieces.targets.tolist() == of.targets.repeat(2).tolist()
    some = of.take([3, 1])
    assert some.ids.tolist() == [*of.ids[30:40], *of.ids[10:20]]
    rest, share = of.split(0.4)
    assert (len(rest), len(share)) == (3, 2)
    assert len(of.fewer(3)) == 3
    parts = [*of.parts(25)]
    assert [part.lengths.tolist() for part in parts] == [[10, 10], [10, 10], [10]]
    assert np.concatenate([part.ids for part in parts]).tolist() == of.ids.tolist()
    assert len([*of.parts(1)]) == 5


def test_datasets_of_labels_and_of_bases_offer_baselines(tmp_path: Path) -> None:
    """A table of sequences, and a class for every base of an annotated genome."""
    rng = np.random.default_rng(0)
    rows = ["sequence,label,split"]
    for number in range(120):
        ids = rng.integers(0, 4, 40)
        ids = with_gc(ids, rng) if number % 2 else ids
        text = "".join("ACGT"[base] for base in ids)
        rows.append(f"{text},{'rich' if number % 2 else 'poor'},{('train', 'train', 'train', 'test')[number // 30]}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    table = LabelledData([str(tmp_path / "t.csv")], split="split", cache=str(tmp_path / "c"))
    table.setup()
    test = table.test()
    told = table.baselines()["GC alone"]([test[index] for index in range(len(test))])
    truth = [int(test[index].targets) for index in range(len(test))]
    assert (np.asarray(told.outputs).argmax(1) == truth).mean() > 0.8
    # every base behind AC is in an interval
    fasta, bed = [], []
    for name in ("one", "two", "three"):
        ids = rng.integers(0, 4, 3000)
        fasta.append(f">{name}\n{''.join('ACGT'[base] for base in ids)}\n")
        bed += [f"{name}\t{at}\t{at + 1}\tsite\n" for at in range(2, 3000) if ids[at - 2] == 0 and ids[at - 1] == 1]
    (tmp_path / "g.fa").write_text("".join(fasta))
    (tmp_path / "g.bed").write_text("".join(bed))
    bases = AnnotatedData(
        str(tmp_path / "g.fa"),
        str(tmp_path / "g.bed"),
        {"site": "site"},
        test_records="three",
        length=200,
        samples_per_epoch=300,
        reverse_complement=False,
        cache=str(tmp_path / "c"),
    )
    bases.setup()
    covering = bases.test()
    items = [covering[index] for index in range(len(covering))]
    (answer,) = bases.baselines().values()
    said = np.concatenate([one.argmax(1) for one in answer(items).outputs])
    true = np.concatenate([item.targets[0].numpy() for item in items])
    assert (said == true)[true >= 0].mean() > 0.97 > (true[true >= 0] == 0).mean()
