"""Where the time of a decode step on a GPU goes, and which way of it is fastest.

`python benchmarks/decode_parts.py [--only PART ...] [--seconds N] [--json FILE]`: every variant runs in a process of
its own, is held against the plain operations first, and is stopped if it hangs. Parts:

    step     a whole greedy step from its graph, by model and batch: `plain` (single operations), `layers` (one
             sequence: a layer is four kernels, each started before the one in front has ended; several: five),
             `rows` (several: dt_proj, scan and gate are one kernel), and these with other tile sizes or without
             early starts. With the floor of reading weights and states, and kernels a step.
    gemv     each linear map of the 1.4B and 130M models for one row: GB/s of cuBLAS and of tile sizes of ours.
    profile  the kernels of one step, by model, batch and name: count and microseconds.
    prefill  2,048 tokens at batch 1: plain, and replayed from a graph.
    reading  the same by name of kernel, calls in a row and one alone, and a whole call for one token; with the scan's
             threads of two states; beside the Transformer of `bench decode`, as it is and captured.
    ssd      Mamba-2's state update at batch 128, fp32 and bf16 states, elements a program: GB/s.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambaseq.atomic import json_text

MODELS = {
    "130M": {"d_model": 768, "n_layers": 24, "mixer": "mamba"},
    "1.4B": {"d_model": 2048, "n_layers": 48, "mixer": "mamba"},
    "mamba2": {"d_model": 2048, "n_layers": 48, "mixer": "mamba2"},
}
VOCABULARY = 50280
# settings of the tuning of `ops.decoding.layer` (one row), and of `ops.decoding.rows` and under "layers" of
# `ops.decoding.layer_rows` (several)
Settings = dict[str, Any]
ONE_ROW: dict[str, Settings] = {
    "plain": {"on": False},
    "layers": {},
    "layers, waiting": {"pdl": False},
    "layers, 4096 held by 4 warps": {"held": 4096, "held_warps": 4},
    "layers, 8192 held by 8 warps": {"held": 8192, "held_warps": 8},
    "layers, 16384 held by 8 warps": {"held": 16384, "held_warps": 8},
}
LAYERS: Settings = {"untried": True}
ROWS: dict[str, Settings] = {
    "plain": {"on": False},
    "rows": {"untried": True},
    "layers": {"untried": True, "layers": LAYERS},
    "layers, waiting": {"untried": True, "layers": LAYERS | {"early": False}},
    "layers, in_proj by cuBLAS": {"untried": True, "layers": LAYERS | {"in_tile": None}},
    "layers, out_proj by cuBLAS": {"untried": True, "layers": LAYERS | {"out_tile": None}},
    "layers, half as many states a thread": {"untried": True, "held": 8, "layers": LAYERS},
}
STEPS = [("1.4B", n) for n in (1, 2, 4, 16, 64, 128)] + [("130M", n) for n in (1, 2, 4, 8, 64, 256)]
STEPS += [("mamba2", 1), ("mamba2", 128)]
COMPILERS = 4  # processes that compile a step's variants
LONGEST_S = 60.0  # that a process may take


def model_of(name: str, n_layers: int | None = None) -> Any:
    import torch

    from mambaseq.models import causal_lm

    torch.manual_seed(0)
    sizes = MODELS[name] | ({} if n_layers is None else {"n_layers": n_layers})
    with torch.device("cuda"):
        model = causal_lm(vocab_size=VOCABULARY, **sizes)  # type: ignore[arg-type]
    model.get_parameter("encoder.embedding.weight").data.mul_(0.1)
    return model.bfloat16().eval()


def seconds_of(run: Callable[[], Any], calls: int, samples: int = 5) -> float:
    """The best of some samples, by events."""
    import torch

    run()
    found = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / calls / 1e3)
    return min(found)


def kernels_of(run: Callable[[], Any], calls: int) -> list[Any]:
    """What ran on the GPU in some calls."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def logits_of(model: Any, batch: int, positions: int = 6) -> Any:
    """Those of some steps from an empty state, which every way has to give."""
    import torch

    state = model.init_state(batch)
    tokens = torch.randint(
        VOCABULARY, (positions, batch), device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    with torch.no_grad():
        return torch.stack([model.step_(token, state) for token in tokens])


def variants_of(batch: int) -> dict[str, Settings]:
    return ONE_ROW if batch == 1 else ROWS


def tune(batch: int, settings: Settings) -> None:
    from mambaseq.ops.decoding import layer, layer_rows, rows

    if batch == 1:
        layer.tuning = layer.Tuning(**settings)
    else:
        whole = settings.get("layers", {"on": False})
        layer_rows.tuning = layer_rows.Tuning(**whole)
        rows.tuning = rows.Tuning(**{key: value for key, value in settings.items() if key != "layers"})


def run_steps(model: str, batch: int, only_compile: int | None = None) -> None:
    """only_compile: the variants from this one on, every `COMPILERS`th."""
    import torch

    from mambaseq.benchmarking.floors import peak
    from mambaseq.generation import Decoder

    variants = variants_of(batch)
    small = model_of(model, 4)
    if only_compile is not None:
        for settings in list(variants.values())[only_compile::COMPILERS]:
            tune(batch, settings)
            logits_of(small, batch, 1)
        return
    whole = model_of(model)
    tune(batch, variants["plain"])
    expected = logits_of(small, batch)
    # the same by fp32 weights, so that a difference of the ways is not taken for an error
    exact = logits_of(small.float(), batch)
    small = small.bfloat16()
    error_of_plain = float((expected - exact).norm() / exact.norm())
    held = sum(p.numel() * p.element_size() for p in whole.parameters())
    held += 2 * sum(t.numel() * t.element_size() for one in whole.init_state(batch) for t in one.tensors().values())
    floor = held / peak(torch.device("cuda")).bytes_per_s
    first = None
    for name, settings in variants.items():
        row: dict[str, Any] = {"part": "step", "model": model, "batch": batch, "variant": name}
        try:
            tune(batch, settings)
            got = logits_of(small, batch)
            row["error"], row["error_of_plain"] = float((got - exact).norm() / exact.norm()), error_of_plain
            if not row["error"] <= 1.5 * error_of_plain + 1e-3:
                row["wrong"] = True
                print(json_text(row), flush=True)
                continue
            with torch.no_grad():
                decoder = Decoder(whole, whole.init_state(batch), greedy=True)
                token = torch.zeros(batch, dtype=torch.long, device="cuda")
                for _ in range(4):
                    token, _ = decoder.step(token)
                row["captured"] = decoder.captured

                def step(decoder: Any = decoder) -> None:
                    nonlocal token
                    token, _ = decoder.step(token)

                took = seconds_of(step, 20)
                first = took if first is None else first
                row |= {"us": took * 1e6, "tokens_per_s": batch / took, "of_floor": floor / took}
                row["times_plain"] = first / took
                row["kernels"] = len(kernels_of(step, 4)) / 4
            del decoder
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(json_text(row), flush=True)
        torch.cuda.empty_cache()


def run_gemv() -> None:
    import torch

    from mambaseq.benchmarking.floors import peak
    from mambaseq.ops.decoding import layer

    best = peak(torch.device("cuda")).bytes_per_s
    shapes = {
        "1.4B in_proj": (8192, 2048),
        "1.4B x_proj": (160, 4096),
        "1.4B out_proj": (2048, 4096),
        "1.4B head": (VOCABULARY, 2048),
        "130M out_proj": (768, 1536),
        "130M head": (VOCABULARY, 768),
    }
    ways = [(None, None), (4096, 4), (8192, 4), (16384, 8), (32768, 8)]
    for name, (n_out, n_in) in shapes.items():
        # enough copies that none is in the cache when its turn comes
        copies = max(2, int(2e8 // (n_out * n_in * 2)) + 1)
        weights = torch.randn(min(copies, 64), n_out, n_in, device="cuda").div_(n_in**0.5).bfloat16()
        x = torch.randn(1, n_in, device="cuda").bfloat16()
        for held, warps in ways:
            row: dict[str, Any] = {
                "part": "gemv",
                "shape": name,
                "variant": "cuBLAS" if held is None else f"{held}, {warps}",
            }
            try:
                layer.tuning = layer.Tuning(**({} if held is None else {"held": held, "held_warps": warps}))

                def call(weight: Any, held: Any = held, x: Any = x) -> Any:
                    if held is None:
                        return torch.nn.functional.linear(x, weight)
                    return layer.linear_step(x, weight, out_dtype=torch.bfloat16)

                error = float((call(weights[0]).float() - x.float() @ weights[0].float().t()).abs().max())
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for weight in weights:
                        call(weight)
                took = seconds_of(graph.replay, 1) / len(weights)
                rate = n_out * n_in * 2 / took
                row |= {
                    "error": error,
                    "wrong": error > 0.05,
                    "us": took * 1e6,
                    "gb_per_s": rate / 1e9,
                    "of_peak": rate / best,
                }
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            print(json_text(row), flush=True)
        del weights
        torch.cuda.empty_cache()


def run_profile(model: str, batch: int) -> None:
    import torch

    from mambaseq.generation import Decoder

    whole = model_of(model)
    for name, settings in list(variants_of(batch).items())[:2]:
        tune(batch, settings)
        with torch.no_grad():
            decoder = Decoder(whole, whole.init_state(batch), greedy=True)
            token = torch.zeros(batch, dtype=torch.long, device="cuda")
            for _ in range(4):
                token, _ = decoder.step(token)
            events = kernels_of(functools.partial(decoder.step, token), 1)
        show_kernels({"part": "profile", "model": model, "batch": batch, "variant": name}, events)


def show_kernels(row: dict[str, Any], events: list[Any], most: int = 12) -> None:
    import collections

    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        found[event.name[:60]].append(event.device_time)
    for kernel, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:most]:
        told = {"kernel": kernel, "count": len(times), "us_each": sum(times) / len(times), "us": sum(times)}
        print(json_text(row | told), flush=True)
    whole = sum(event.device_time for event in events)
    print(json_text(row | {"kernel": "all", "count": len(events), "us": whole}), flush=True)


def run_prefill() -> None:
    import torch

    from mambaseq.generation.prompts import Prompts
    from mambaseq.generation.reading import prefill

    for name in ("1.4B", "130M"):
        model = model_of(name)
        ids = torch.randint(VOCABULARY, (1, 2048), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        with torch.no_grad():
            plain = prefill(model, Prompts.of(ids), None, cuda_graph=False)
            for _ in range(4):
                replayed = prefill(model, Prompts.of(ids), None)
            same = torch.equal(plain[1], replayed[1]) and all(
                torch.equal(a, b)
                for one, other in zip(plain[0], replayed[0], strict=True)
                for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True)
            )
            difference = float((plain[1] - replayed[1]).norm() / plain[1].norm())
            for variant, wanted in (("plain", False), ("graph", True)):
                took = seconds_of(functools.partial(prefill, model, Prompts.of(ids), None, cuda_graph=wanted), 3)
                row = {"part": "prefill", "model": name, "variant": variant, "ms": took * 1e3, "same_bits": same}
                print(json_text(row | {"error": difference, "wrong": difference > 1e-2}), flush=True)


def run_reading(model: str) -> None:
    import statistics

    import torch

    from mambaseq.benchmarking import decode
    from mambaseq.generation import generate, read_graphs
    from mambaseq.generation.prompts import Prompts
    from mambaseq.generation.reading import prefill
    from mambaseq.ops.selective_scan import segments

    ids = torch.randint(VOCABULARY, (1, 2048), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    ours = model_of(model)
    sizes = next(sizes for sizes in decode.SIZES["full"] if sizes.name == model)
    theirs: Any = decode._transformer(sizes, torch.device("cuda")).generate(1, 2048, 2)
    plain: Any = None

    def told(run: Callable[[], Any]) -> dict[str, Any]:
        took = seconds_of(run, 5)
        hosts, wholes = [], []
        for _ in range(9):
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            hosts.append(time.perf_counter() - began)
            torch.cuda.synchronize()
            wholes.append(time.perf_counter() - began)
        host, whole = (statistics.median(one) * 1e3 for one in (hosts, wholes))
        return {"ms": took * 1e3, "alone_ms": whole, "host_ms": host}

    def show(name: str, run: Callable[[], Any], kernels: int) -> None:
        row: dict[str, Any] = {"part": "reading", "model": model, "variant": name}
        for _ in range(4):
            out = run()
        if name.startswith("prefill"):
            error = float((out[1] - plain[1]).norm() / plain[1].norm())
            row |= {"error": error, "wrong": not error < 1e-2}
        print(json_text(row | told(run)), flush=True)
        if kernels:
            show_kernels(row, kernels_of(run, 1), kernels)

    def read() -> Any:
        return prefill(ours, Prompts.of(ids), None)

    def captured() -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            theirs.token.copy_(theirs.model.extend_(ids, theirs.cache, 0).argmax(-1))
        return graph.replay

    with torch.no_grad():
        plain = prefill(ours, Prompts.of(ids), None, cuda_graph=False)
        show("prefill", read, 13)
        show("one token", lambda: generate(ours, ids, 1, temperature=0), 0)
        (graph,) = read_graphs._known[ours].graphs.values()
        show("its graph alone", graph.graph.replay, 0)
        chosen = segments.narrow_states
        segments.narrow_states = lambda *shape: min(chosen(*shape), 2)
        read_graphs._known.clear()
        show("prefill, two states a thread at most", read, 3)
        show("Transformer", lambda: theirs(ids, 1), 6)
        show("Transformer, captured", captured(), 0)


def run_ssd() -> None:
    import torch

    from mambaseq.benchmarking.floors import peak
    from mambaseq.ops.decoding import gpu

    best = peak(torch.device("cuda")).bytes_per_s
    batch, heads, head_dim, d_state = 128, 64, 64, 128
    x = torch.randn(batch, heads, head_dim, device="cuda").bfloat16()
    dt, A = torch.rand(batch, heads, device="cuda").bfloat16(), -torch.rand(heads, device="cuda")
    B, C = (torch.randn(batch, 1, d_state, device="cuda").bfloat16() for _ in range(2))
    given = (x, dt, A, B, C, None, None, True)
    for dtype in (torch.float32, torch.bfloat16):
        state = torch.randn(batch, heads, head_dim, d_state, device="cuda").to(dtype)
        for elements in (512, 1024, 2048, 4096):
            row = {"part": "ssd", "variant": f"{str(dtype)[6:]} states, {elements} a program"}
            try:
                gpu._OF_HEADS = elements
                took = seconds_of(lambda state=state: gpu.ssd_update_(state, *given), 10)  # type: ignore[misc]
                rate = 2 * state.numel() * state.element_size() / took
                row |= {"us": took * 1e6, "gb_per_s": rate / 1e9, "of_peak": rate / best}
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            print(json_text(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], help="step, gemv, profile, prefill, reading, ssd, or step:1.4B:1"
    )
    parser.add_argument("--seconds", type=float, default=190, help="after which no further process is begun")
    parser.add_argument("--json", type=Path, help="write the rows here too, as they come")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, *where = arguments.child.split(":")
        if what == "step":
            run_steps(where[0], int(where[1]))
        elif what == "compile":
            run_steps(where[0], int(where[1]), int(where[2]))
        elif what == "profile":
            run_profile(where[0], int(where[1]))
        elif what == "reading":
            run_reading(where[0])
        else:
            {"gemv": run_gemv, "prefill": run_prefill, "ssd": run_ssd}[what]()
        return
    parts = ["profile:130M:64", "reading:130M", "reading:1.4B", *(f"step:{name}:{batch}" for name, batch in STEPS)]
    parts += ["prefill", "gemv", "ssd", "profile:130M:8", "profile:1.4B:1", "profile:1.4B:64"]
    parts = [p for p in parts if not arguments.only or any(one in (p, p.split(":")[0]) for one in arguments.only)]
    began, rows = time.monotonic(), []
    # kernels of all variants are compiled side by side first: one after the other that takes longer than the measuring
    compiled = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", f"{part.replace('step', 'compile')}:{number}"],
            stderr=subprocess.DEVNULL,
        )
        for part in parts
        if part.startswith("step")
        for number in range(COMPILERS)
    ]
    for process in compiled:
        try:
            process.wait(max(1.0, LONGEST_S - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    for part in parts:
        left = arguments.seconds - (time.monotonic() - began)
        if left < 5:
            print(f"{part}: the time is up")
            continue
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, errors = child.communicate(timeout=min(LONGEST_S, left))
        except subprocess.TimeoutExpired:
            child.kill()
            out, errors = child.communicate()
            print(f"{part}: stopped, it took too long")
        for line in out.splitlines():
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            rows.append(row)
            values = (f"{k} {v:,.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(("WRONG  " if row.get("wrong") else "") + "  ".join(values), flush=True)
        if child.returncode and errors:
            print(f"{part}: {errors.strip().splitlines()[-1][:300]}", flush=True)
        if arguments.json:
            arguments.json.write_text(json_text(rows, indent=1) + "\n")
    wrong = [row for row in rows if row.get("wrong") or row.get("failed")]
    best: dict[str, Any] = {}
    for row in rows:
        if row["part"] == "step" and "us" in row:
            key = f"{row['model']}, batch {row['batch']}"
            if key not in best or row["us"] < best[key]["us"]:
                best[key] = row
    for key, row in best.items():
        print(
            f"fastest of {key}: {row['variant']}, {row['tokens_per_s']:,.0f} tokens/s, {row['times_plain']:.2f}x plain"
        )
    print(f"{time.monotonic() - began:.0f} s; wrong or failed: {len(wrong)}")
    sys.exit(1 if any(row.get("wrong") for row in rows) else 0)


if __name__ == "__main__":
    main()
