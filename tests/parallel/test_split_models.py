"""Whole models over sequences that are split over ranks: the loss is the sequences', on every rank; what cannot be
split is refused by name."""

from __future__ import annotations

import collections
import copy
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import contexts, on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mambaseq.backbones import relay
from mambaseq.batch import Batch
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel, build_model, causal_lm
from mambaseq.parallel import Context, current

LENGTH = 22
# fp32, by other sums: relative to the largest
TOLERANCE = 2e-5


def data(batch: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which the first ranks know few."""
    torch.manual_seed(3)
    tokens, labels = torch.randint(0, 7, (2, batch, LENGTH))
    labels[:, :12] = -100
    labels[:, 5] = 1
    return tokens, labels


def model(**options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return causal_lm(7, 8, 2, "mamba", d_state=3, **options)


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    assert (actual - expected).abs().max() <= TOLERANCE * max(1e-3, expected.abs().max()), name


def step(of: SequenceModel, *arguments: Any, **options: Any) -> Any:
    """A training step's loss, gradients, and logits."""
    of.zero_grad()
    out = of(*arguments, **options, return_logits=True)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in of.named_parameters() if p.grad is not None}, out.logits.detach()


def split_step(
    of: SequenceModel,
    size: int,
    tokens: Tensor,
    labels: Tensor,
    bounds: Tensor | None = None,
    conditions: bool = True,
    **how: Any,
) -> None:
    """Compare the step on every rank with that on one device."""
    options = {} if bounds is None or not conditions else {"condition": torch.arange(len(bounds) - 1)}
    loss, gradients, logits = step(of, tokens, labels, cu_seqlens=bounds, **options)
    copies, ranks = [copy.deepcopy(of) for _ in range(size)], contexts(size)

    def on(rank: int) -> Any:
        part = ranks[rank].split(tokens.shape[1], len(tokens), bounds, **how)
        more = {} if not options else {"condition": torch.tensor(part.segments)}
        with part:
            own = step(copies[rank], part.take(tokens), part.take(labels), cu_seqlens=part.cu_seqlens(), **more)
        ranks[rank].sum_gradients(copies[rank].parameters())
        close(own[2], part.take(logits), "logits")
        return own[0], own[1]

    for own, own_gradients in on_ranks(size, on):
        close(own, loss, "loss")
        assert own_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            close(own_gradients[name], gradient, name)


def test_the_loss_is_the_whole_sequences_and_so_are_its_gradients() -> None:
    split_step(model(checkpoint=True), 3, *data(2))
    split_step(model(chunk_length=4), 2, *data(2), chunk_length=4)
    tokens, labels = data()
    bounds = torch.tensor([0, 3, 3, 17, LENGTH], dtype=torch.int32)
    split_step(model(n_conditions=4), 4, tokens, labels, bounds)
    split_step(model(n_conditions=4, chunk_length=3), 3, tokens, labels, bounds, chunk_length=3)
    hybrid = causal_lm(7, 8, 4, "mamba2", d_state=4, pattern=["mamba2", "attention*", "rwkv4+mlp", "attention*"])
    split_step(hybrid, 2, *data(2))


def test_chunks_of_one_position_are_dealt_to_more_ranks_than_they_divide_by() -> None:
    tokens, labels = data(2)
    split_step(
        causal_lm(7, 8, 1, "mamba", d_state=3, chunk_length=1), 4, tokens[:, -5:], labels[:, -5:], chunk_length=1
    )


def test_layers_share_messages_between_chunks_whose_second_run_hears_of_gradients_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a message costs the host is a part of a chunk's time on a GPU."""
    layers, turns, bundles = 9, 3, 5  # of 9 // 4 = 2 layers, the last of one
    counts: dict[tuple[str, bool], collections.Counter[int]] = collections.defaultdict(collections.Counter)

    def count(name: str) -> None:
        run: Any = getattr(Context, name)

        def counted(self: Context, *arguments: Any, **options: Any) -> Any:
            back = options.get("back", arguments[-1] is True)
            counts[name, back][self.rank] += 1
            return run(self, *arguments, **options)

        monkeypatch.setattr(Context, name, counted)

    count("send")
    count("receive")
    torch.manual_seed(0)
    of = causal_lm(7, 8, layers, "mamba", d_state=3, chunk_length=4)
    split_step(of, 2, *data(2), chunk_length=4)
    first, second = turns * bundles, (turns - 1) * bundles  # from the last chunk none
    assert counts["send", False] == counts["receive", True] == {0: first, 1: second}
    assert counts["receive", False] == counts["send", True] == {1: first, 0: second}


def test_layers_that_share_messages_and_learn_nothing_hand_gradients_on() -> None:
    torch.manual_seed(0)
    frozen = causal_lm(7, 8, 9, "mamba", d_state=3, chunk_length=4, checkpoint=True)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("layers.5" in name)
    split_step(frozen, 2, *data(2), chunk_length=4)


def test_a_unets_tiers_share_messages() -> None:
    bounds = torch.tensor([0, 3, 3, 17, LENGTH], dtype=torch.int32)
    spec = both_ways("bidirectional").spec
    assert spec is not None
    for pool, packed in (([2], False), ([2, 3], True)):
        backbone = {"name": "unet", "n_layers": 2, "pool": pool, "chunk_length": 4}
        unet = build_model(spec | {"backbone": backbone})
        split_step(unet, 2, *data(1 if packed else 2), bounds if packed else None, conditions=False, chunk_length=4)


def test_a_parameter_without_a_gradient_on_one_rank_counts_as_zeros_there() -> None:
    ranks = contexts(2)

    def on(rank: int) -> list[Tensor | None]:
        both, one, other, none = parameters = [torch.zeros(2, requires_grad=True) for _ in range(4)]
        none.requires_grad_(False)
        (both.sum() + (rank + 1) * (one if rank else other).sum()).backward()
        ranks[rank].sum_gradients(parameters)
        return [p.grad for p in parameters]

    for both, one, other, none in on_ranks(2, on):
        assert none is None
        assert [g.tolist() for g in (both, one, other)] == [[2, 2], [2, 2], [1, 1]]


def test_what_a_mixer_keeps_in_float64_is_sent_in_it() -> None:
    state = catalog()["mixers"].get("mamba3")(8).init_state(1)
    sent = {name: relay._kind(tensor, wide=False).dtype for name, tensor in state.tensors().items()}
    assert sent.pop("angle") == torch.float64
    assert set(sent.values()) == {torch.float32}


def both_ways(backbone: str, **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    pairs: dict[str, Any] = {"vocab_size": 7, "complement": [3, 2, 1, 0, 4, 5, 6]}
    strands = "rc_" if backbone == "reverse_complement" else ""
    table = pairs if strands else {"vocab_size": 7}
    return build_model(
        {
            "d_model": 8,
            "encoder": {"name": f"{strands}tokens", **table},
            "backbone": {"name": backbone, "n_layers": 2, **options},
            "mixer": {"name": "mamba", "d_state": 3},
            "head": {"name": f"{strands}lm", **table},
        }
    )


def test_sequences_that_are_read_both_ways_may_be_split() -> None:
    bounds = torch.tensor([0, 3, 3, 17, LENGTH], dtype=torch.int32)
    split_step(both_ways("bidirectional", combine="multiply"), 2, *data(2))
    split_step(both_ways("bidirectional", checkpoint=True, pattern=["mamba", "mamba+mlp"]), 3, *data(2))
    split_step(both_ways("bidirectional", shared=True), 4, *data(), bounds, conditions=False)
    split_step(both_ways("reverse_complement"), 2, *data(2))
    split_step(both_ways("reverse_complement", tie_projections=True), 3, *data(), bounds, conditions=False)
    split_step(
        both_ways("bidirectional", pattern=["attention", "mamba"], mlp=False), 3, *data(), bounds, conditions=False
    )


def test_a_unet_may_be_split_anywhere_in_its_windows() -> None:
    bounds = torch.tensor([0, 3, 3, 17, LENGTH], dtype=torch.int32)
    spec = both_ways("bidirectional").spec
    assert spec is not None
    for size, options, batch, packed, how in (
        (2, {}, 2, False, {"lengths": [7, 15]}),
        (3, {"pool": [2, 3]}, 1, True, {}),
        (2, {"chunk_length": 4}, 2, False, {"chunk_length": 4}),
    ):
        unet = build_model(spec | {"backbone": {"name": "unet", "n_layers": 1, "pool": [3], **options}})
        split_step(unet, size, *data(batch), bounds if packed else None, conditions=False, **how)


def test_a_unet_hands_on_its_states_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ranks work at the same time; what enters and what is left is as on one device."""
    bounds = torch.tensor([0, 3, 3, 17, LENGTH], dtype=torch.int32)
    spec = both_ways("bidirectional").spec
    assert spec is not None
    unet = build_model(spec | {"backbone": {"name": "unet", "n_layers": 1, "pool": [3, 2]}}).backbone
    x = torch.randn(1, LENGTH, 8)
    with torch.no_grad():
        _, begun = unet(torch.randn(4, 5, 8), return_state=True)
        y, final = unet(x, state=begun, cu_seqlens=bounds, return_state=True)
    sent, send, ranks = [0, 0, 0], Context.send, contexts(3)

    def counted(self: Context, *arguments: Any, **options: Any) -> None:
        sent[self.rank] += 1
        send(self, *arguments, **options)

    monkeypatch.setattr(Context, "send", counted)

    def on(rank: int) -> Any:
        part = ranks[rank].split(LENGTH, 1, bounds)
        entering = [state.select(torch.tensor(part.entering).long()) for state in begun]
        with part, torch.no_grad():
            return part, *unet(part.take(x), state=entering, cu_seqlens=part.cu_seqlens(), return_state=True)

    for part, own, states in on_ranks(3, on):
        close(own, part.take(y), "y")
        for mine, whole in zip(states, final, strict=True):
            for name, tensor in whole.tensors().items() if part.finished else ():
                close(mine.tensors()[name], tensor[part.finished], name)
    layers = len(unet.mixers()) + 2 * 2  # and each pooling on the way down and on the way up
    assert sent == [layers, layers, 0]


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "first"])
def test_heads_of_whole_sequences_pool_over_all_ranks(pooling: str) -> None:
    bounds = torch.tensor([0, 3, 3, 17, LENGTH], dtype=torch.int32)
    tokens, _ = data(2)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])
    spec = both_ways("reverse_complement").spec
    assert spec is not None
    head = {"name": "rc_classification", "n_classes": 3, "pooling": pooling}
    one, pairs = (
        build_model(both_ways("residual").spec | {"head": head | {"name": "classification"}}),
        build_model(spec | {"head": head}),
    )
    cases = [
        (one, 2, Batch(tokens, torch.tensor([2, 0]))),
        (one, 3, Batch(tokens, torch.tensor([1, -100]), mask=mask)),
        (pairs, 3, Batch(tokens[:1], torch.tensor([0, 1, 2, 1]), cu_seqlens=bounds)),
    ]
    for of, size, whole in cases:
        found = step(of, whole.inputs, whole.targets, mask=whole.mask, cu_seqlens=whole.cu_seqlens)
        copies, ranks = [copy.deepcopy(of) for _ in range(size)], contexts(size)

        def on(rank: int, whole: Batch = whole, copies: Any = copies, ranks: Any = ranks) -> Any:
            part = ranks[rank].split(LENGTH, len(whole.inputs), whole.cu_seqlens)
            mine = part.share(whole)
            with part:
                own = step(copies[rank], mine.inputs, mine.targets, mask=mine.mask, cu_seqlens=mine.cu_seqlens)
            ranks[rank].sum_gradients(copies[rank].parameters())
            return own

        for loss, gradients, logits in on_ranks(size, on):
            close(loss, found[0], "loss")
            close(logits, found[2], "logits")
            for name, gradient in found[1].items():
                close(gradients[name], gradient, name)


def test_layers_that_learn_nothing_hand_gradients_on() -> None:
    frozen = model()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    split_step(frozen, 2, *data(2))
    frozen.backbone.chunk_length = 4
    split_step(frozen, 2, *data(2), chunk_length=4)


def test_evaluation_needs_no_graph() -> None:
    one, (tokens, labels) = model(), data(2)
    ranks = contexts(2)
    with torch.no_grad():
        expected = one(tokens, labels, return_logits=True, return_state=True)

    def on(rank: int) -> None:
        part = ranks[rank].split(LENGTH, 2)
        with torch.no_grad(), part:
            out = one(part.take(tokens), part.take(labels), return_logits=True, return_state=True)
        ranks[rank].finish()
        close(out.loss, expected.loss, "loss")
        close(torch.cat(ranks[rank].gather(out.logits.transpose(0, 1))).transpose(0, 1), expected.logits, "logits")
        for state, whole in zip(out.state, expected.state, strict=True):
            close(torch.cat(ranks[rank].gather(state.ssm)), whole.ssm, "ssm")
        assert current() is None

    on_ranks(2, on)


def refused(of: SequenceModel, expected: str, *arguments: Any, split: Any = None, **options: Any) -> None:
    """By every rank alike, before any message."""
    for context in contexts(2):
        part = context.split(LENGTH, 1, **(split or {}))
        with part, pytest.raises(ConfigError, match=expected):
            of(*(part.take(argument) for argument in arguments), **options)


def test_what_needs_whole_sequences_is_refused_by_name() -> None:
    tokens, _ = data()
    spec: dict[str, Any] = {
        "d_model": 8,
        "encoder": {"name": "tokens", "vocab_size": 7},
        "backbone": {"name": "bidirectional", "n_layers": 1},
        "mixer": {"name": "mamba"},
        "head": {"name": "lm", "vocab_size": 7},
    }
    mask = torch.ones(1, LENGTH // 2, dtype=torch.bool)
    refused(build_model(spec), "Padded sequences cannot be read backwards", tokens, mask=mask)
    refused(build_model(spec), "in turn", tokens, split={"chunk_length": 4})
    unet = {"backbone": {"name": "unet", "pool": [2]}, "mixer": {"name": "attention"}}
    refused(build_model(spec | unet), "bounded state; Attention", tokens)
    refused(build_model(spec | {"backbone": {"name": "dna/codons"}}), "backbone CodonStack", tokens)
    classes = spec | {"backbone": {"name": "residual"}, "head": {"name": "forecast", "n_channels": 2, "horizon": 2}}
    refused(build_model(classes), "head ForecastHead", tokens)
    frames = classes | {
        "encoder": {"name": "dna/kmer", "k": 3, "stride": 3},
        "head": {"name": "classification", "n_classes": 2},
    }
    refused(build_model(frames), "encoder KmerEncoder", tokens)
    refused(model(), "must be packed", tokens, mask=mask, return_state=True)
    refused(causal_lm(7, 8, 1, "attention"), "bounded state; Attention", tokens, split={"chunk_length": 4})
    refused(model(chunk_length=4), "Split it with chunk_length=4", tokens)


def test_ranks_gather_states_where_handing_them_on_would_have_them_wait_longer() -> None:
    part = contexts(3)[0].split(LENGTH)
    for n_layers, mixer, expected in ((4, "mamba", True), (40, "mamba", False), (4, "rwkv4", False)):
        with torch.device("meta"):
            assert causal_lm(7, 8, n_layers, mixer).backbone._gathers(part) == expected
    one = model()
    one.backbone.context_states = "relayed"
    assert not one.backbone._gathers(part)
    split_step(one, 3, *data(2))
    attending = causal_lm(7, 8, 2, "mamba", pattern=["mamba", "attention"])
    attending.backbone.context_states = "gathered"
    refused(attending, "context_states: gathered needs .* Attention has others", data()[0])


def test_splits_that_cannot_be_are_refused() -> None:
    context = contexts(3)[0]
    with pytest.raises(
        ConfigError, match=r"2 positions cannot .* over 3 ranks.*backbone\.context_parallel\).*data\.length"
    ):
        context.split(2)
    with pytest.raises(ConfigError, match="9 together, not \\[4, 5, 1\\]"):
        context.split(9, lengths=[4, 5, 1])
    with pytest.raises(ConfigError, match="chunk_length must be positive and finite, not 0"):
        context.split(9, chunk_length=0)
    with pytest.raises(ConfigError, match="not both"):
        context.split(9, lengths=[3, 3, 3], chunk_length=2)
    with pytest.raises(ValueError, match="must rise from 0 to the length 9"):
        context.split(9, cu_seqlens=torch.tensor([0, 8]))
    part = contexts(2)[0].split(LENGTH)
    with part, pytest.raises(ValueError, match="11 positions of 1 stretches"):
        model()(data()[0])


def test_a_context_of_one_rank_is_of_a_mesh_and_changes_nothing() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        context = Context(init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "context"))["context"])
        tokens, labels = data()
        part = context.split(LENGTH, 1, chunk_length=4)
        with part:
            loss = model(chunk_length=4)(part.take(tokens), part.take(labels)).loss
        close(loss, model()(tokens, labels).loss, "loss")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_messages_that_may_wait_for_each_other_have_links_of_their_own(size: int) -> None:
    for rank in range(size):
        context = copy.copy(contexts(2)[0])
        context.size, context.rank, context._makes_links = size, rank, True
        context._links = {(back, colour): (back, colour) for back in (False, True) for colour in range(2 + size % 2)}
        before, after = (rank - 1) % size, (rank + 1) % size
        of = [
            context._link(before, rank, False),
            context._link(rank, after, False),
            context._link(after, rank, True),
            context._link(rank, before, True),
        ]
        assert len(set(of)) == 4
        # both ends of a link mean the same
        context.rank = after
        assert context._link(rank, after, False) == of[1]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_links_are_connected_without_a_wait_for_another(size: int) -> None:
    """Each is used by both of its ranks, which meet there."""
    meetings: dict[Any, threading.Barrier] = collections.defaultdict(lambda: threading.Barrier(2, timeout=5))
    met: list[Any] = []

    class Link:
        def __init__(self, key: tuple[bool, int], rank: int) -> None:
            self.key, self.rank = key, rank

        def send(self, tensors: Any, to: int, tag: int, sends: bool = True) -> Any:
            ends = (self.rank, to) if sends else (to, self.rank)
            with lock:
                meeting = meetings[self.key, ends]
                met.append((self.key[0], ends))
            meeting.wait()
            return type("Work", (), {"wait": lambda self: None})()

        def recv(self, tensors: Any, source: int, tag: int) -> Any:
            return self.send(tensors, source, tag, sends=False)

    lock = threading.Lock()

    def on(rank: int) -> None:
        context = copy.copy(contexts(2)[0])
        context.size, context.rank = size, rank
        keys = [(back, colour) for back in (False, True) for colour in range(2 + size % 2)]
        context._links = {key: Link(key, rank) for key in keys}
        context._connect(torch.device("cpu"))

    on_ranks(size, on)
    ring = [(rank, (rank + 1) % size) for rank in range(size)]
    both = [(False, ends) for ends in ring] + [(True, ends[::-1]) for ends in ring]
    assert sorted(met) == sorted(2 * both)


def test_a_batch_is_shared_with_its_conditions_and_its_units() -> None:
    tokens, labels = data()
    bounds = torch.tensor([0, 3, 3, 17, LENGTH], dtype=torch.int32)
    whole = Batch(tokens, labels, cu_seqlens=bounds, condition=torch.arange(4), n_units=torch.tensor([9]))
    first, second = (context.split(LENGTH, 1, bounds).share(whole) for context in contexts(2))
    assert first.cu_seqlens is not None
    assert first.condition is not None
    assert second.condition is not None
    assert first.cu_seqlens.tolist() == [0, 3, 3, 11]
    assert (first.condition.tolist(), second.condition.tolist()) == ([0, 1, 2], [2, 3])
    assert [int(one.n_units.sum()) for one in (first, second) if one.n_units is not None] == [9, 0]
    assert int(first.n_targets + second.n_targets) == int(whole.n_targets)
    padded = Batch(tokens, labels, mask=torch.ones(1, LENGTH, dtype=torch.bool), condition=torch.tensor([3]))
    part = contexts(2)[1].split(LENGTH).share(padded)
    assert part.condition is not None
    assert part.mask is not None
    assert part.condition.tolist() == [3]
    assert part.mask.shape == part.inputs.shape == (1, 11)
