"""A step of training over one sequence of 2^14 … 2^20 tokens on one GPU: `python benchmarks/long_gpu.py [--json FILE]`.

A language model of 1.4 million parameters (12 Mamba layers, d_model 128, 16 tokens), bf16 autocast: forward, backward
and AdamW, in one call and over chunks of time (`chunk_length`); and the selective scan alone, 512 channels. Medians
over CUDA events after a warm-up; memory is the peak of a step above what was there before it (weights, AdamW's
averages, tokens). No time is printed unless chunks give the gradients of the one call.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mambaseq.atomic import json_text
from mambaseq.models import SequenceModel, build_model
from mambaseq.ops import selective_scan

LENGTHS = [2**exponent for exponent in range(14, 21)]
D_MODEL, N_LAYERS, VOCABULARY = 128, 12, 16
SCAN_CHANNELS, D_STATE = 512, 16
# relative error of all gradients together: results that chunks round to bf16 elsewhere
TOLERANCE = 2e-2


def make_model(chunk_length: int | None, device: torch.device) -> SequenceModel:
    torch.manual_seed(0)
    spec = {
        "d_model": D_MODEL,
        "tie_embeddings": True,
        "encoder": {"name": "tokens", "vocab_size": VOCABULARY},
        "backbone": {"name": "residual", "n_layers": N_LAYERS, "chunk_length": chunk_length},
        "mixer": {"name": "mamba", "d_state": D_STATE},
        "head": {"name": "lm", "vocab_size": VOCABULARY},
    }
    return build_model(spec).to(device)


def loss_of(model: SequenceModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        loss = model(ids[:, :-1], labels=ids[:, 1:]).loss
    assert loss is not None
    return loss


def disagreement(length: int, chunk_length: int, device: torch.device) -> float:
    """Relative error of the gradients of chunks beside those of the one call."""
    ids = torch.randint(0, VOCABULARY, (1, length + 1), device=device)
    gradients = []
    for chosen in (None, chunk_length):
        model = make_model(chosen, device)
        found = torch.autograd.grad(loss_of(model, ids), list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten().double() for gradient in found]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls, after one that is not counted."""
    times = []
    for index in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        if index:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def train_step(length: int, chunk_length: int | None, repeats: int, device: torch.device) -> dict[str, float] | None:
    """Milliseconds and the peak in MiB of a step, None where it does not fit."""
    model = make_model(chunk_length, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (1, length + 1), device=device)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()

    try:
        step()
        optimizer.zero_grad()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device) - before
        return {"ms": milliseconds(step, repeats), "peak_mib": peak / 2**20}
    except torch.OutOfMemoryError:
        return None


def scan(length: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the scan as a Mamba block calls it, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()

    wide, narrow = (1, length, SCAN_CHANNELS), (1, length, D_STATE)
    A = -torch.arange(1, D_STATE + 1, device=device).float().repeat(SCAN_CHANNELS, 1)
    leaves = {
        **{name: normal(*wide) for name in ("x", "dt", "z")},
        **{name: normal(*narrow) for name in ("B", "C")},
        "A": A.requires_grad_(),
        "D": torch.ones(SCAN_CHANNELS, device=device, requires_grad=True),
        "dt_bias": (torch.rand(SCAN_CHANNELS, generator=generator, device=device) * 4 - 6).requires_grad_(),
    }
    with torch.no_grad():
        forward = milliseconds(lambda: selective_scan(**leaves, dt_softplus=True, return_final_state=False), repeats)
    y, _ = selective_scan(**leaves, dt_softplus=True)
    dy = torch.randn_like(y)
    wanted = list(leaves.values())
    backward = milliseconds(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True), repeats)
    return {"forward_ms": forward, "backward_ms": backward}


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-length", type=int, default=65536)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    name = torch.cuda.get_device_name()
    parameters = make_model(None, device).n_parameters()
    print(f"{name}, torch {torch.__version__}, bf16, {parameters / 1e6:.2f} million parameters\n")

    off = disagreement(LENGTHS[0], LENGTHS[0] // 4 + 1, device)
    if not off <= TOLERANCE:
        raise SystemExit(f"WRONG: the gradients of chunks are off by {off:.1e}")
    rows: list[dict[str, Any]] = []
    print(f"{'tokens':>8} {'chunk_length':>13} {'ms':>9} {'us a token':>11} {'peak MiB':>9} {'MiB a token':>12}")
    for length in LENGTHS:
        for chunk_length in (None, arguments.chunk_length):
            if chunk_length is not None and chunk_length >= length:
                continue
            figures = train_step(length, chunk_length, arguments.repeats, device)
            free()
            row = {"what": "step", "length": length, "chunk_length": chunk_length, "fits": figures is not None}
            if figures is None:
                print(f"{length:8} {chunk_length!s:>13} out of memory", flush=True)
            else:
                each = {"us_a_token": 1e3 * figures["ms"] / length, "mib_a_token": figures["peak_mib"] / length}
                row |= figures | each
                print(
                    f"{length:8} {chunk_length!s:>13} {figures['ms']:9.2f} {each['us_a_token']:11.4f} "
                    f"{figures['peak_mib']:9.0f} {each['mib_a_token']:12.5f}",
                    flush=True,
                )
            rows.append(row)

    print(f"\nselective scan, 1 x {SCAN_CHANNELS} channels, d_state {D_STATE}")
    print(f"{'tokens':>8} {'forward ms':>11} {'backward ms':>12} {'ns a token, both':>17}")
    for length in LENGTHS:
        figures = scan(length, 3 * arguments.repeats, device)
        free()
        both = 1e6 * (figures["forward_ms"] + figures["backward_ms"]) / length
        print(f"{length:8} {figures['forward_ms']:11.3f} {figures['backward_ms']:12.3f} {both:17.2f}", flush=True)
        rows.append({"what": "scan", "length": length, "channels": SCAN_CHANNELS, **figures})
    if arguments.json:
        figures_of_all = {
            "gpu": name,
            "torch": torch.__version__,
            "parameters": parameters,
            "gradients_off_by": off,
            "rows": rows,
        }
        arguments.json.write_text(json_text(figures_of_all, indent=2) + "\n")


if __name__ == "__main__":
    main()
