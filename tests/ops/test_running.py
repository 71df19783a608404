"""How the ops run: compiled, in several threads, twice, in a fork; what dispatch says of them."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from agreement import Draw, poisoned_memory
from torch import Tensor

from mambaseq.errors import UserError
from mambaseq.generation import generate
from mambaseq.models import causal_lm
from mambaseq.ops import OPS, causal_conv, dispatch, lti_scan, selective_scan
from mambaseq.ops.cpu import flat, threads
from mambaseq.ops.dispatch import Backend, Op, outputs_and_gradients
from mambaseq.ops.lti import cpu as lti_cpu
from mambaseq.ops.selective_scan.arguments import ScanArguments

CPU = torch.device("cpu")
REGISTERED = [("selective_scan", "cpu"), ("selective_scan", "torch"), ("causal_conv", "cpu"), ("lti_scan", "cpu")]


def backend_of(op: str, name: str) -> Backend:
    return next(backend for backend in OPS[op].backends if backend.name == name)


def samples(op: str, name: str) -> Iterator[tuple[str, Any]]:
    for label, arguments in OPS[op].samples(CPU):
        if backend_of(op, name).why_not(arguments) is None:
            yield label, arguments


def large(batch: int = 3, length: int = 300, channels: int = 200) -> ScanArguments:
    """Enough work for several threads; 4 blocks of channels."""
    draw = Draw(f"large {batch}")
    return ScanArguments(
        x=draw.normal(batch, length, channels),
        dt=draw.normal(batch, length, channels),
        A=-torch.arange(1.0, 9).repeat(channels, 1),
        B=draw.normal(batch, length, 8),
        C=draw.normal(batch, length, 8),
        D=draw.normal(channels),
        z=draw.normal(batch, length, channels),
        dt_bias=draw.normal(channels) - 4,
        dt_softplus=True,
    )


@pytest.mark.parametrize("op", OPS)
def test_check_passes_on_this_machine(op: str) -> None:
    for name, error in dispatch.check(OPS[op]).items():
        assert isinstance(error, str) or error < 1e-5, name


def test_a_backend_that_cannot_run_is_told_to_the_user_with_the_remedy() -> None:
    """As of a model that was trained on a GPU and is read without one."""
    model = causal_lm(5, 8, 1, "kda", backend="fla")
    with pytest.raises(
        UserError, match=r"'fla' cannot run .*\. Leave backend out for the fastest that can: null in a configuration"
    ):
        generate(model, torch.zeros(1, 3, dtype=torch.long), 2)


def test_check_sees_a_wrong_gradient() -> None:
    op = OPS["causal_conv"]

    def wrong(arguments: Any) -> tuple[Tensor, Tensor]:
        y, final = op.backends[-1].run(arguments)
        return y, final.detach() + 0 * final

    found = dispatch.check(op._replace(backends=(Backend("wrong", wrong, dispatch.never), op.backends[-1])))
    assert found["reference"] < 1e-6 < 1e-2 < found["wrong"]


def test_check_sees_not_a_number() -> None:
    op = OPS["causal_conv"]

    def broken(arguments: Any) -> tuple[Tensor, Tensor]:
        y, final = op.backends[-1].run(arguments)
        return y, final * float("nan")

    found = dispatch.check(op._replace(backends=(Backend("broken", broken, dispatch.never), op.backends[-1])))
    assert found["broken"] == float("inf")


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.half is not None])
def test_a_reference_is_given_the_rounded_cotangents(op: str) -> None:
    """What is float32 beside half precision has float32's digits: it was off by up to 5e-3, since the reference had
    cotangents that the backend was given rounded."""
    half = OPS[op].half
    assert half is not None
    for _, arguments in OPS[op].samples(CPU):
        rounded = half(arguments)
        actual = outputs_and_gradients(backend_of(op, "torch"), rounded)
        dtypes = [a.dtype for a in actual]
        expected = outputs_and_gradients(backend_of(op, "reference"), rounded, double=True, like=dtypes)
        errors = [dispatch.relative_rms_error(a, e) for a, e in zip(actual, expected, strict=True)]
        assert max(error for error, dtype in zip(errors, dtypes, strict=True) if dtype == torch.float32) < 5e-6
        assert max(errors) < 4e-3


def test_explain_names_the_one_that_runs() -> None:
    reasons = dict(dispatch.explain(OPS["selective_scan"], large()))
    assert next(name for name, reason in reasons.items() if reason is None) == "cpu"
    assert "CUDA" in (reasons["mamba_ssm"] or "")
    wide = large()._replace(x=large().x.double())
    assert "float64" in (dict(dispatch.explain(OPS["selective_scan"], wide))["cpu"] or "")


def test_when_none_can_run_it_says_why() -> None:
    op = Op("nothing", (Backend("a", dispatch.never, lambda _: "it is Sunday"),), lambda _: iter(()))
    with pytest.raises(ValueError, match="a: it is Sunday"):
        dispatch.run(op, None)


@pytest.mark.parametrize(("op", "name"), REGISTERED)
def test_inputs_are_left_alone(op: str, name: str) -> None:
    for _, arguments in samples(op, name):
        before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
        outputs_and_gradients(backend_of(op, name), arguments)
        for was, now in zip(before, arguments, strict=True):
            assert torch.equal(was, now) if isinstance(was, Tensor) else was == now


def calls() -> dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]]:
    a = large(1, 70, 20)
    scan = {name: getattr(a, name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")}
    cu_seqlens = torch.tensor([0, 0, 33, 70], dtype=torch.int32)
    state = Draw("state").normal(3, 20, 8)
    channel = {name: Draw(name).normal(20, 8) for name in "BC"}
    lti = {"x": a.x, "dt": torch.full((20,), 0.1), "A": torch.complex(a.A, 3 * a.A.flip(1))}
    conv = {"x": a.x, "weight": Draw("w").normal(20, 4), "bias": Draw("b").normal(20), "activation": "silu"}
    return {
        "selective_scan": (selective_scan, scan),
        "selective_scan, packed": (selective_scan, scan | {"cu_seqlens": cu_seqlens, "initial_state": state}),
        "selective_scan, torch": (selective_scan, scan | {"backend": "torch", "reverse": True}),
        "selective_scan, constant": (selective_scan, scan | channel),
        "causal_conv": (causal_conv, conv),
        "causal_conv, packed": (causal_conv, conv | {"cu_seqlens": cu_seqlens}),
        "lti_scan, scan": (lti_scan, lti | channel | {"mode": "scan"}),
        "lti_scan, fft": (lti_scan, lti | channel | {"mode": "fft"}),
        "lti_scan, bilinear": (lti_scan, lti | channel | {"discretization": "bilinear"}),
    }


CALLS = calls()


def run_with_gradients(call: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
    leaves = [v.requires_grad_() for v in given.values() if isinstance(v, Tensor) and v.dtype != torch.int32]
    y, final = call(**given)
    loss = (y * Draw("dy").normal(*y.shape)).sum() + (final.abs() ** 2).sum()
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("case", CALLS)
def test_compiled_equals_eager(case: str) -> None:
    call, given = CALLS[case]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for eager, other in zip(run_with_gradients(call, given), run_with_gradients(compiled, given), strict=True):
        torch.testing.assert_close(other, eager)


class _Layer(torch.nn.Module):
    def forward(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x, _ = causal_conv(x, A[:, :4], activation="silu")
        return selective_scan(x, x * x, A, B, B)[0] + lti_scan(x, A[:, 0].exp(), A, A, A)[0]


def test_export() -> None:
    x, A, B = Draw("export").normal(2, 30, 5), -Draw("A").uniform(0, 1, 5, 6), Draw("B").normal(2, 30, 6)
    program = torch.export.export(_Layer(), (x, A, B))
    torch.testing.assert_close(program.module()(x, A, B), _Layer()(x, A, B))


def test_inference_mode() -> None:
    x, A, B = Draw("export").normal(2, 30, 5), -Draw("A").uniform(0, 1, 5, 6), Draw("B").normal(2, 30, 6)
    expected = _Layer()(x, A, B)
    with torch.inference_mode():
        assert torch.equal(_Layer()(x.clone(), A, B), expected)


def test_memory_is_poisoned_where_the_backends_ask_for_it() -> None:
    with poisoned_memory():
        asked = [torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(3)]
        assert all(value.isnan().all() for value in asked)
        assert np.isnan(flat.scratch(3)).all()


@pytest.mark.parametrize(("op", "name"), REGISTERED)
def test_registration_with_torch_library(op: str, name: str) -> None:
    registered = getattr(torch.ops.mambaseq, f"{op}_{name}")
    for _, arguments in samples(op, name):
        if op == "lti_scan":
            x, log_decay, *rest = arguments[:7]
            wide = arguments.state_dtype
            values = (
                x,
                *(v.to(wide) if isinstance(v, Tensor) and v.ndim == 2 else v for v in (log_decay.exp(), *rest)),
            )
        else:
            values = arguments[:12]
        given = tuple(
            v.detach().requires_grad_() if isinstance(v, Tensor) and v.dtype != torch.int32 else v for v in values
        )
        torch.library.opcheck(registered.default, given)


@pytest.mark.parametrize(("op", "name"), [("selective_scan", "cpu"), ("causal_conv", "cpu"), ("lti_scan", "cpu")])
def test_twice_and_on_any_number_of_threads_the_same_bits(op: str, name: str) -> None:
    backend, arguments = backend_of(op, name), large_of(op)
    first = outputs_and_gradients(backend, arguments)
    second = outputs_and_gradients(backend, arguments)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if usual > 1 else 3)
        third = outputs_and_gradients(backend, arguments)
    finally:
        torch.set_num_threads(usual)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def large_of(op: str) -> Any:
    scan, draw = large(), Draw("large of")
    if op == "selective_scan":
        return scan
    if op == "causal_conv":
        _, first = next(iter(OPS[op].samples(CPU)))
        return first._replace(x=scan.x, weight=draw.normal(200, 4), activation="silu")
    _, first = next(iter(OPS[op].samples(CPU)))
    return first._replace(x=scan.x, log_decay=scan.A / 30, B=draw.normal(200, 8), C=draw.normal(200, 8))


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv", "lti_scan"])
def test_concurrent_calls_give_what_serial_calls_give(op: str) -> None:
    backend, arguments = backend_of(op, "cpu"), large_of(op)
    inputs = [arguments._replace(x=Draw(f"caller {k}").normal(*arguments.x.shape)) for k in range(4)]
    serial = [outputs_and_gradients(backend, each) for each in inputs]
    found: list[list[list[Tensor]]] = [[] for _ in inputs]

    def caller(k: int) -> None:
        for _ in range(3):
            found[k].append(outputs_and_gradients(backend, inputs[k]))

    callers = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    for expected, runs in zip(serial, found, strict=True):
        assert len(runs) == 3
        for run in runs:
            assert all(torch.equal(a, e) for a, e in zip(run, expected, strict=True))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_shares_work_in_a_forked_process() -> None:
    """The parent's worker threads do not exist in the child. (PyTorch's own do not either, so none of its ops run.)"""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def share() -> None:
        done: list[int] = []
        both = threading.Barrier(2)

        def make_worker() -> Callable[[int, int], None]:
            both.wait(timeout=10)  # breaks unless two threads come
            return lambda first, end: done.extend(range(first, end))

        threads.share(100, make_worker)
        queue.put(sorted(done))

    torch.set_num_threads(2)
    share()
    assert queue.get(timeout=20) == list(range(100))
    child = context.Process(target=share)
    child.start()
    try:
        assert queue.get(timeout=20) == list(range(100))
    finally:
        child.kill()
        child.join()


def test_models_are_loaded_and_generate_without_what_is_for_training() -> None:
    """Compilers and Lightning, with what they import in turn, take longer than PyTorch itself."""
    program = (
        "import sys, mambaseq.checkpoints, mambaseq.generation, mambaseq.serving; "
        "print({'numba', 'lightning', 'torch._dynamo', 'triton', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_lti_kernels_take_real_systems() -> None:
    """Their arithmetic is complex; the imaginary parts stay out of gradients of real parameters."""
    arguments = large_of("lti_scan")
    assert lti_cpu.why_not(arguments) is None
    assert not any(value.is_complex() for value in outputs_and_gradients(backend_of("lti_scan", "cpu"), arguments))
