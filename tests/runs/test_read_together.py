"""Records of different lengths are read together: each answer of `predict`, by every head, encoder and backbone of the
registry, is what it is of the record alone. Where padding would be seen, only those of one length are together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from runs.test_prediction import language_model, predict, saved
from test_combinations import BACKBONES, HEADS, PAIRS, PARTS, TABLE, build, sequences_of
from torch import Tensor, nn

from mambaseq.backbones.bidirectional import BidirectionalStack
from mambaseq.backbones.residual import ResidualStack
from mambaseq.backbones.reverse_complement import ReverseComplementStack
from mambaseq.checkpoints import LoadedModel, ModelCard
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel
from mambaseq.runs.answers import Answer, Found, NotFinite, Positions, Sequences, Span
from mambaseq.runs.embeddings import Embeddings
from mambaseq.runs.likelihoods import Likelihood, PseudoLikelihood, PseudoTokens, Tokens
from mambaseq.runs.prediction import _together
from mambaseq.runs.strands import BothStrands


def loaded(model: SequenceModel) -> LoadedModel:
    names = (("encoder", model.encoder), ("backbone", model.backbone), ("head", model.head))
    spec: dict[str, Any] = {part: {"name": type(one).__name__} for part, one in names}
    spec["encoder"]["vocab_size"] = TABLE["vocab_size"]
    tokenizer: Any = SimpleNamespace(complement=PAIRS["complement"], vocab_size=TABLE["vocab_size"] - 1)
    return LoadedModel(model, ModelCard(spec=spec), tokenizer, Path("m"))


def pieces_of(model: SequenceModel) -> list[tuple[Record, Span]]:
    """Windows of records, some of which have tokens that do not count."""
    found = []
    for number, item in enumerate(sequences_of(model)):
        values, condition = item.inputs[0].numpy(), item.condition
        given: Any = None if condition is None else condition[0].tolist()
        scored = np.arange(len(values)) % 3 != 1 if number == 0 else None
        which = {"signal" if item.inputs.is_floating_point() else "ids": values}
        found.append((Record(f"r{number}", condition=given, scored=scored, **which), Span(0, len(values))))
    return [*found, (found[0][0], Span(2, 8))]


def answers_of(model: SequenceModel) -> Iterator[Answer]:
    """All that a model can be asked for."""
    one, head = loaded(model), model.head
    several = head.learns == "multilabels"
    classes: list[str] | None = None if head.learns == "values" else []
    yield (Positions if head.per_token else Sequences)(one, None, classes, several)
    if model.stride == 1:
        yield Embeddings(one, None, "none", None)
    for how in ("mean", "last"):
        yield Embeddings(one, None, how, None)  # type: ignore[arg-type]
    if isinstance(model.backbone, ResidualStack | BidirectionalStack | ReverseComplementStack):
        yield Embeddings(one, None, "mean", 1)
    if head.continues != "tokens" or getattr(model.encoder, "n_codes", 0) != getattr(head, "codes", 0):
        return
    if model.backbone.causal and model.encoder.causal:
        yield from (kind(one, None) for kind in (Likelihood, Tokens))
    elif not head.codes:
        yield from (kind(one, None) for kind in (PseudoLikelihood, PseudoTokens))


def same(together: Found | NotFinite, alone: Found | NotFinite) -> None:
    assert isinstance(together, Found)
    assert isinstance(alone, Found)
    assert together[:3] == alone[:3]
    np.testing.assert_allclose(together.values, alone.values, rtol=1e-5, atol=2e-6)
    assert (together.known is None) == (alone.known is None)
    if together.known is not None:
        np.testing.assert_array_equal(together.known, alone.known)


@torch.no_grad()
def agree(answer: Answer, pieces: list[tuple[Record, Span]]) -> None:
    assert answer.pads
    pieces = [piece for piece in pieces if piece[1].stop - piece[1].start >= answer.least]
    assert len({span.stop - span.start for _, span in pieces}) > 2
    for found, piece in zip(answer.answers(pieces), pieces, strict=True):
        same(found, answer.answers([piece])[0])


@pytest.mark.parametrize(
    ("head", "backbone"),
    [(head, "reverse_complement") for head in HEADS if head.startswith("rc_")]
    + [(head, one) for head in HEADS if not head.startswith("rc_") for one in ("residual", "bidirectional")],
)
def test_every_head_answers_as_of_one_record(head: str, backbone: str) -> None:
    own = {"codes": {"n_codes": 3}, "levels": {"fine": 2}}
    encoder: tuple[str, dict[str, Any]] = ("tokens", TABLE)
    if backbone == "reverse_complement":
        encoder = ("rc_tokens", PAIRS)
    elif head in own:
        encoder = (head, {**TABLE, **own[head]})
    for options in HEADS[head]:
        model = build(encoder, (backbone, BACKBONES[backbone][0]), (head, options))
        pieces = pieces_of(model)
        for answer in answers_of(model):
            agree(answer, pieces)
            if encoder[0] != "codes":  # of which no domain knows the other strand
                agree(BothStrands(answer, answer.loaded), pieces)


@pytest.mark.parametrize("encoder", PARTS[0], ids=lambda part: part[0] + str(part[1].get("stride", "")))
def test_every_encoder_and_backbone_does(encoder: tuple[str, dict[str, Any]]) -> None:
    for backbone in PARTS[1]:
        of_positions = encoder[1].get("stride", 1) == 1
        for head in ("token_regression" if of_positions else "regression", "rc_classification"):
            try:
                model = build(encoder, backbone, (head, HEADS[head][-1]))
            except ConfigError:  # of other strands; see tests/test_combinations.py
                continue
            pieces = pieces_of(model)
            for answer in answers_of(model):
                agree(answer, pieces)


class Peeking(nn.Module):
    """An encoder that sees the next input and takes no mask: it would see padding."""

    causal: ClassVar[bool] = False

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x: Tensor = self.embedding(inputs)
        return x + x.roll(-1, 1)


def lengths_together(answer: Answer, lengths: list[int], batch_size: int = 16) -> list[list[int]]:
    found = list(_together(answer, dict(enumerate(lengths)), batch_size))
    assert sorted(number for some in found for number in some) == list(range(len(lengths)))
    return [[lengths[number] for number in some] for some in found]


def test_what_would_see_padding_is_read_by_length() -> None:
    model = build(("tokens", TABLE), ("residual", {"n_layers": 1}), ("regression", {"n_outputs": 2}))
    answer, lengths = Sequences(loaded(model), None, None), [5, 9, 7, 9, 5, 5]
    assert lengths_together(answer, lengths) == [[5, 5, 5, 7, 9, 9]]
    model.encoder = Peeking(8, TABLE["vocab_size"])
    answer = Sequences(loaded(model), None, None)
    assert lengths_together(answer, lengths) == [[5, 5, 5], [7], [9, 9]]
    # a plugin's head of tokens is given no mask
    model = build(("tokens", TABLE), ("residual", {"n_layers": 1}), ("lm", TABLE))
    assert Likelihood(loaded(model), None).pads
    model.head.position_wise = False  # type: ignore[misc]
    assert not Likelihood(loaded(model), None).pads


def test_a_batch_is_bounded_and_little_of_it_is_padding() -> None:
    model = build(("tokens", TABLE), ("residual", {"n_layers": 1}), ("regression", {"n_outputs": 2}))
    answer = Sequences(loaded(model), 100, None)
    draw = np.random.default_rng(0)
    for lengths in (draw.integers(1, 101, 300).tolist(), [100] * 40, [1] * 2000, [3, 50, 100]):
        for some in lengths_together(answer, lengths):
            assert len(some) * max(some) <= 16 * 100
            assert len(some) * max(some) - sum(some) <= max(64 + max(some), sum(some) / 4 + max(some))
    assert len(lengths_together(answer, draw.integers(20, 91, 200).tolist())) < 15
    assert lengths_together(answer, [1000, 10, 12]) == [[10, 12], [1000]]
    assert all(len(some) == 1 for some in lengths_together(answer, [99, 100, 100], batch_size=1))


def test_200_texts_take_few_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcdef"), size)) for size in draw.integers(20, 91, 200)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = language_model(tmp_path / "m", length=512)
    calls: list[int] = []
    made = SequenceModel.__init__

    def counting(self: SequenceModel, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self.backbone.register_forward_hook(lambda *_: calls.append(1))

    monkeypatch.setattr(SequenceModel, "__init__", counting)
    rows = predict(model, source)
    assert len(calls) < 10
    calls.clear()
    monkeypatch.setattr(SequenceModel, "takes_padding", False)
    by_length = predict(model, source)
    assert len(calls) == len({len(text) for text in texts}) > 50
    for one, other, text in zip(rows, by_length, texts, strict=True):
        assert one["tokens"] == other["tokens"] == str(len(text) - 1)
        assert float(one["total_bits"]) == pytest.approx(float(other["total_bits"]), rel=1e-6)


def test_a_record_that_is_not_finite_spoils_no_other(tmp_path: Path) -> None:
    ecg = {"reader": "runs.test_predicted_rows:numbers", "class_names": [], "length": 9}
    encoder = {"name": "signal", "n_channels": 1}
    for backbone in ("residual", "bidirectional"):
        parts: dict[str, Any] = {"encoder": encoder, "backbone": {"name": backbone, "n_layers": 1}}
        model = saved(tmp_path / backbone, {"name": "regression"}, None, **parts, **ecg)
        source = tmp_path / "in.txt"
        source.write_text("1 2 3 4 5\n1 2 3 4 nan 6\n3 4\n")
        rows = predict(model, source, "--skip-bad")
        assert [bool(row["value"]) for row in rows] == [True, False, True]
