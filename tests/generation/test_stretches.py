"""Many positions by one kernel: the tokens and states of steps that are taken one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mambaseq.conditions import row as row_of
from mambaseq.generation import decode, generate, loops
from mambaseq.generation.checks import NotFinite
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.sampling import Draws
from mambaseq.generation.stretches import Stretches, outline, weights_read, why_not
from mambaseq.models import SequenceModel, build_model
from mambaseq.ops.decoding import stretch
from mambaseq.ops.eager import only_reference

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device, and there is none here")
pytestmark = pytest.mark.usefixtures("full_precision")  # steps of several sequences are products of matrices


CONDITIONS = {"n_conditions": 5, "condition_sizes": [2, 3], "condition_means": [1.0], "condition_stds": [2.0]}
GIVEN = [row_of([1, 0], [4.5]), row_of([0, 2], [None]), row_of([None, 1], [-1.0])]


def model_of(
    backbone: dict[str, Any], mixer: dict[str, Any], vocabulary: int = 50, conditions: bool = False
) -> SequenceModel:
    torch.manual_seed(0)
    model = build_model(
        {
            "d_model": 36,
            "encoder": {"name": "tokens", "vocab_size": vocabulary, **(CONDITIONS if conditions else {})},
            "backbone": backbone,
            "mixer": mixer,
            "head": {"name": "lm", "vocab_size": vocabulary},
        }
    ).eval()
    with torch.no_grad():
        for value in model.parameters():  # biases and norms that do something
            if value.ndim == 1:
                value += 0.1 * torch.randn_like(value)
        model.head.linear.weight *= 20  # type: ignore[union-attr, operator]
    return model


RESIDUAL: dict[str, Any] = {"name": "residual", "n_layers": 2}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lti": (RESIDUAL, {"name": "mamba", "lti": True, "d_state": 20}),
    "lti, real": (
        RESIDUAL,
        {
            "name": "mamba",
            "lti": True,
            "lti_complex": False,
            "d_state": 5,
            "bias": True,
            "d_conv": 2,
            "conv_bias": False,
        },
    ),
    "selective": (RESIDUAL, {"name": "mamba", "d_state": 20, "dt_rank": 8, "bias": True}),
    "selective, odd rank": (RESIDUAL, {"name": "mamba", "d_state": 3, "dt_rank": 6}),
    "selective, complex": (RESIDUAL, {"name": "mamba", "d_state": 3, "dt_rank": 4, "complex": True}),
    "s4d": ({**RESIDUAL, "mlp": True}, {"name": "s4d", "d_state": 40}),
    "s4d, bilinear": (RESIDUAL, {"name": "s4d", "d_state": 3, "discretization": "bilinear"}),
    "unet": ({"name": "unet", "n_layers": 1, "pool": [3, 2]}, {"name": "s4d", "d_state": 8}),
    "unet, wide": (
        {"name": "unet", "n_layers": 2, "pool": [4], "expand": 3},
        {"name": "mamba", "lti": True, "d_state": 70},
    ),
}


ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("begun", "batch"), [(1, 1), (17, 3)])
def test_stretches_equal_steps(kind: str, begun: int, batch: int, device: str) -> None:
    """Greedy tokens, and every state, from a state anywhere in its windows; in two stretches."""
    model = model_of(*MODELS[kind], conditions=True).to(device)
    reason = why_not(model, batch, 0, 1.0)
    if device == "cpu" and kind == "selective, complex":
        assert reason == "the kernel on a CPU does not know complex selective systems"
        return
    assert reason is None
    prompt = torch.randint(0, 50, (batch, begun), device=device)
    condition = torch.tensor(GIVEN, device=device)[:batch]
    with torch.no_grad():
        _, states = model.backbone(model.encoder(prompt, condition), return_state=True)
    states = [state.map(torch.Tensor.contiguous) for state in states]
    own, token, expected = copy.deepcopy(states), prompt[:, -1], []
    for _ in range(40):
        token = model.step_(token, states, condition).argmax(-1)
        expected.append(token)
    first, failed = Stretches(model, own, condition, batch).run(prompt[:, -1], 25, 0.0, None)
    second, _ = Stretches(model, own, condition, batch).run(first[:, -1], 15, 0.0, None)
    assert torch.equal(torch.cat([first, second], 1), torch.stack(expected, 1))
    assert not failed.item()
    for one, other in zip(own, states, strict=True):
        for name, value in one.tensors().items():
            wanted = other.tensors()[name]
            assert (value - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp(min=1e-6), name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["lti, real", "selective", "selective, complex", "s4d", "unet"])
def test_a_sequence_among_many_is_what_it_is_alone(kind: str) -> None:
    """To the last bit, tokens and states, however many sequences a warp has a row of."""
    model = model_of(*MODELS[kind]).cuda()
    batch = 70
    token = torch.arange(batch, device="cuda") % 50
    uniforms = torch.rand(batch, 30, dtype=torch.float64, device="cuda")
    together = model.init_state(batch)
    stretches = Stretches(model, together, None, batch)
    parts = [stretches.run(token, 20, 0.9, uniforms[:, :20])[0]]
    parts.append(stretches.run(parts[0][:, -1], 10, 0.9, uniforms[:, 20:])[0])
    found = torch.cat(parts, 1)
    for row in (0, 7, 33, 69):
        state = model.init_state(1)
        alone, _ = Stretches(model, state, None, 1).run(token[row : row + 1], 30, 0.9, uniforms[row : row + 1])
        assert torch.equal(alone[0], found[row])
        for one, other in zip(state, together, strict=True):
            for name, value in one.tensors().items():
                assert torch.equal(value[0], other.tensors()[name][row]), name


FILTERS: list[dict[str, Any]] = [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_drawn_tokens_are_those_of_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_WORTH_A_KERNEL", 1)
    model = model_of(*MODELS["lti"], vocabulary=301).to(device)  # odd: the last number of a vector has no neighbour
    prompt = torch.randint(0, 300, (1, 5), device=device)
    n = 600 if device == "cuda" else 60
    for settings in ({"temperature": 0.8}, {"temperature": 1e-30}, {"temperature": 0.0}, *FILTERS):
        if settings in FILTERS and device == "cuda":
            continue
        one, other = (generate(model, prompt, n, seed=3, cuda_graph=fast, **settings) for fast in (True, False))
        same = (one == other).long().cumprod(1).sum()
        assert same == one.shape[1], f"{settings}: other tokens after {same}"


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("kind", ["unet", "lti"])
def test_a_clip_does_not_depend_on_how_many_there_are(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_WORTH_A_KERNEL", 1)
    monkeypatch.setattr(loops, "_STRETCH", 16)
    model = model_of(*MODELS[kind], conditions=True).to(device)
    prompt, condition = torch.randint(0, 50, (3, 6), device=device), torch.tensor(GIVEN, device=device)
    together = generate(model, prompt, 50, seed=3, condition=condition, samples=2).view(3, 2, -1)
    for row in range(3):
        alone = generate(model, prompt[row : row + 1], 50, seed=3, condition=condition[row : row + 1])
        assert torch.equal(alone[0], together[row, 0])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_stretches_end_with_a_stop_token_and_tell_of_numbers_that_are_none(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_WORTH_A_KERNEL", 1)
    monkeypatch.setattr(loops, "_STRETCH", 8)
    model = model_of(*MODELS["s4d"]).to(device)
    prompt = torch.randint(0, 50, (1, 5), device=device)
    whole = generate(model, prompt, 60, seed=3)
    stop = int(whole[0, 45])
    first = whole[0, 5:].tolist().index(stop)
    stopped = generate(model, prompt, 60, seed=3, stop_ids=[stop])
    assert stopped.tolist() == whole[:, : 5 + first + 1].tolist()
    several = generate(model, prompt, 60, seed=3, stop_ids=[stop], samples=3)
    endless = generate(model, prompt, 60, seed=3, samples=3)
    for row, free in zip(several[:, 5:].tolist(), endless[:, 5:].tolist(), strict=True):
        at = row.index(stop) if stop in row else len(row)
        assert row[:at] == free[:at]
        assert set(row[at:]) <= {stop}
    assert several.shape[1] < 65 or (several[:, -1] != stop).any()
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = float("nan")  # type: ignore[index, operator, union-attr]
    with pytest.raises(NotFinite):
        generate(model, prompt, 60, seed=3)


def test_what_the_kernel_does_not_run_is_told() -> None:
    plain = model_of(RESIDUAL, {"name": "mamba", "selective_B": False})
    assert "does not know Mamba without selection" in str(why_not(plain, 1, 0, 1.0))
    long = [model_of(RESIDUAL, {"name": "mamba", "lti": True, "d_state": 2, "d_conv": n}) for n in (33, 34)]
    assert [why_not(model, 1, 0, 1.0) for model in long] == [None, "a convolution is longer than 33"]
    with only_reference():
        assert "only PyTorch's operators" in str(why_not(model_of(*MODELS["lti"]), 1, 0, 1.0))
    if CUDA:
        lti = model_of(*MODELS["lti"]).cuda()
        assert why_not(lti, 64, 0, 1.0) is None
        assert "so many sequences" in str(why_not(lti, 10**6, 0, 1.0))
        assert "top_k" in str(why_not(lti, 1, 5, 1.0))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "selective, complex"])
def test_the_outline_has_the_sizes_of_the_phases(kind: str) -> None:
    model = model_of(*MODELS[kind])
    made = Stretches(model, model.init_state(1), None)._phases
    sizes = [sorted((p.kind, p.rows, p.cols, p.held_cols, p.n_states) for p in ps) for ps in (outline(model), made)]
    assert sizes[0] == sizes[1]
    assert outline(model)[-1][:4] == made[-1][:4]


def test_a_block_has_as_many_sequences_as_fit_into_its_memory() -> None:
    """Of 32 numbers, 100 selective layers: 196,064 bytes for 8 sequences; of 64 numbers, 64 layers: 117,216 for one."""
    layer = [stretch.Phase(stretch.CONV, 0, 64, 32), stretch.Phase(stretch.SCAN, 0, 64, 4, held_cols=36, n_states=8)]
    layer += [stretch.Phase(stretch.LINEAR, 0, 36, 64), stretch.Phase(stretch.OUT, 0, 32, 64)]
    last = stretch.Phase(stretch.LINEAR, 0, 256, 32)
    for n_layers, memory, sequences in ((100, 232_448, 8), (20, 101_376, 8), (100, 190_000, 4), (100, 185_000, 2)):
        phases = layer * n_layers + [last]
        assert stretch.Shares.of(phases, 64, 132, memory).sequences == sequences
        assert stretch.why_not(phases, 64, 132, memory) is None
    refused = stretch.why_not(layer * 100 + [last], 64, 132, 101_376)
    assert refused is not None
    assert "shared memory, and this GPU's have 101,376" in refused


def test_a_small_vocabulary_leaves_no_gpu_idle() -> None:
    """Each block has a row of the logits: 16 of 132 multiprocessors would have all of a sequence."""
    wide = stretch.Phase(stretch.LINEAR, 0, 512, 256)
    said = lambda vocabulary, batch: stretch.why_not(  # noqa: E731
        [wide, stretch.Phase(stretch.LINEAR, 0, vocabulary, 256)], batch, 132, 232_448
    )
    assert said(16, 1) == said(16, 4) == "a vocabulary of 16 leaves most of the GPU idle"
    assert said(256, 1) is said(50, 1) is said(16, 8) is said(16, 64) is None


def test_weights_read_a_position() -> None:
    """A coarser tier's are read once a window, and one row of what goes up from it each time."""
    model = model_of({"name": "unet", "n_layers": 1, "pool": [4], "expand": 2}, {"name": "s4d", "d_state": 2})
    top = model.backbone.top  # type: ignore[union-attr]
    count = lambda part: sum(value.numel() for value in part.parameters())  # noqa: E731
    assert weights_read(model) == count(top.down) + count(top.up) + (count(top.pool) + count(top.inner.down)) // 4


def test_draws_for_many_steps_are_those_of_each() -> None:
    prompt = torch.randint(0, 50, (2, 4))
    many, each = (Draws(7, Prompts.of(prompt), None, 3, None, "cpu") for _ in range(2))
    expected = torch.stack([each.next() for _ in range(200)])
    found = [many.next()[None] for _ in range(5)]
    found += [many.many(70), many.next()[None], many.next()[None], many.many(1), many.many(100)]
    found += [many.next()[None] for _ in range(22)]
    assert torch.equal(torch.cat(found), expected)
