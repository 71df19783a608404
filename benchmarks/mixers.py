"""The mixers of today: Mamba-2 and -3, delta rules, gated linear attention; scans, training, decode steps.

`python benchmarks/mixers.py [--only PART ...] [--mixers MIXER ...] [--device cpu]`. On a GPU of a 1.5B model's width,
on a CPU of a 130M model's, in float32, whole mixers only, of which any that is installed can be asked for. Parts:

    scan     Mamba-3's scan, one input a head and four, forward and backward: our kernels, our PyTorch, and mamba-ssm's
             kernel for one input where it is installed (which norms nothing, but adds biases, turns, skips and gates:
             ours beside it by the mixer's parts, both held against float64).
    kernels  which kernels of ours the same work goes to, on a GPU, and those of whole mixers as in `layers`.
    models   training steps of models with 24 layers of width 768, 8 x 2,048 tokens (the loop of `lti_gpu.py`): a GPU.
    layers   whole mixers, projections too, forward and backward, on a GPU under bfloat16 autocast.
    update   a decode step's state and output at batch 128, states in float32 and bfloat16: share of the time that
             reading and writing the state takes at the memory's speed. Beside them what is published, on an H100.
    steps    whole mixers' decode steps, projections too, and how far from reading weights and states once they are.

On a GPU all is timed inside of CUDA graphs, so that nothing of Python is counted, on a CPU the best of some calls is
told: with one thread (`OMP_NUM_THREADS=1`) the processor's time, which other work on the machine changes little. Scans
and updates are held against float64.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lti_gpu
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.benchmarking.floors import peak
from mambaseq.domain import catalog
from mambaseq.ops import OPS, trapezoidal_scan
from mambaseq.ops.decoding.step import ssd_update_
from mambaseq.ops.delta_rule import delta_rule_update_
from mambaseq.ops.dispatch import leaves, outputs_and_gradients, relative_rms_error
from mambaseq.ops.trapezoid import step
from mambaseq.ops.trapezoid.angles import AngleArguments, added_up
from mambaseq.ops.trapezoid.arguments import TrapezoidArguments
from mambaseq.ops.trapezoid.gating import GateArguments, gated
from mambaseq.ops.trapezoid.turning import TurnArguments, turned

HEADS, HEAD_DIM, D_STATE = 64, 64, 128
# batch, length, heads, rank
SCANS = ((8, 2048, 24, 1), (8, 2048, 24, 4), (4, 2048, HEADS, 1), (1, 65536, 24, 1))
CHECKED = 512  # positions that are held against float64
TUNED = ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (2, 2))  # warps and stages of mamba-ssm's kernels
MOST_KERNELS = 24  # that are told of
TOLERANCE = 5e-3  # relative RMS of outputs and gradients in bfloat16
BACKENDS = {backend.name: backend for backend in OPS["trapezoidal_scan"].backends}
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {}),
    "mamba3": ("mamba3", {}),
    "mamba3, rank 4": ("mamba3", {"rank": 4}),
    "gated_delta": ("gated_delta", {}),
    "kda": ("kda", {}),
    "gla": ("gla", {}),
}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{entry.name: (entry.name, {}) for entry in catalog()["mixers"]},
    "mamba, lti": ("mamba", {"lti": True}),
    "mamba, complex": ("mamba", {"complex": True}),
    **MIXERS,
}
"""Of which whole mixers and their steps can be measured."""
# Milliseconds of kernels, states in bfloat16 (arXiv:2603.15569)
PUBLISHED = {"mamba2": 0.203, "gated_delta": 0.257, "mamba3": 0.156, "mamba3, rank 4": 0.179}


class Sizes(NamedTuple):
    """d_model; batch and length of a training step; sequences of a decode step."""

    d_model: int
    batch: int
    length: int
    decoded: int


SIZES = {"cuda": Sizes(2048, 4, 2048, 128), "cpu": Sizes(768, 1, 1024, 1)}
BATCH = SIZES["cuda"].decoded


def milliseconds(run: Callable[[], Any], device: str = "cuda", repeats: int = 20) -> float:
    if device == "cuda":
        return lti_gpu.milliseconds(run, repeats)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    found = []
    for _ in range(repeats):
        began = clock()
        run()
        found.append(clock() - began)
    return 1e3 * min(found)


def scan_arguments(batch: int, length: int, heads: int, rank: int) -> TrapezoidArguments:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    one = (batch, length, heads)
    # ranks outside of heads, as the projection has them
    x, B, C = (normal(batch, length, rank, heads, n).bfloat16().transpose(2, 3) for n in (HEAD_DIM, D_STATE, D_STATE))
    return TrapezoidArguments(
        x, 0.1 * normal(*one).abs(), -1 - normal(*one).abs(), normal(*one).sigmoid(), B, C, wants_final_state=False
    )  # fmt: skip


def timed(run: Callable[[], Any], wanted: list[Tensor], device: str = "cuda") -> tuple[float, float]:
    """Milliseconds forward, and backward (what both together take, less the forward)."""
    repeats = 10 if device == "cuda" else 5
    with torch.no_grad():
        forward = milliseconds(run, device, repeats)
        cotangent = torch.randn_like(run())

    def both() -> None:
        torch.autograd.grad(run(), wanted, cotangent)

    return forward, milliseconds(both, device, repeats) - forward


def told(times: tuple[float, float]) -> str:
    return "{:.3f} / {:.3f} ms".format(*times)


def scans() -> None:
    for shape in SCANS:
        made = scan_arguments(*shape)
        names = ("x", "dt", "A", "trap", "B", "C")
        part = made._replace(**{name: getattr(made, name)[:1, :CHECKED] for name in names})
        expected = outputs_and_gradients(BACKENDS["torch"], part, double=True)
        for name in ("triton", "torch"):
            attempted(f"scan {shape} {name}", functools.partial(_scan, name, made, part, expected))
        if shape[3] == 1:
            attempted(f"scan {shape} mamba-ssm", functools.partial(published_scan, *shape[:3]))


def _scan(name: str, made: TrapezoidArguments, part: TrapezoidArguments, expected: list[Tensor]) -> str:
    found = outputs_and_gradients(BACKENDS[name], part)
    error = max(relative_rms_error(a, e) for a, e in zip(found, expected, strict=True))
    if not error < TOLERANCE:
        return f"wrong by {error:.1e}"
    given = leaves(made)
    wanted = [v for v in given if isinstance(v, Tensor)]
    return f"{told(timed(lambda: BACKENDS[name].run(given)[0], wanted))}, error {error:.1e}"


def published_scan(batch: int, length: int, heads: int, configurations: tuple[tuple[int, int], ...] = TUNED) -> str:
    """mamba-ssm's kernel for one input, with all that it does beside the scan, and the same by ours.

    configurations: of its kernels, warps and stages that it may choose from (it would try up to 81 of each).
    """
    modules = [
        importlib.import_module(f"mamba_ssm.ops.triton.mamba3.{name}")
        for name in ("angle_dt", "mamba3_siso_fwd", "mamba3_siso_bwd", "mamba3_siso_combined")
    ]
    for tuner in (value for module in modules for value in vars(module).values() if hasattr(value, "configs")):
        tuner.configs = [
            tuner.configs[0].__class__(_pieces(tuner), num_warps=w, num_stages=s) for w, s in configurations
        ]
    peer: Any = modules[-1].mamba3_siso_combined  # type: ignore[attr-defined]
    given = published_arguments(batch, length, heads)
    times = told(timed(lambda: peer(*given), list(given)))  # first, so that it chooses at this size
    own = told(timed(lambda: around(*given), list(given)))
    small = published_arguments(2, CHECKED, heads)
    names = ("y", "C", "B", "x", "dt A", "dt", "trap", "C_bias", "B_bias", "angles", "D", "z")
    exact = [value.detach().double().requires_grad_() for value in small]
    expected, *others = (_with_gradients(run, a) for run, a in ((around, exact), (peer, small), (around, small)))
    errors = [
        {name: relative_rms_error(a, e) for name, a, e in zip(names, found, expected, strict=True)} for found in others
    ]
    said = (f"y {e.pop('y'):.1e}, gradients {max(e.values()):.1e} ({max(e, key=lambda n: e[n])})" for e in errors)
    return f"{times}, {next(said)}; ours, the same work: {own}, {next(said)}"


def _pieces(tuner: Any) -> dict[str, int]:
    """What its configurations hold beside warps and stages: lengths of pieces of time, where there is a choice."""
    return {name: 64 for name in tuner.configs[0].kwargs}


def published_arguments(batch: int, length: int, heads: int) -> tuple[Tensor, ...]:
    """As mamba-ssm's kernel takes them: C, B, x, dt A, dt, trap, biases of C and B, angles, D, z."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    C, B = (F.rms_norm(normal(batch, length, 1, D_STATE), (D_STATE,)).bfloat16() for _ in range(2))
    x, z = (normal(batch, length, heads, HEAD_DIM).bfloat16() for _ in range(2))
    dt = 0.02 + 0.08 * torch.rand(batch, heads, length, generator=generator, device="cuda")
    given = (C, B, x, -(1 + normal(*dt.shape).abs()) * dt, dt, normal(*dt.shape).bfloat16())
    biases = (1 + 0.1 * normal(heads, D_STATE) for _ in range(2))
    angles = normal(batch, length, heads, D_STATE // 4).bfloat16()
    return tuple(v.requires_grad_() for v in (*given, *biases, angles, normal(heads), z))


def around(
    C: Tensor, B: Tensor, x: Tensor, dt_A: Tensor, dt: Tensor, trap: Tensor, C_bias: Tensor, B_bias: Tensor,
    angles: Tensor, D: Tensor, z: Tensor,
) -> Tensor:  # fmt: skip
    """What mamba-ssm's kernel does, by the parts of our mixer; of float64 by PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    angle, _ = added_up(AngleArguments(angles.to(wide), dt.mT))
    B, C = (M[:, :, None].to(wide) for M in (B, C))
    B, C = turned(TurnArguments(B, C, B_bias[:, None], C_bias[:, None], angle, False, x.dtype == torch.bfloat16))
    trap = trap.to(wide).sigmoid().mT
    y, _ = trapezoidal_scan(x[..., None, :], dt.mT, (dt_A / dt).mT, trap, B, C, return_final_state=False)
    return gated(GateArguments(y, x, z, D))


def kernels(names: list[str]) -> None:
    """Microseconds of each kernel of one forward and backward pass of `around` and of mixers, those that take most
    first."""
    given = published_arguments(*SCANS[0][:3])
    cotangent = torch.randn_like(around(*given))
    told_kernels(
        f"scan {SCANS[0]}, ours, with all that mamba-ssm's does",
        lambda: torch.autograd.grad(around(*given), list(given), cotangent),
    )
    for name in names:
        forward, wanted = _forward_of(name, "cuda")
        of = SIZES["cuda"]
        told_kernels(
            f"layers {of.batch} x {of.length}, {name}",
            lambda forward=forward, wanted=wanted: torch.autograd.grad(forward().sum(), wanted),
        )


def told_kernels(label: str, run: Callable[[], Any]) -> None:
    run()
    torch.cuda.synchronize()
    repeats = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found) / repeats
    print(f"kernels of {label}: {total:.0f} us")
    for event in found[:MOST_KERNELS]:
        print(f"  {event.self_device_time_total / repeats:7.1f} us, {event.count // repeats:3d} of {event.key[:70]}")


def _with_gradients(run: Callable[..., Tensor], given: Any) -> list[Tensor]:
    y = run(*given)
    weight = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [y, *torch.autograd.grad((y * weight.to(y.dtype)).sum(), list(given))]


def mixer_of(name: str, device: str) -> Any:
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    with torch.device(device):
        return catalog()["mixers"].get(kind)(SIZES[device].d_model, **options)


def layers(names: list[str], device: str) -> None:
    for name in names:
        attempted(
            f"layers {SIZES[device].batch} x {SIZES[device].length}, {name}", functools.partial(_layer, name, device)
        )


def _forward_of(name: str, device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A whole mixer's forward pass, and what gradients are wanted of."""
    mixer, of, on_gpu = mixer_of(name, device), SIZES[device], device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    x = torch.randn(of.batch, of.length, of.d_model, device=device, dtype=dtype, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            y: Tensor = mixer(x)
        return y

    return forward, [x, *mixer.parameters()]


def _layer(name: str, device: str) -> str:
    of, on_gpu = SIZES[device], device == "cuda"
    forward, wanted = _forward_of(name, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(forward().sum(), wanted)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if on_gpu else ""
    times = timed(forward, wanted, device)
    return f"{told(times)}, {1e3 * of.batch * of.length / sum(times):,.0f} tokens/s{memory}"


def models(names: list[str]) -> None:
    for name in names:
        kind, options = LAYERS[name]
        attempted(f"models, {name}", functools.partial(lti_gpu.train, 8, 2048, mixer=kind, **options))


def updates(names: list[str]) -> None:
    for name in (name for name in MIXERS if name in names):
        kind, options = MIXERS[name]
        for dtype in (torch.float32, torch.bfloat16):
            if kind == "mamba3":
                run = functools.partial(_update, options.get("rank", 1), dtype)
            else:
                run = functools.partial(_other_update, name, dtype)
            attempted(_label(name, dtype), run)


def _label(name: str, dtype: torch.dtype) -> str:
    beside = f" (published {PUBLISHED[name]} ms)" if name in PUBLISHED else ""
    return f"update {name}, {str(dtype)[6:]} states{beside}"


def _other_update(name: str, dtype: torch.dtype) -> str:
    """Of the states that the mixer has at that width."""
    shape = mixer_of(name, "cuda").init_state(BATCH).tensors()["ssm" if name == "mamba2" else "kv"].shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    batch, heads, rows, columns = shape
    a, b = (F.normalize(normal(batch, 1 if name == "mamba2" else heads, columns), dim=-1).bfloat16() for _ in range(2))
    x, rate = normal(batch, heads, rows).bfloat16(), normal(batch, heads).sigmoid()
    decay = -normal(batch, heads, *((columns,) if name in ("kda", "gla") else ())).abs()
    given: tuple[Any, ...] = (a, b, x, decay) if name == "gla" else (a, b, x, decay, rate)
    update: Callable[..., Tensor] = delta_rule_update_
    if name == "mamba2":
        given, update = (x, rate, decay[0], a, b), ssd_update_
    by_row = [value.ndim > 1 for value in given]  # all but Mamba-2's A
    state = normal(*shape).to(dtype)
    exact, kept = state[:2].double(), state[:2].clone()
    few = [value[:2] if rows else value for value, rows in zip(given, by_row, strict=True)]
    expected = update(exact, *(value.double() for value in few))
    y = update(kept, *few)
    return _told_update(lambda: update(state, *given), state, (y, expected), (kept, exact))


def _told_update(run: Callable[[], Any], state: Tensor, *pairs: tuple[Tensor, Tensor]) -> str:
    errors = " ".join(f"{relative_rms_error(a, e):.1e}" for a, e in pairs)
    took = milliseconds(run)
    floor = 1e3 * 2 * state.numel() * state.element_size() / peak(torch.device("cuda")).bytes_per_s
    shape = " x ".join(map(str, state.shape))
    return f"{shape}: {took:.3f} ms, {floor / took:.0%} of the memory's speed, errors {errors}"


def _update(rank: int, dtype: torch.dtype) -> str:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=generator, device="cuda").bfloat16()

    x, last_x = (normal(rank, HEAD_DIM).float() for _ in range(2))  # as the mixer has them
    B, C, last_B = (normal(rank, D_STATE).float() for _ in range(3))
    given: Any = (x, normal().abs(), -normal().abs(), normal().sigmoid(), B, C, last_x, last_B)
    state = normal(HEAD_DIM, D_STATE).to(dtype)
    exact, kept = state[:2].double(), state[:2].clone()
    expected = step.trapezoidal_update_(exact, *(v[:2].double() for v in given))
    y = step.trapezoidal_update_(kept, *(v[:2] for v in given))
    return _told_update(lambda: step.trapezoidal_update_(state, *given), state, (y, expected), (kept, exact))


def steps(names: list[str], device: str) -> None:
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            label = f"steps of {SIZES[device].decoded}, {name}, {str(dtype)[6:]} states"
            attempted(label, functools.partial(_step, name, dtype, device))


def _step(name: str, dtype: torch.dtype, device: str) -> str:
    mixer, of = mixer_of(name, device).eval(), SIZES[device]
    mixer = mixer.bfloat16() if device == "cuda" else mixer
    state = mixer.init_state(of.decoded).stored_as(dtype)
    if dtype == torch.bfloat16 and all(tensor.dtype != dtype for tensor in state.tensors().values()):
        return "has none"
    x = torch.randn(of.decoded, 1, of.d_model, device=device, dtype=next(mixer.parameters()).dtype)
    took = milliseconds(lambda: mixer.step_(x, state), device, 20 if device == "cuda" else 200)
    held = sum(p.numel() * p.element_size() for p in mixer.parameters())
    held += 2 * sum(t.numel() * t.element_size() for t in state.tensors().values())
    floor = 1e3 * held / peak(torch.device(device)).bytes_per_s
    return f"{took:.3f} ms, {floor / took:.0%} of the memory's speed"


def attempted(label: str, run: Callable[[], str]) -> None:
    try:
        print(f"{label}: {run()}", flush=True)
    except Exception as error:
        print(f"{label}: {type(error).__name__}: {str(error)[:160]}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    on_gpu: dict[str, Callable[[], None]] = {
        "scan": scans,
        "kernels": lambda: kernels(given.mixers),
        "models": lambda: models(given.mixers),
        "update": lambda: updates(given.mixers),
    }
    on_both = {"layers": layers, "steps": steps}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*on_gpu, *on_both], default=[*on_gpu, *on_both])
    parser.add_argument(
        "--mixers",
        nargs="+",
        choices=list(LAYERS),
        default=list(MIXERS),
        metavar="MIXER",
        help=f"{', '.join(LAYERS)}; the default is {', '.join(MIXERS)}",
    )
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; ms forward / backward")
    for part in given.only:
        if part in on_both:
            on_both[part](given.mixers, given.device)
        elif given.device == "cuda":
            on_gpu[part]()


if __name__ == "__main__":
    main()
