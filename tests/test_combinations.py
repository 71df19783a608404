"""Law 2 for whole models, every encoder x backbone x head of the registry: sequences of different lengths give the same
alone, padded and packed: outputs, losses, and states at each one's own end. What cannot be joined is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.checking.laws import poisoned, run
from mambaseq.checking.samples import sequences
from mambaseq.data.module import pack_collate, pad_collate
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer
from mambaseq.models import SequenceModel

WIDTH = 8
PAIRS: dict[str, Any] = {"vocab_size": 6, "complement": [3, 2, 1, 0, 4, 5]}
TABLE = {"vocab_size": 6}
SEVERAL = {"n_conditions": 5, "condition_sizes": [2, 3], "condition_means": [1.0], "condition_stds": [2.0]}
ENCODERS: dict[str, list[dict[str, Any]]] = {
    "tokens": [{**TABLE, "n_conditions": 3}],
    "codes": [{**TABLE, "n_codes": 2, **SEVERAL}],
    "levels": [{**TABLE, "fine": 2, "n_conditions": 3}],
    "rc_tokens": [{**PAIRS, **SEVERAL}],
    "signal": [{"n_channels": 2, **SEVERAL}],
    "dna/kmer": [{"k": 3, "stride": 1}, {"k": 4, "stride": 3}],
    "dna/frames": [{"k": 2}],
    "dna/conv": [{**TABLE, "width": 5, "positions": 64}],
    "audio/mel": [{"n_mels": 4, "window": 16, "stride": 5}],
}
BACKBONES: dict[str, list[dict[str, Any]]] = {
    "residual": [{"n_layers": 2}, {"n_layers": 1, "chunk_length": 5}],
    "bidirectional": [{"n_layers": 2}],
    "reverse_complement": [{"n_layers": 1}, {"n_layers": 1, "bidirectional": False}],
    "unet": [{"n_layers": 1, "pool": [2, 3]}],
    "dna/codons": [{"n_layers": 1}],
    "audio/convolutions": [{"n_layers": 2}],
}
HEADS: dict[str, list[dict[str, Any]]] = {
    "lm": [TABLE],
    "codes": [{**TABLE, "n_codes": 3}],
    "levels": [{**TABLE, "fine": 2, "width": 5}],
    "classification": [{"n_classes": 3, "pooling": how} for how in ("mean", "max", "last", "first")],
    "regression": [{"n_outputs": 2}],
    "multilabel": [{"n_classes": 3}],
    "token_classification": [{"n_classes": 6}, {"n_classes": 6, "stride": 3}],
    "token_multilabel": [{"n_classes": 3, "stride": 2}],
    "token_regression": [{"n_outputs": 2}, {"n_outputs": 2, "stride": 4}],
    "forecast": [
        {"n_channels": 2, "horizon": 3},
        {"n_channels": 2, "horizon": 2, "loss": "quantile", "quantiles": [0.1, 0.5, 0.8]},
    ],
    "rc_lm": [PAIRS],
    "rc_classification": [{"n_classes": 3, "pooling": how} for how in ("mean", "last")],
}


def variants(kind: str, options: dict[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    names = {entry.name for entry in catalog()[kind]}
    assert names == options.keys(), f"what is registered is to be tested here: {names ^ options.keys()}"
    return [(name, one) for name in options for one in options[name]]


# parts that are tables of their own in the place of those of tokens and lm: each meets those, and each other
OF_TOKENS = {"codes", "levels"}
PARTS = [variants(*kind) for kind in (("encoders", ENCODERS), ("backbones", BACKBONES), ("heads", HEADS))]


def mixer_of(name: str) -> Any:
    def make_mixer(layer: int, name: str = name, d_model: int = WIDTH) -> Mixer:
        return catalog()["mixers"].get(name)(d_model)

    return make_mixer


def build(encoder: tuple, backbone: tuple, head: tuple, mixer: str = "mamba") -> SequenceModel:
    torch.manual_seed(0)
    parts = catalog()
    return SequenceModel(
        parts["encoders"].get(encoder[0])(WIDTH, **encoder[1]),
        parts["backbones"].get(backbone[0])(mixer_of(mixer), **backbone[1]),
        parts["heads"].get(head[0])(WIDTH, **head[1]),
    ).eval()


def sequences_of(model: SequenceModel) -> list[Batch]:
    """See `sequences`."""
    items = sequences(model, signal=type(model.encoder).__name__ == "SignalEncoder")
    assert all(item.kind == model.head.learns for item in items)
    return items


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def same_states(model: SequenceModel, joined: list[Any], alone: list[list[Any]]) -> None:
    """What is read behind them is the same, and so are their tensors where none grows."""
    more = torch.randn(len(alone), 5, WIDTH)
    with torch.no_grad():
        for number, state in enumerate(alone):
            mine = [one.select(torch.tensor([number])) for one in joined]
            row = more[number : number + 1]
            close(model.backbone(row, state=mine), model.backbone(row, state=state))
            if all(mixer.bounded_state for mixer in model.backbone.mixers()):
                for one, other in zip(mine, state, strict=True):
                    for name, tensor in one.tensors().items():
                        close(tensor, other.tensors()[name])


def alone_padded_and_packed_agree(model: SequenceModel, states: bool) -> None:
    items = sequences_of(model)
    stateful = model.backbone.causal and getattr(model.encoder, "position_wise", False)
    options = {"return_state": True} if stateful and states else {}
    alone = [run(model, item, **options) for item in items]
    counts = torch.stack([item.n_targets for item in items]).double()
    mean = (torch.stack([one.loss for one in alone]).double() * counts).sum() / counts.sum()
    assert float(alone[-1].loss) == 0
    padded, packed = poisoned(pad_collate(items)), pack_collate(items)
    for batch in (padded, packed):
        assert int(batch.n_targets) == int(counts.sum())
        together = run(model, batch, **options)
        close(together.loss.double(), mean)
        if not model.head.per_token:
            close(together.logits, torch.cat([one.logits for one in alone]))
        elif batch is packed:
            close(together.logits[0], torch.cat([one.logits[0] for one in alone]))
        else:
            real = batch.mask[:, :: model.head.stride]
            close(together.logits[real], torch.cat([one.logits[0] for one in alone]))
        if options:
            same_states(model, together.state, [one.state for one in alone])
            again = run(model, batch, state=together.state, return_state=True)
            for number, (item, one) in enumerate(zip(items, alone, strict=True)):
                after = run(model, item, state=one.state, return_state=True)
                same_states(model, [s.select(torch.tensor([number])) for s in again.state], [after.state])
        elif not stateful:
            with pytest.raises(ConfigError, match=r"keeps no state|position_wise|model\.head\.stride"):
                run(model, batch, return_state=True)


@pytest.mark.parametrize("backbone", PARTS[1], ids=lambda part: "-".join(map(str, [part[0], *part[1].values()])))
@pytest.mark.parametrize("encoder", PARTS[0], ids=lambda part: part[0] + str(part[1].get("stride", "")))
def test_alone_padded_and_packed_agree(encoder: tuple, backbone: tuple) -> None:
    states = True  # which do not depend on the head
    for head in PARTS[2]:
        names = {encoder[0], head[0]}
        if len(names & OF_TOKENS) == 1 and not names <= OF_TOKENS | {"tokens", "lm"}:
            continue
        parts = [catalog()[kind].get(part[0]) for kind, part in
                 (("encoders", encoder), ("backbones", backbone), ("heads", head))]  # fmt: skip
        if len({part.strands for part in parts}) > 1:
            with pytest.raises(ConfigError, match="strands"):
                build(encoder, backbone, head)
        elif parts[2].per_token and encoder[1].get("stride", 1) != 1:
            with pytest.raises(ConfigError, match=r"(Kmer|Mel)Encoder.*stride"):
                build(encoder, backbone, head)
        else:
            alone_padded_and_packed_agree(build(encoder, backbone, head), states)
            states = False


@pytest.mark.parametrize("mixer", [entry.name for entry in catalog()["mixers"]])
def test_mixers_agree_alone_padded_and_packed(mixer: str) -> None:
    for backbone in ("residual", "bidirectional"):
        model = build(("tokens", TABLE), (backbone, {"n_layers": 1}), ("lm", TABLE), mixer)
        alone_padded_and_packed_agree(model, states=True)


def test_a_mask_of_anything_but_right_padding_is_refused() -> None:
    model = build(("tokens", TABLE), ("residual", {"n_layers": 1}), ("lm", TABLE))
    ids = torch.zeros(2, 4, dtype=torch.long)
    for row in ([False, True, True, True], [True, False, True, True]):
        for options in ({}, {"return_state": True}):
            with pytest.raises(ValueError, match="right padding"):
                model(ids, mask=torch.tensor([[True] * 4, row]), **options)
    with pytest.raises(ValueError, match="must have the inputs"):
        model(ids, mask=torch.ones(2, 3, dtype=torch.bool))


def test_rows_without_a_position_keep_their_state() -> None:
    model = build(("tokens", TABLE), ("residual", {"n_layers": 1}), ("lm", TABLE))
    _, state = model.backbone(torch.randn(2, 3, WIDTH), return_state=True)
    mask = torch.tensor([[True, True], [False, False]])
    with torch.no_grad():
        new = model(torch.ones(2, 2, dtype=torch.long), mask=mask, state=state, return_state=True).state
    for one, other in zip(new, state, strict=True):
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(tensor[1], other.tensors()[name][1], rtol=0, atol=0)
            assert not torch.equal(tensor[0], other.tensors()[name][0])
