"""The state-space dual on a GPU beside mamba-ssm's and PyTorch's, and training steps of models that are made of it.

`python benchmarks/ssd_gpu.py [--quick]`: each shape is first held against the chunked form in float64, then timed
inside of CUDA graphs, so that nothing of Python is counted. Models have 24 layers of width 768, a vocabulary of 50,280,
bfloat16 autocast and AdamW, as they come.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from lti_gpu import milliseconds, train
from torch import Tensor

from mambaseq.ops import OPS
from mambaseq.ops.dispatch import outputs_and_gradients, relative_rms_error
from mambaseq.ops.ssd.arguments import SsdArguments

# batch, length, heads, head_dim, d_state
SHAPES = ((8, 2048, 24, 64, 128), (1, 65536, 24, 64, 128), (1, 8192, 24, 64, 128), (4, 2048, 12, 128, 128))
CHECKED = 1024  # positions that are held against float64
TOLERANCE = 4e-3  # relative RMS of outputs and gradients in bfloat16
BACKENDS = {backend.name: backend for backend in OPS["ssd"].backends}
MODELS: tuple[dict[str, Any], ...] = (
    {"mixer": "mamba2"},
    {"mixer": "mamba2", "cuda_graph": False},
    {"mixer": "retention"},
    {"mixer": "linear_attention"},
    {},
)


def inputs(batch: int, length: int, heads: int, head_dim: int, d_state: int) -> SsdArguments:
    """As the mixer hands them over: x, B and C beside each other, in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    joined = normal(batch, length, heads * head_dim + 2 * d_state).bfloat16()
    x, B, C = joined.split([heads * head_dim, d_state, d_state], dim=-1)
    return SsdArguments(
        x.unflatten(-1, (heads, head_dim)),
        normal(batch, length, heads).bfloat16(),
        -1 - 15 * torch.rand(heads, generator=generator, device="cuda"),
        B.unflatten(-1, (1, d_state)),
        C.unflatten(-1, (1, d_state)),
        D=normal(heads),
        dt_bias=normal(heads) - 4,
        dt_softplus=True,
        wants_final_state=False,
    )


def part(arguments: SsdArguments) -> SsdArguments:
    """The first row's beginning."""
    return arguments._replace(**{name: getattr(arguments, name)[:1, :CHECKED] for name in ("x", "dt", "B", "C")})


def contenders(arguments: SsdArguments) -> Iterator[tuple[str, SsdArguments]]:
    """Backends that can run it, with the chunks that suit them; the definition, a loop, is left out."""
    for name, backend in BACKENDS.items():
        given = arguments._replace(chunk_size=256) if name == "mamba_ssm" else arguments
        if name != "reference" and backend.why_not(given) is None:
            yield name, given


def timed(arguments: SsdArguments, backend: str) -> tuple[float, float, float]:
    """Milliseconds forward and backward (what both together take, less the forward), GiB at the most of both."""
    leaves = SsdArguments(*(v.detach().requires_grad_() if _floating(v) else v for v in arguments))
    wanted = [v for v in leaves if _floating(v)]
    dy = torch.randn_like(arguments.x)

    def both() -> None:
        torch.autograd.grad(BACKENDS[backend].run(leaves)[0], wanted, dy)

    with torch.no_grad():
        forward = milliseconds(lambda: BACKENDS[backend].run(arguments))
    backward = milliseconds(both) - forward
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    return forward, backward, (torch.cuda.max_memory_allocated() - before) / 2**30


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two shapes, no models")
    quick = parser.parse_args().quick
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ms forward / backward, GiB, error")
    for shape in SHAPES[: 2 if quick else None]:
        arguments = inputs(*shape)
        expected = outputs_and_gradients(BACKENDS["torch"], part(arguments), double=True)
        for name, given in contenders(arguments):
            try:
                found = outputs_and_gradients(BACKENDS[name], part(given))
                error = max(relative_rms_error(a, e) for a, e in zip(found, expected, strict=True))
                if error > TOLERANCE:
                    print(f"{shape} {name}: wrong by {error:.1e}, so not timed")
                    continue
                forward, backward, memory = timed(given, name)
                print(f"{shape} {name}: {forward:.3f} / {backward:.3f}, {memory:.2f}, {error:.1e}", flush=True)
            except torch.OutOfMemoryError:
                print(f"{shape} {name}: out of memory")
            torch.cuda.empty_cache()
    for options in () if quick else MODELS:
        sizes = ((8, 2048), (1, 65536))
        print(options or "mamba", *(f"{b} x {n}: {train(b, n, **options)};" for b, n in sizes), flush=True)


if __name__ == "__main__":
    main()
