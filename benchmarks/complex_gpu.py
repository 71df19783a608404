"""The selective scan with complex states on a GPU, and with constant B and C, beside the real one, and training
steps of models that are made of it.

`python benchmarks/complex_gpu.py [--quick]`: each shape is first held against the reference in float64 on its first
positions; kernels are then timed inside of CUDA graphs, so that nothing of Python is counted. Models are those of
`lti_gpu.py`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lti_gpu import milliseconds, train
from torch import Tensor

from mambaseq.ops import OPS
from mambaseq.ops.dispatch import outputs_and_gradients, relative_rms_error
from mambaseq.ops.selective_scan.arguments import ScanArguments

SHAPES = ((8, 2048, 1536), (1, 65536, 1536), (1, 8192, 1536), (4, 2048, 768))
CHECKED = 256  # positions that the reference computes
TOLERANCE = 4e-3  # relative RMS of outputs and gradients in bfloat16
KINDS = ("real", "complex", "real, constant B and C", "complex, constant B and C")
BACKENDS = {backend.name: backend for backend in OPS["selective_scan"].backends}


def inputs(kind: str, batch: int, length: int, channels: int, d_state: int) -> ScanArguments:
    """Gated, with D, dt's bias and softplus, in bfloat16; A as it is initialised."""
    generator = torch.Generator("cuda").manual_seed(0)
    wide = torch.complex64 if "complex" in kind else torch.float32

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    A = -torch.arange(1.0, d_state + 1, device="cuda").repeat(channels, 1)
    if "complex" in kind:
        A = torch.complex(torch.full_like(A, -0.5), -A)
    shape = (channels,) if "constant" in kind else (batch, length)
    x, dt, z = (normal(batch, length, channels).bfloat16() for _ in range(3))
    B, C = (normal(*shape, d_state, dtype=wide) for _ in range(2))
    if wide == torch.float32 and "constant" not in kind:
        B, C = B.bfloat16(), C.bfloat16()
    return ScanArguments(
        x, dt, A, B, C, D=normal(channels), z=z, dt_bias=normal(channels) - 4, dt_softplus=True, wants_final_state=False
    )


def error_of(arguments: ScanArguments) -> float:
    """The largest relative RMS error of an output or gradient on the first row's beginning."""
    values = {
        name: value[:1, :CHECKED]
        for name, value in arguments._asdict().items()
        if isinstance(value, Tensor) and value.ndim == 3
    }
    start = arguments._replace(**values)
    actual = outputs_and_gradients(BACKENDS["cuda"], start)
    expected = outputs_and_gradients(BACKENDS["reference"], start, double=True)
    return max(relative_rms_error(a, e) for a, e in zip(actual, expected, strict=True))


def scan(arguments: ScanArguments) -> tuple[float, float]:
    """Milliseconds forward, and backward (what both together take, less the forward)."""
    leaves = ScanArguments(*(v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in arguments))
    wanted = [v for v in leaves if isinstance(v, Tensor)]
    dy = torch.randn_like(arguments.x)

    def both() -> None:
        torch.autograd.grad(BACKENDS["cuda"].run(leaves)[0], wanted, dy)

    with torch.no_grad():
        forward = milliseconds(lambda: BACKENDS["cuda"].run(arguments))
    return forward, milliseconds(both) - forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape, one model")
    quick = parser.parse_args().quick
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds forward / backward")
    for shape in SHAPES[: 1 if quick else None]:
        for kind in KINDS:
            arguments = inputs(kind, *shape, 16)
            error = error_of(arguments)
            if not error <= TOLERANCE:
                print(f"{shape}, {kind}: wrong by {error:.1e}, so not timed")
                continue
            forward, backward = scan(arguments)
            print(f"{shape}, {kind}: {forward:.3f} / {backward:.3f}; error {error:.1e}", flush=True)
    models: tuple[dict[str, Any], ...] = (
        {},
        {"complex": True},
        {"complex": True, "cuda_graph": True},
        {"selective_B": False, "selective_C": False},
    )
    for options in models[1:2] if quick else models:
        print(
            options or "mamba",
            *(f"{b} x {n}: {train(b, n, **options)};" for b, n in ((8, 2048), (1, 65536))[: 1 if quick else None]),
            flush=True,
        )


if __name__ == "__main__":
    main()
