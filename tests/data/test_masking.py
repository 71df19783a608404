"""Masked tokens: which are hidden and how, a function of (seed, item) alone, and the data sets that have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_dna.genome import GenomeData
from mambaseq_text.tokenization import ByteTokenizer
from tasks.ragged import model_of
from tiny import TinyTokens

from mambaseq.batch import Batch
from mambaseq.checkpoints import load_model
from mambaseq.checkpoints.beginning import begin_from
from mambaseq.checkpoints.card import ModelCard
from mambaseq.checkpoints.export import save_model
from mambaseq.cli.main import main
from mambaseq.data.masking import MaskedItems, MaskRule
from mambaseq.data.purpose import task_of
from mambaseq.errors import ConfigError, DataError
from mambaseq.models import build_model
from mambaseq.tasks.fitting import check_data

MASK = 50


def items(count: int, length: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    return [Batch(torch.randint(0, MASK, (1, length), generator=draw)) for _ in range(count)]


@pytest.mark.parametrize(("share", "span", "length"), [(0.15, 1, 200), (0.2, 5, 203), (0.5, 3, 7), (0.01, 4, 3)])
def test_spans_are_whole_and_apart(share: float, span: int, length: int) -> None:
    rule = MaskRule(share, span)
    for index in range(50):
        places, kinds = rule.draw(length, np.random.default_rng(index))
        span = min(rule.span, length)
        assert len(places) == len(kinds) == max(1, min(round(share * length / span), length // span))
        assert (np.diff(places, axis=1) == 1).all()
        assert len(np.unique(places)) == places.size
        assert places.min() >= 0
        assert places.max() < length


def test_every_way_to_lay_spans_is_as_likely() -> None:
    """Two spans of two among five positions: 01 23, 01 34, 12 34."""
    rng = np.random.default_rng(0)
    found = [tuple(MaskRule(0.8, 2).draw(5, rng)[0][:, 0]) for _ in range(3000)]
    counts = [found.count(starts) for starts in ((0, 2), (0, 3), (1, 3))]
    assert sum(counts) == 3000
    assert all(abs(count - 1000) < 100 for count in counts)  # four standard deviations


def test_tokens_are_hidden_by_the_rule() -> None:
    whole = items(100, 400)
    rule = MaskRule(0.25, 2, replaced=0.6, random=0.3)
    masked = MaskedItems(whole, rule, MASK, random_ids=[7])
    counts = np.zeros(3)
    for index, item in enumerate(whole):
        found = masked[index]
        assert found.targets is not None
        asked, before, after = (t[0].numpy() for t in (found.targets != -100, item.inputs, found.inputs))
        assert asked.sum() == 100
        assert (found.targets[0].numpy()[asked] == before[asked]).all()
        assert (after[~asked] == before[~asked]).all()
        kept = asked & (before != 7)
        counts += [(after == MASK).sum(), (kept & (after == 7)).sum(), (kept & (after == before)).sum()]
        assert counts.sum() == pytest.approx(100 * (index + 1), rel=0.05)
    shares = counts / counts.sum()
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    assert not (whole[0].inputs == MASK).any()  # the items themselves stay as they are


def test_a_mask_is_a_function_of_seed_and_item() -> None:
    one, same, other = (MaskedItems(items(5, 60), MaskRule(), MASK, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one[3].inputs, same[3].inputs)
    assert not torch.equal(one[3].inputs, other[3].inputs)
    first, second = (MaskedItems([items(1, 60)[0]] * 2, MaskRule(), MASK)[index] for index in (0, 1))
    assert not torch.equal(first.inputs, second.inputs)


def test_padding_and_what_is_never_asked_for_is_no_target() -> None:
    ids = torch.arange(20)[None]
    item = Batch(ids, ids.masked_fill(ids % 2 == 0, -100), torch.arange(20)[None] < 10)
    found = MaskedItems([item], MaskRule(0.9), MASK)[0]
    asked = (found.targets != -100)[0].nonzero()[:, 0].tolist()
    assert asked
    assert all(place % 2 == 1 and place < 10 for place in asked)
    assert torch.equal(found.inputs[:, 10:], ids[:, 10:])
    with pytest.raises(DataError, match="Only tokens can be masked"):
        MaskedItems([Batch(torch.zeros(1, 5, 2))], MaskRule(), MASK)[0]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"share": 0.0}, "mask_share"),
        ({"share": 1.0}, "mask_share"),
        ({"share": math.nan}, "mask_share"),
        ({"span": 0}, "mask_span"),
        ({"replaced": -0.1}, "mask_replaced"),
        ({"replaced": 0.8, "random": 0.3}, "mask_random"),
    ],
)
def test_rules_out_of_range_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{key}"):
        MaskRule(**options)


def genome(tmp_path: Path, **options: Any) -> GenomeData:
    rng = np.random.default_rng(0)
    letters = "".join(rng.choice(list("ACGTacgtN"), 600, p=[0.2] * 4 + [0.04] * 4 + [0.04]))
    (tmp_path / "x.fa").write_text(f">one\n{letters}\n")
    data = GenomeData(
        str(tmp_path / "x.fa"), objective="masked", length=40, drop_n=False, cache=str(tmp_path / "cache"), **options
    )
    data.setup()
    return data


@pytest.mark.parametrize("lowercase", ["fold", "keep", "unscored"])
def test_masked_bases(tmp_path: Path, lowercase: Any) -> None:
    data = genome(tmp_path, lowercase=lowercase, mask_share=0.5, validation_fraction=0.3)
    mask = data.tokenizer.vocab_size
    assert (data.vocab_size, task_of(data)) == (mask + 1, "masked")
    assert [data.complement[i] for i in data.complement] == list(range(mask + 1))
    assert data.complement[mask] == mask
    for sets in (data.train(), data.validation()):
        batches = [sets[index] for index in range(4)]
        inputs, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("inputs", "targets"))
        assert (inputs == mask).any()
        assert not ((targets % 5 == 4) | (targets == mask)).any()
        assert int((targets != -100).sum()) > 20
        assert torch.equal(sets[2].inputs, batches[2].inputs)
    assert not (data.train()[0].inputs == data.train()[1].inputs).all()


def test_one_side_is_not_enough(tmp_path: Path) -> None:
    data = genome(tmp_path)
    causal = model_of("lm")
    with pytest.raises(ConfigError, match=r"asks for masked tokens.* backbone 'residual' is causal.*'bidirectional'"):
        check_data(causal, data, "'dna/genome'", {})
    check_data(model_of("lm", {"name": "bidirectional", "n_layers": 1}), data, "'dna/genome'", {})
    with pytest.raises(ConfigError, match=r"backbone 'bidirectional' sees.*data\.objective masked"):
        check_data(model_of("lm", {"name": "bidirectional", "n_layers": 1}), TinyTokens(), "'tiny'", {})


def masked_model(folder: Path) -> Path:
    coding = ByteTokenizer()
    spec = {
        "d_model": 8,
        "encoder": {"name": "tokens", "vocab_size": 257},
        "backbone": {"name": "bidirectional", "n_layers": 1},
        "mixer": {"name": "mamba"},
        "head": {"name": "lm", "vocab_size": 257},
    }
    torch.manual_seed(0)
    card = ModelCard(spec=spec, task="masked", length=20, reader="text/text", reader_options={"field": "text"})
    card.tokenizer = {"name": "text/bytes", "options": {}}
    save_model(folder, build_model(spec), card, coding)
    return folder


def test_prediction_hides_each_token_once(tmp_path: Path) -> None:
    model, source, out = masked_model(tmp_path / "m"), tmp_path / "x.txt", tmp_path / "o.csv"
    source.write_text("To be or not to be, that is")
    assert main(["predict", "--checkpoint", str(model), str(source), "--out", str(out), "--device", "cpu"]) == 0
    header, first, second = out.read_text().splitlines()
    assert header.split(",")[2:6] == ["start", "stop", "tokens", "bits_per_token"]
    assert [line.split(",")[2:5] for line in (first, second)] == [["0", "20", "20"], ["20", "27", "7"]]
    loaded, ids = load_model(model).model, torch.tensor([list(b"To be or not to be, that is"[20:])])
    total = 0.0
    for place in range(7):
        hidden = ids.clone()
        hidden[0, place] = 256
        with torch.no_grad():
            total -= float(loaded(hidden).logits[0, place].log_softmax(-1)[ids[0, place]]) / math.log(2)
    assert float(second.split(",")[5]) == pytest.approx(total / 7, abs=2e-6)


def test_a_run_without_masks_begins_from_a_masked_one(tmp_path: Path) -> None:
    loaded = load_model(masked_model(tmp_path / "m"))
    spec = {**loaded.card.spec, "encoder": {"name": "tokens", "vocab_size": 256}}
    spec["head"] = {"name": "token_classification", "n_classes": 3}
    model = build_model(spec)
    begin_from(model, loaded, ModelCard(spec=spec), ByteTokenizer())
    torch.testing.assert_close(model.encoder.embedding.weight, loaded.model.encoder.embedding.weight[:256])
