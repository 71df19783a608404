"""Decoding on a GPU by models of about 6 M parameters, as `configs/audio` have them, position by position.

`python benchmarks/steps_gpu.py [--quick]`: tokens are first held against those of the plain loop. Then positions a
second over 8,000 samples at batch 1, start-up and captures included, and of a loop of `Decoder` steps over 8 sequences
at once, whose kernels are counted. Beside them stands how long it takes to read all weights and states once at 3 TB/s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mambaseq.generation import Decoder, generate
from mambaseq.generation.stretches import why_not
from mambaseq.models import SequenceModel, build_model

POSITIONS, CHECKED, BATCH = 8000, 600, 8
RESIDUAL = {"name": "residual", "n_layers": 12}
MODELS: dict[str, dict[str, Any]] = {
    "lti": {"d_model": 256, "backbone": RESIDUAL, "mixer": {"name": "mamba", "lti": True, "d_state": 32}},
    "unet of s4d": {
        "d_model": 128,
        "backbone": {"name": "unet", "n_layers": 4, "pool": [4, 4], "expand": 2},
        "mixer": {"name": "s4d", "d_state": 64},
    },
    "mamba": {"d_model": 256, "backbone": RESIDUAL, "mixer": {"name": "mamba"}},
    "mamba, complex": {"d_model": 256, "backbone": RESIDUAL, "mixer": {"name": "mamba", "complex": True}},
    "mamba2": {"d_model": 256, "backbone": RESIDUAL, "mixer": {"name": "mamba2", "d_state": 64}},
}


def make(spec: dict[str, Any]) -> SequenceModel:
    torch.manual_seed(0)
    tokens = {"vocab_size": 256}
    return (
        build_model({**spec, "encoder": {"name": "tokens", **tokens}, "head": {"name": "lm", **tokens}}).cuda().eval()
    )


def seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def by_graphs(model: SequenceModel) -> tuple[float, float]:
    """Microseconds a step of BATCH sequences, and kernels of it."""
    decoder = Decoder(model, model.init_state(BATCH))
    token = torch.zeros(BATCH, dtype=torch.long, device="cuda")
    for _ in range(64):
        decoder.step(token)
    assert decoder.captured
    took = seconds(lambda: [decoder.step(token) for _ in range(320)]) / 320
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(16):
            decoder.step(token)
        torch.cuda.synchronize()
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())
    return took * 1e6, kernels / 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the positions")
    positions = POSITIONS // (4 if parser.parse_args().quick else 1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    prompt = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    for name, spec in MODELS.items():
        model = make(spec)
        held = sum(value.numel() * value.element_size() for value in model.parameters())
        held += sum(v.numel() * v.element_size() for state in model.init_state(1) for v in state.tensors().values())
        graph, loop = (generate(model, prompt, CHECKED, seed=0, cuda_graph=wanted) for wanted in (True, False))
        if not torch.equal(graph, loop):
            print(f"{name}: other tokens than those of the loop, so not timed")
            continue
        rates = [positions / seconds(lambda model=model: generate(model, prompt, positions, seed=1)) for _ in range(3)]
        reason = why_not(model, 1, 0, 1.0)
        step, kernels = by_graphs(model)
        print(
            f"{name}, {model.n_parameters() / 1e6:.1f} M: {sorted(rates)[1]:,.0f} positions/s at batch 1 "
            f"({'one kernel' if reason is None else 'by graphs: ' + reason}; floor of reading {held / 3e6:.1f} us); "
            f"batch {BATCH} by graphs {step:.0f} us and {kernels:.0f} kernels a step",
            flush=True,
        )


if __name__ == "__main__":
    main()
