"""The time-invariant scan on a GPU beside its convolution by FFT, and training steps of models that are made of it.

`python benchmarks/lti_gpu.py [--quick]`: each shape is first held against the reference in float64 on its first
positions; kernels and FFT are then timed inside of CUDA graphs, so that nothing of Python is counted. Models have
24 layers of width 768, a vocabulary of 50,280, bfloat16 autocast and AdamW, as they come.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambaseq import causal_lm
from mambaseq.ops import OPS
from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.ops.lti.arguments import LtiArguments

SHAPES = ((8, 2048, 1536), (1, 65536, 1536), (1, 8192, 1536), (4, 2048, 768), (1, 65536, 256))
CHECKED = 256  # positions that the reference computes
TOLERANCE = 4e-3  # relative RMS of outputs and gradients in bfloat16
BACKENDS = {backend.name: backend for backend in OPS["lti_scan"].backends}


def inputs(batch: int, length: int, channels: int, d_state: int, is_complex: bool) -> LtiArguments:
    """Gated, with D, in bfloat16; slow and fast decays."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    decay = -torch.rand(channels, d_state, generator=generator, device="cuda") * 0.1
    if is_complex:
        decay = torch.complex(decay, normal(channels, d_state))
    x, z = (normal(batch, length, channels).bfloat16() for _ in range(2))
    B, C = (normal(channels, d_state, dtype=decay.dtype) for _ in range(2))
    return LtiArguments(x, decay, B, C, D=normal(channels), z=z)


def errors(arguments: LtiArguments) -> float:
    """The largest relative RMS error of an output or gradient on the first row's beginning."""
    start = arguments._replace(
        x=arguments.x[:1, :CHECKED], z=None if arguments.z is None else arguments.z[:1, :CHECKED]
    )
    found = []
    for name, wide in (("cuda", False), ("reference", True)):
        values: Any = [v.detach() if isinstance(v, Tensor) else v for v in start]
        if wide:
            values = [
                v.to(torch.complex128 if v.is_complex() else torch.float64) if isinstance(v, Tensor) else v
                for v in values
            ]
        leaves = [v.requires_grad_() if isinstance(v, Tensor) else v for v in values]
        y, _ = BACKENDS[name].run(LtiArguments(*leaves))
        dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(y.dtype)
        found.append([y, *torch.autograd.grad(y, [v for v in leaves if isinstance(v, Tensor)], dy)])
    return max(relative_rms_error(a, e) for a, e in zip(*found, strict=True))


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Of one call, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def scan(arguments: LtiArguments, backend: str) -> tuple[float, float]:
    """Milliseconds forward, and backward (what both together take, less the forward)."""
    leaves = LtiArguments(*(v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in arguments))
    wanted = [v for v in leaves if isinstance(v, Tensor)]
    dy = torch.randn_like(arguments.x)

    def both() -> None:
        y, _ = BACKENDS[backend].run(leaves)
        torch.autograd.grad(y, wanted, dy.to(y.dtype))

    with torch.no_grad():
        forward = milliseconds(lambda: BACKENDS[backend].run(arguments))
    return forward, milliseconds(both) - forward


def train(batch: int, length: int, **options: Any) -> str:
    """Tokens a second and peak memory of whole steps."""
    torch.manual_seed(0)
    try:
        model = causal_lm(vocab_size=50_280, d_model=768, n_layers=24, **options).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(0, 50_280, (batch, length + 1), device="cuda")

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(ids[:, :-1], ids[:, 1:]).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(6):  # compiles, and captures where that is done
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        for _ in range(8):
            step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / 8
        return f"{batch * length / seconds / 1e3:.0f} k tokens/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two shapes, no models")
    quick = parser.parse_args().quick
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds forward / backward")
    for shape in SHAPES[: 2 if quick else None]:
        for is_complex in (True, False):
            arguments = inputs(*shape, 16, is_complex)
            error = errors(arguments)
            kind = f"{shape}, 16 {'complex' if is_complex else 'real'} states"
            if error > TOLERANCE:
                print(f"{kind}: wrong by {error:.1e}, so not timed")
                continue
            times = {name: scan(arguments, name) for name in ("cuda", "fft")}
            ratio = [theirs / ours for ours, theirs in zip(times["cuda"], times["fft"], strict=True)]
            cells = ", ".join(f"{name} {forward:.3f} / {backward:.3f}" for name, (forward, backward) in times.items())
            print(f"{kind}: {cells}; {ratio[0]:.1f} and {ratio[1]:.1f} times as fast; error {error:.1e}", flush=True)
    for options in () if quick else ({}, {"lti": True}, {"lti": True, "cuda_graph": True}, {"mixer": "s4d"}):
        print(
            options or "mamba",
            *(f"{b} x {n}: {train(b, n, **options)};" for b, n in ((8, 2048), (1, 65536))),
            flush=True,
        )


if __name__ == "__main__":
    main()
