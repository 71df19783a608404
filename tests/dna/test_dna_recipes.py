"""The recipes' draws by hand, and each recipe at a tiny scale on made data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mambaseq_dna.recipes import brca1
from mambaseq_dna.recipes.common import (
    MASK,
    Stretches,
    linear_score,
    naive_bayes,
    other_strand,
    score,
    stretches_of,
    tiles,
)
from mambaseq_dna.tokenizer import N

from mambaseq.reproduction import Context


def test_windows_are_drawn_within_stretches_of_their_class() -> None:
    tokens = torch.randint(0, 4, (100,), dtype=torch.uint8)
    places = [np.array([[0, 10], [20, 23], [30, 60]]), np.array([[60, 100]])]
    source = Stretches(tokens, places, 8)
    ids, label = source.draw(0, torch.arange(4000), flip=False)
    where = {tuple(tokens[i : i + 8].tolist()): i for i in range(93)}
    starts = torch.tensor([where[tuple(row)] for row in ids.tolist()])
    assert set(starts[label == 0].tolist()) == {0, 1, 2, *range(30, 53)}
    assert set(starts[label == 1].tolist()) == set(range(60, 93))
    assert 0.45 < label.float().mean() < 0.55
    both, _ = source.draw(0, torch.arange(4000))
    same = (both == ids).all(1) | (both == other_strand(ids)).all(1)
    assert same.all()
    assert not torch.equal(both, ids)


def test_masks_hide_as_bert_does() -> None:
    source = Stretches(torch.randint(0, 4, (5000,), dtype=torch.uint8), [np.array([[0, 5000]])], 100)
    batch = source.masked(200, 0)(torch.tensor(3))
    assert batch.targets is not None
    asked = batch.targets != -100
    assert 0.13 < asked.float().mean() < 0.17
    assert 0.76 < (batch.inputs[asked] == MASK).float().mean() < 0.84
    assert torch.equal(batch.inputs[~asked], source.draw(0, torch.arange(600, 800))[0][~asked])


def test_stretches_and_tiles_leave_out_n() -> None:
    tokens = torch.tensor([0, 1, N, 2, 3, 0, 1, N, N, 2], dtype=torch.uint8)
    places = stretches_of(tokens, np.array([0, 5, 10]))
    assert places.tolist() == [[0, 2], [3, 5], [5, 7], [9, 10]]
    starts, labels = tiles([places, np.array([[0, 9]])], 2)
    assert starts.tolist() == [0, 3, 5, 0, 4, 6]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_naive_bayes_and_regression_are_those_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, 900).astype(np.uint8)
    places = [np.array([[0, 200], [200, 203], [250, 300]]), np.array([[300, 900]])]

    def counts(sequence: np.ndarray) -> np.ndarray:
        words = np.lib.stride_tricks.sliding_window_view(sequence, 3).astype(int) @ [16, 4, 1]
        return np.bincount(words, minlength=64)

    stretches = [ids[a:b] for of in places for a, b in of]
    second = MultinomialNB(alpha=1, fit_prior=False).fit([counts(one) for one in stretches], [0, 0, 0, 1])
    inputs = rng.integers(0, 4, (20, 50)).astype(np.uint8)
    told = naive_bayes(torch.from_numpy(ids), places, inputs, 3)
    expected = second.predict_joint_log_proba([counts(one) for one in inputs]) + np.log(2)
    np.testing.assert_allclose(told, expected, rtol=1e-12)
    for n_classes in (2, 3):
        features = {split: rng.random((60, 8)).astype(np.float32) for split in ("train", "dev", "test")}
        labels = {split: (of[:, 0] * n_classes).astype(np.int64) for split, of in features.items()}
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(features["train"], labels["train"])
        wanted = score(model.predict_proba(features["test"]), labels["test"])
        np.testing.assert_allclose(linear_score(features, labels, [0.1]), wanted, atol=1e-9)


def made_variants() -> brca1.Variants:
    """Losses are where a C is changed."""
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 4, 400).astype(np.uint8)
    offset = np.repeat(np.sort(rng.choice(np.arange(30, 370), 40, replace=False)), 3)
    ref = reference[offset]
    alt = ((ref + np.tile([1, 2, 3], 40)) % 4).astype(np.uint8)
    exon = np.array(["X2", "X3", "X4", "X5"]).repeat(30)
    consequence = np.where(rng.random(120) < 0.5, "Missense", "Intronic")
    scores = {"CADD": (ref == 1) + 0.01 * rng.random(120), "phyloP": rng.random(120)}
    return brca1.Variants(offset, ref, alt, ref == 1, exon, consequence, scores, reference)


def test_brca1_on_made_variants(tmp_path: Path) -> None:
    variants = made_variants()
    sites, rows = variants.sites(16)
    assert [len(site.whole(site.ref)) for site in sites] == [16] * 40
    alts = np.concatenate([np.concatenate(site.alts) for site in sites])
    assert np.array_equal(alts[rows], variants.alt)
    assert all(
        site.ref[0] == variants.reference[place] for site, place in zip(sites, variants.offset[::3], strict=True)
    )
    (tmp_path / "trials").mkdir()
    lines = ["causal, zero-shot, window 16", "masked, zero-shot, window 16", "CADD", "phyloP", "Markov, order 6"]
    lines += ["masked, embeddings, exon left out"]
    context = Context(torch.device("cpu"), "tiny", [0], tmp_path, only=lines)
    tokens = torch.randint(0, 4, (500,), dtype=torch.uint8)
    source = Stretches(tokens, [np.array([[0, 500]])], 32)
    scores, models = brca1.tables(context, lambda: variants, lambda context, length: (source, source))
    values = {line.name: line.values for line in scores.lines}
    assert list(values)[:-1] == sorted(lines, key=list(values).index)
    assert values["CADD"]["auroc"] == [1.0]
    assert values["masked, embeddings, exon left out"]["auroc"][0] > 0.8  # they tell which base is changed
    assert 0.2 < values["phyloP"]["low"][0] < values["phyloP"]["auroc"][0] < values["phyloP"]["high"][0] < 0.7
    assert [line.name for line in models.lines] == ["causal seed=0", "masked seed=0"]


def test_a_markov_model_by_hand() -> None:
    """Behind an A there are four C and one G, and one half is added to each of four counts."""
    variants = made_variants()
    reference = np.array([0, 1, 3, 0, 1, 3, 0, 1, 3, 0, 2, 3, 0, 1, 3], dtype=np.uint8)
    one = variants._replace(offset=np.array([10]), alt=np.array([1], dtype=np.uint8), reference=reference)
    # A C 4, A G 1 of 5; C T 4 of 4, G T 1 of 1
    expected = np.log(4.5 / 7) - np.log(1.5 / 7) + np.log(4.5 / 6) - np.log(1.5 / 3)
    np.testing.assert_allclose(brca1.markov(one, 1), [expected])
