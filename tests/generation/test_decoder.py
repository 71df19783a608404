"""Steps of a model with its state: as they are, and replayed from a CUDA graph."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambaseq.domain import catalog
from mambaseq.generation import Decoder, generate, loops, read_graphs
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import prefill
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.ops.decoding import layer as steps
from mambaseq.ops.decoding import rows
from mambaseq.ops.gpu import nvrtc

VOCABULARY = 29
MIXERS = [
    ("mamba", {}),
    ("mamba", {"d_state": 20, "d_conv": 2}),
    ("mamba", {"lti": True}),
    ("mamba", {"selective_B": False, "complex": True}),
    ("s4d", {}),
    ("h3", {}),
    ("rwkv4", {}),
    ("mamba2", {"d_state": 16}),
]


def make(mixer: str = "mamba", d_model: int = 16, **options: Any) -> SequenceModel:
    """A model whose logits are far enough apart for rounding to change no token."""
    torch.manual_seed(0)
    model = causal_lm(vocab_size=VOCABULARY, d_model=d_model, n_layers=2, mixer=mixer, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def on_gpu(device: torch.device, mixer: str = "mamba", **options: Any) -> tuple[SequenceModel, Tensor]:
    model = make(mixer, d_model=64, **options).to(device)
    return model, torch.randint(0, VOCABULARY, (3, 7)).to(device)


def run(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits `(batch, length, vocab_size)` of tokens `(batch, length)`."""
    return torch.stack([decoder.step(token).clone() for token in tokens.unbind(1)], 1)


@pytest.mark.parametrize("mixer", ["mamba", "s4d"])
def test_steps_equal_the_whole(mixer: str) -> None:
    model, tokens = make(mixer), torch.randint(0, VOCABULARY, (2, 9))
    decoder = Decoder(model, model.init_state(2))
    torch.testing.assert_close(run(decoder, tokens), model(tokens).logits.detach())
    assert not decoder.captured
    last = model(tokens, return_state=True).state
    for layer, expected in zip(decoder.state, last, strict=True):
        for tensor, whole in zip(layer.tensors().values(), expected.tensors().values(), strict=True):
            torch.testing.assert_close(tensor, whole.detach())


@pytest.mark.gpu
def test_the_model_may_warn(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = on_gpu(cuda)
    step = SequenceModel.step_

    def warning(*args: Any) -> Tensor:
        warnings.warn("from the model", UserWarning, stacklevel=1)
        return step(*args)

    monkeypatch.setattr(SequenceModel, "step_", warning)
    decoder = Decoder(model, model.init_state(3))
    with pytest.warns(UserWarning, match="from the model"):
        decoder.step(tokens[:, 0])
    with pytest.warns(UserWarning, match="from the model"):
        decoder.step(tokens[:, 1])
    assert decoder.captured


@pytest.mark.parametrize("max_new_tokens", [1, 8, 11, 60])
def test_looking_rarely_whether_all_have_ended_changes_nothing(
    max_new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = make(), torch.zeros(3, 1, dtype=torch.long)
    results = []
    for tokens_a_look in (1, 8):
        monkeypatch.setitem(loops._TOKENS_A_LOOK, "cpu", tokens_a_look)
        results.append([generate(model, prompt, max_new_tokens, seed=s, stop_ids={2, 5}) for s in range(2)])
    for every, rare in zip(*results, strict=True):
        assert torch.equal(every, rare)


@pytest.mark.gpu
@pytest.mark.parametrize(("mixer", "options"), MIXERS)
def test_replayed_steps_equal_the_whole(cuda: torch.device, mixer: str, options: dict) -> None:
    model, _ = on_gpu(cuda, mixer, **options)
    tokens = torch.randint(0, VOCABULARY, (3, 12)).to(cuda)
    decoder = Decoder(model, model.init_state(3))
    with torch.no_grad():
        torch.testing.assert_close(run(decoder, tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert decoder.captured


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mixer", "options"), MIXERS)
def test_a_graph_gives_the_tokens_of_the_loop(
    cuda: torch.device, mixer: str, options: dict, dtype: torch.dtype
) -> None:
    model, prompt = on_gpu(cuda, mixer, n_conditions=2, **options)
    model, condition = model.to(dtype), torch.tensor([0, 1, 1]).to(cuda)
    for settings in (
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 3, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
        {"seed": 4, "stop_ids": {2}},
    ):
        graph, loop = (
            generate(model, prompt, 40, condition=condition, cuda_graph=wanted, **settings) for wanted in (True, False)
        )
        assert torch.equal(graph, loop)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_steps_by_fewer_kernels_are_steps(
    cuda: torch.device, mixer: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(mixer, d_model=64).to(cuda, torch.bfloat16)
    tokens = torch.randint(0, VOCABULARY, (batch, 12)).to(cuda)
    logits = []
    for on in (False, True):
        monkeypatch.setattr(steps.tuning, "on", on)
        monkeypatch.setattr(rows.tuning, "untried", on)
        decoder = Decoder(model, model.init_state(batch))
        logits.append(run(decoder, tokens))
        assert decoder.captured
    torch.testing.assert_close(*logits, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(("mixer", "options"), [("mamba", {}), ("mamba2", {"d_state": 16}), ("s4d", {})])
def test_a_prompt_of_a_known_shape_is_read_by_a_graph(cuda: torch.device, mixer: str, options: dict) -> None:
    model, _ = on_gpu(cuda, mixer, **options)
    for turn in range(6):
        prompt = torch.randint(0, VOCABULARY, (3, 50), device=cuda)
        plain, replayed = (prefill(model, Prompts.of(prompt), None, cuda_graph=g) for g in (False, True))
        torch.testing.assert_close(replayed[1], plain[1])
        for a, b in zip(replayed[0], plain[0], strict=True):
            torch.testing.assert_close(a.tensors(), b.tensors())
        if turn == 4:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
    assert len(read_graphs._known[model].graphs) == 1
    for _ in range(4):  # a state before it makes another graph
        given = [layer.clone() for layer in plain[0]]
        again, replayed = (prefill(model, Prompts.of(prompt), None, given, cuda_graph=g) for g in (False, True))
        torch.testing.assert_close(replayed[1], again[1])
    assert len(read_graphs._known[model].graphs) == 2


def replaced(model: SequenceModel) -> None:
    norm: Any = model.backbone.norm_f
    norm.weight = torch.nn.Parameter(norm.weight * 2)


def hooked(model: SequenceModel) -> None:
    model.head.register_forward_hook(lambda *_: None)


CHANGES = [replaced, hooked, lambda model: model.to(torch.bfloat16)]


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_is_read_as_it_is(cuda: torch.device, change: Callable[[SequenceModel], Any]) -> None:
    model, prompt = on_gpu(cuda)
    for _ in range(4):
        prefill(model, Prompts.of(prompt), None)
    assert read_graphs._known[model].graphs
    change(model)
    torch.cuda.empty_cache()
    plain, found = (prefill(model, Prompts.of(prompt), None, cuda_graph=g) for g in (False, True))
    torch.testing.assert_close(found[1], plain[1])
    assert not read_graphs._known[model].graphs


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_graph_is_of_the_model_that_was_captured(
    change: Callable[[SequenceModel], Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked at while it runs, and before that where it would read memory that is gone."""
    model, ids = make(), torch.zeros(1, 5, dtype=torch.int64)
    told = [layer.clone() for layer in model.init_state(1)], torch.zeros(1, VOCABULARY)
    weights = [read_graphs.StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    graph = read_graphs._Graph(None, ids, None, None, *told, weights)  # type: ignore[arg-type]
    replays: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(read_graphs, "can_replay", lambda token: True)
    monkeypatch.setattr(
        read_graphs,
        "can_capture",
        lambda model, state, token, modules: not any(module._forward_hooks for module in modules),
    )
    monkeypatch.setattr(read_graphs, "_replayed", lambda *arguments: replays.append(arguments) or told)
    assert read_graphs.read(model, ids, None, None) is None
    (key,) = read_graphs._known[model].seen
    read_graphs._known[model].graphs[key] = graph
    if change is None:
        assert read_graphs.read(model, ids, None, None) is told
        return
    change(model)
    assert read_graphs.read(model, ids, None, None) is None
    assert len(replays) == (change is hooked)  # the others' weights are gone
    assert not read_graphs._known[model].graphs


@pytest.mark.gpu
def test_a_graph_sees_weights_that_change_in_place(cuda: torch.device) -> None:
    model, prompt = on_gpu(cuda)
    decoder, plain = Decoder(model, model.init_state(3)), Decoder(model, model.init_state(3), cuda_graph=False)
    for _ in range(3):
        torch.testing.assert_close(run(decoder, prompt), run(plain, prompt))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert decoder.captured
    assert not plain.captured


@pytest.mark.gpu
def test_hooks_are_called_for_every_token(cuda: torch.device) -> None:
    model, prompt = on_gpu(cuda)
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    generate(model, prompt, 20, temperature=0)
    assert len(calls) == 20


def spoil(model: SequenceModel, kind: str) -> None:
    """Make the first layer's step one that cannot be captured."""
    mixer: Any = model.backbone.mixers()[0]
    step_ = mixer.step_

    def waits(x: Tensor, state: Any) -> Tensor:
        return step_(x, state) * float(x.isfinite().all())

    def waits_unseen(x: Tensor, state: Any) -> Tensor:
        torch.cuda.synchronize()
        return step_(x, state)

    def replaces_the_state(x: Tensor, state: Any) -> Tensor:
        state.ssm = state.ssm.clone()
        return step_(x, state)

    mixer.step_ = {"waits": waits, "waits unseen": waits_unseen, "replaces the state": replaces_the_state}[kind]


@pytest.mark.gpu
def test_a_step_that_waits_is_not_captured(cuda: torch.device) -> None:
    model, prompt = on_gpu(cuda)
    expected = generate(model, prompt, 20, temperature=0, cuda_graph=False)
    spoil(model, "waits")
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: a step of the model waits"):
        assert torch.equal(generate(model, prompt, 20, temperature=0), expected)


@pytest.mark.gpu
def test_a_state_that_is_replaced_is_not_captured(cuda: torch.device) -> None:
    model, prompt = on_gpu(cuda)
    expected = generate(model, prompt, 20, temperature=0, cuda_graph=False)
    spoil(model, "replaces the state")
    assert torch.equal(generate(model, prompt, 20, temperature=0), expected)


def check_a_failed_capture() -> None:
    model, prompt = on_gpu(torch.device("cuda"))
    expected = generate(model, prompt, 20, seed=1, cuda_graph=False)
    spoil(model, "waits unseen")
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        assert torch.equal(generate(model, prompt, 20, seed=1), expected)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    generate(model, prompt, 2)  # by PyTorch's own generator
    sound, _ = on_gpu(torch.device("cuda"))
    decoder = Decoder(sound, sound.init_state(3))
    run(decoder, prompt)
    assert decoder.captured


@pytest.mark.gpu
def test_after_a_failed_capture_decoding_goes_on(cuda: torch.device) -> None:
    """In a process of its own: PyTorch does not clean up after a failed capture."""
    code = f"import sys; sys.path = {sys.path!r}; import test_decoder; test_decoder.check_a_failed_capture()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


class _Operations(TorchDispatchMode):
    """The names of the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ("new_empty", "empty"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_step_is_its_products_and_two_kernels(
    cuda: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows.tuning, "untried", True)
    mixer = catalog()["mixers"].get("mamba")(64).to(cuda, dtype)
    state, x = mixer.init_state(4), torch.randn(4, 1, 64, device=cuda, dtype=dtype)
    with _Operations() as operations:
        mixer.step_(x, state)
    joined = dtype == torch.bfloat16 and torch.cuda.get_device_capability(cuda) >= (9, 0) and nvrtc.why_not() is None
    # in_proj, x_proj, where it is not one kernel with the scan dt_proj, and out_proj: nothing is cast or copied
    assert operations.names == ["mm"] * (3 if joined else 4)


@pytest.mark.gpu
@pytest.mark.parametrize(("mixer", "options"), MIXERS)
def test_a_given_state_is_not_changed_and_forks_are_apart(cuda: torch.device, mixer: str, options: dict) -> None:
    model, prompt = on_gpu(cuda, mixer, **options)
    with torch.no_grad():
        state = model(prompt, return_state=True).state
        before = [layer.clone() for layer in state]
        fork = [layer.clone() for layer in state]
        model(prompt[:, :1], state=state, return_state=True)
        run(Decoder(model, fork), prompt)
    for now, then, forked in zip(state, before, fork, strict=True):
        # some of the tensors of a state may stay as they are, running maxima say, but not all; an MLP has none
        unchanged = []
        for a, b, c in zip(*(layer.tensors().values() for layer in (now, then, forked)), strict=True):
            assert torch.equal(a, b)
            unchanged.append(torch.equal(a, c))
        assert not unchanged or not all(unchanged)
