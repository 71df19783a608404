"""How fast sound is generated: samples a second, and how many times faster than real time at 16 and 8 kHz.

`python benchmarks/audio_generation.py [--tiny] [--device cuda] [--json FILE] [--seconds 3]`: models of about 6 M
parameters (a U-Net and a stack, time-invariant and selective) for 1 and 64 sequences at once, as `mambaseq generate`
runs them and one step after the other in PyTorch, and the demo's model on the CPU. Start-up, captures and compiling are
left out: every number is of a second call. A number is told only if both ways draw the same first samples.

`--hour MINUTES` instead measures the memory that a prompt of so many minutes at 16 kHz takes beyond one of a minute,
with the demo's model. Untrained weights are as fast as trained ones.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mambaseq
from mambaseq.atomic import json_text
from mambaseq.checkpoints import ModelCard
from mambaseq.checkpoints.export import save_model
from mambaseq.generation import decode, generate
from mambaseq.generation.stretches import why_not
from mambaseq.models import SequenceModel, build_model
from mambaseq.ops.decoding import stretch
from mambaseq.runs.generation import generate_to

RATES = (16_000, 8_000)
UNET = {"name": "unet", "n_layers": 4, "pool": [4, 4], "expand": 2}
STACK = {"name": "residual", "n_layers": 8}
LTI, MAMBA = {"name": "mamba", "lti": True}, {"name": "mamba"}
MODELS: dict[str, dict[str, Any]] = {  # those of the recipe spoken_digits
    "unet, lti": {"d_model": 88, "backbone": UNET, "mixer": LTI},
    "unet, selective": {"d_model": 88, "backbone": UNET, "mixer": MAMBA},
    "unet, s4d": {
        "d_model": 72,
        "backbone": {**UNET, "mlp": True},
        "mixer": {"name": "s4d", "d_state": 32},
        "mixers": {"mlp": {"activation": "gelu"}},
    },
    "stack, lti": {"d_model": 336, "backbone": STACK, "mixer": LTI},
    "stack, selective": {"d_model": 336, "backbone": STACK, "mixer": MAMBA},
}
DEMO: dict[str, Any] = {
    "d_model": 64,
    "backbone": {"name": "residual", "n_layers": 3},
    "mixer": {"name": "mamba", "lti": True, "d_state": 16},
}
TINY = {"d_model": 8, "backbone": {"name": "unet", "n_layers": 1, "pool": [4]}, "mixer": {"name": "s4d", "d_state": 2}}


def made(spec: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], SequenceModel]:
    torch.manual_seed(0)
    tokens = {"vocab_size": 256}
    whole = {**spec, "encoder": {"name": "tokens", **tokens}, "head": {"name": "lm", **tokens}}
    return whole, build_model(whole).to(device).eval()


def seconds_of(model: SequenceModel, batch: int, samples: int, fast: bool) -> tuple[float, torch.Tensor]:
    device = next(model.parameters()).device
    prompt = torch.full((1, 1), 128, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    found = generate(model, prompt, samples, temperature=0.95, seed=0, samples=batch, cuda_graph=fast)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, found


def row(name: str, model: SequenceModel, batch: int, seconds: float, few: int) -> dict[str, Any]:
    """Both ways of a model. few: samples that are compared, and of the slow way."""
    reason = why_not(model, batch, 0, 1.0)
    first, fast = seconds_of(model, batch, few, True)
    slow_took, slow = seconds_of(model, batch, few, False)
    same = float((fast == slow).float().mean())
    took, _ = seconds_of(model, batch, few, True)
    samples = max(few, int(few * seconds / took))
    took, _ = seconds_of(model, batch, samples, True)
    rate, steps = batch * samples / took, batch * few / slow_took
    told = {
        "model": name,
        "parameters": model.n_parameters(),
        "device": next(model.parameters()).device.type,
        "batch": batch,
        "way": "one kernel" if reason is None else f"steps ({reason})",
        "samples": samples,
        "samples_per_s": round(rate),
        **{f"real_time_at_{hertz}": round(rate / hertz, 2) for hertz in RATES},
        "eager_samples_per_s": round(steps),
        "first_call_s": round(first, 2),
        "same_first_samples": round(same, 4),
    }
    if told["device"] == "cuda" and batch > 1 and reason is None:  # the other way on a GPU
        most, stretch.MOST_READ = stretch.MOST_READ, 0
        seconds_of(model, batch, few, True)
        told["graphs_samples_per_s"] = round(batch * 4 * few / seconds_of(model, batch, 4 * few, True)[0])
        stretch.MOST_READ = most
    print(json_text(told), flush=True)
    return told


def memory(minutes: float) -> dict[str, Any]:
    """Peak memory of a prompt of a minute, then of many, in this process, in MiB."""
    import soundfile

    spec, model = made(DEMO, torch.device("cpu"))
    rate, told = 16_000, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        card = ModelCard(
            spec=spec,
            tokenizer={"name": "audio/mulaw", "options": {}},
            reader="audio/audio",
            writer="audio/wav",
            reader_options={"sample_rate": rate},
            writer_options={"sample_rate": rate},
            start_ids=[128],
            length=rate,
        )
        save_model(folder / "model", model, card, mambaseq.domain.catalog()["tokenizers"].get("audio/mulaw")())
        for length in (1.0, minutes):
            prompt = folder / f"{length:g}.wav"
            with soundfile.SoundFile(prompt, "w", rate, 1, "PCM_16") as file:
                for _ in range(int(60 * length)):
                    file.write((0.1 * np.random.default_rng(0).standard_normal(rate)).astype(np.float32))
            begun = time.perf_counter()
            generate_to(folder / "model", folder / "out.wav", prompt=str(prompt), max_new_tokens=rate, device="cpu")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            told[f"{length:g} minutes"] = {"peak_mib": round(peak), "s": round(time.perf_counter() - begun, 1)}
    print(json_text(told))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of some weights for moments: whether it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="MODELS", help=f"only those of {', '.join(MODELS)}"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="that a measurement is to last, about")
    parser.add_argument("--hour", type=float, metavar="MINUTES", help="measure the memory of a long prompt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.hour is not None:
        rows: Any = memory(options.hour)
    else:
        device, rows = torch.device(options.device), []
        few = 64 if options.tiny else 200 if device.type == "cuda" else 100
        decode._WORTH_A_KERNEL = min(decode._WORTH_A_KERNEL, few)
        models = {"tiny": TINY} if options.tiny else {name: MODELS[name] for name in options.models or MODELS}
        for name, spec in models.items() if device.type == "cuda" or options.tiny or options.models else ():
            model = made(spec, device)[1]
            rows += [row(name, model, batch, options.seconds, few) for batch in options.batches]
        if not options.tiny and not options.models:
            model = made(DEMO, torch.device("cpu"))[1]
            rows += [row("the demo's", model, batch, options.seconds, 200) for batch in options.batches]
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "mambaseq": mambaseq.__version__,
    }
    if options.json is not None:
        options.json.write_text(json_text({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
