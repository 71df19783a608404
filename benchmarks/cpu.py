"""CPU speed beside the peers, correctness first: the Mamba block, decoding, and time a token at length.

Everything in one run: `python benchmarks/cpu.py [--quick] [--json FILE]`. Each contender runs in a process of its own
(so that peak memory is its own), with 2 threads, fp32, batch 1, d_model 768, d_state 16. The same random weights go
into all of them, and no time is printed for one whose outputs, gradients or decoded logits differ. Peers come with
`pip install 'mambaseq[eval]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambaseq.atomic import json_text

THREADS = 2
D_MODEL, D_STATE = 768, 16
TOLERANCE = 1e-4
# positions of the longest sequence on which outputs and gradients are checked
CHECKED = 4096


def timed(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def our_block() -> Any:
    import torch

    from mambaseq.mixers.mamba import Mamba

    torch.manual_seed(0)
    return Mamba(D_MODEL, D_STATE)


def peer_block(peer: str) -> Callable[[Any], Any]:
    """The peer's block with our block's weights, as a function of `(batch, length, d_model)`."""
    ours = our_block()
    if peer == "mambaseq":
        return ours
    weights = ours.state_dict()
    if peer == "mambapy":
        from mambapy.mamba import MambaBlock, MambaConfig

        block = MambaBlock(MambaConfig(d_model=D_MODEL, n_layers=1, d_state=D_STATE))
        block.load_state_dict(weights)
        return block
    if peer == "transformers":
        import transformers
        from transformers.models.mamba.modeling_mamba import MambaMixer

        transformers.logging.set_verbosity_error()
        mixer = MambaMixer(transformers.MambaConfig(hidden_size=D_MODEL, state_size=D_STATE), layer_idx=0)
        mixer.load_state_dict(weights)
        return mixer
    raise ValueError(peer)


def run_products(length: int, backward: bool, repeats: int) -> dict[str, float]:
    """The block's matrix products alone: what no implementation goes below with these products."""
    import torch
    import torch.nn.functional as F

    block = our_block()
    x = torch.randn(1, length, D_MODEL, requires_grad=backward)
    inner = torch.randn(1, length, block.d_inner, requires_grad=backward)
    low = torch.randn(1, length, block.dt_rank, requires_grad=backward)

    def once() -> None:
        parts = [
            block.in_proj(x),
            block.x_proj(inner),
            F.linear(low, block.dt_proj.weight),
            block.out_proj(inner),
        ]
        if backward:
            torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])

    with torch.set_grad_enabled(backward):
        return {"seconds": timed(once, repeats), "peak_mib": peak_mib()}


def run_block(peer: str, length: int, backward: bool, repeats: int) -> dict[str, float]:
    import torch

    if peer == "products":
        return run_products(length, backward, repeats)
    block = peer_block(peer)
    torch.manual_seed(1)
    x = torch.randn(1, length, D_MODEL)
    base = peak_mib()
    leaf = x.clone().requires_grad_(backward)

    def once() -> None:
        y = block(leaf)
        if backward:
            y.backward(torch.ones_like(y))

    with torch.set_grad_enabled(backward):
        seconds = timed(once, repeats)
    result = {"seconds": seconds, "peak_mib": peak_mib(), "added_mib": peak_mib() - base}
    # after the peak was read: what was timed, against the definition in float64
    return result | {"error": block_error(block, x if length <= CHECKED else x[:, :CHECKED], backward)}


def block_error(block: Any, x: Any, backward: bool) -> float:
    """The largest relative RMS error of the output, and of the gradients of x and of the parameters."""
    import copy

    import torch

    exact = copy.deepcopy(our_block()).double()
    exact.backend = "torch"

    def results(module: Any, x: Any) -> list[Any]:
        leaf = x.clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            y = module(leaf)
            if not backward:
                return [y]
            weights = dict(module.named_parameters())
            return [y, *torch.autograd.grad(y.square().sum(), [leaf, *(weights[name] for name in sorted(weights))])]

    pairs = zip(results(block, x), results(exact, x.double()), strict=True)
    return max(float((a.double() - e).norm() / e.norm()) for a, e in pairs)


def run_decode(peer: str, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds a token of a 24-layer model of 130M parameters, greedy, batch 1, after a prompt of 16."""
    import torch
    import transformers

    from mambaseq.checkpoints.export import weights
    from mambaseq.checkpoints.upstream import options_from_config, to_upstream
    from mambaseq.generation import generate
    from mambaseq.models import causal_lm

    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(vocab_size=50280, hidden_size=D_MODEL, num_hidden_layers=24, eos_token_id=None)
    torch.manual_seed(0)
    model = causal_lm(**options_from_config(config.to_dict())).eval()
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.load_state_dict(to_upstream(weights(model), transformers=True))
    prompt = torch.randint(0, 50280, (1, 16), generator=torch.Generator().manual_seed(2))
    tokens_to_check = torch.randint(0, 50280, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens_to_check).logits
    if peer == "transformers":

        def run(n: int) -> Any:
            return theirs.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)

        error = 0.0
    else:
        del theirs
        if peer.endswith("bf16"):
            model = model.to(torch.bfloat16)
        # every logit, one step at a time, as it is timed below
        state = model.init_state(1)
        with torch.no_grad():
            steps = [model.step_(tokens_to_check[:, t], state).float() for t in range(tokens_to_check.shape[1])]
        got = torch.stack(steps, dim=1)
        error = float((got - expected).norm() / expected.norm())

        def run(n: int) -> Any:
            return generate(model, prompt, n, temperature=0)

    with torch.no_grad():
        run(2)
        rates = []
        for _ in range(repeats):
            began = time.perf_counter()
            run(1)
            middle = time.perf_counter()
            run(1 + tokens)
            rates.append((time.perf_counter() - middle - (middle - began)) / tokens)
    return {"seconds": statistics.median(rates), "error": error, "peak_mib": peak_mib()}


def child(case: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(THREADS)
    kind = case.pop("kind")
    print("RESULT " + json_text(run_block(**case) if kind == "block" else run_decode(**case)))


def measure(**case: Any) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json_text(case)], env=environment, capture_output=True, text=True
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")


def check(name: str, result: dict[str, float], tolerance: float = TOLERANCE) -> None:
    if not result.get("error", 0.0) <= tolerance:
        raise SystemExit(f"{name} does not compute the same (relative error {result['error']:.1e}); not reported.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter sequences, fewer repeats")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    length, repeats = (512, 3) if arguments.quick else (2048, 5)
    rows: list[dict[str, Any]] = []

    def add(what: str, contender: str, result: dict[str, float], per: int = 1) -> float:
        rows.append({"what": what, "contender": contender, "seconds": result["seconds"], **result})
        added = result.get("added_mib")
        memory = f"{result['peak_mib']:8.0f} MiB peak" + ("" if added is None else f" ({added:.0f} above the start)")
        print(f"{what:<34} {contender:<16} {1e3 * result['seconds'] / per:10.3f} ms  {memory}", flush=True)
        return result["seconds"]

    print(f"{platform.processor() or platform.machine()}, {THREADS} threads, fp32, batch 1, d_model {D_MODEL}\n")
    ratios: dict[str, float] = {}
    for backward in (False, True):
        what = f"block {'forward+backward' if backward else 'forward'}, length {length}"
        times = {}
        for peer in ("mambaseq", "products", "mambapy", "transformers"):
            if peer == "transformers" and backward and not arguments.quick:
                continue  # its backward grows with the square of the length: minutes
            result = measure(kind="block", peer=peer, length=length, backward=backward, repeats=repeats)
            check(f"{peer}, {what}", result)
            times[peer] = add(what, peer, result)
        ratios |= {f"{what}: {peer} / mambaseq": seconds / times["mambaseq"] for peer, seconds in times.items()}
    if not arguments.quick:
        times = {}
        for n in (4096, 65536):
            result = measure(kind="block", peer="mambaseq", length=n, backward=True, repeats=3)
            times[n] = add(f"block forward+backward a token, {n}", "mambaseq", result, per=n) / n
        ratios["time a token, 65536 / 4096"] = times[65536] / times[4096]
    tokens = 8 if arguments.quick else 32
    times = {}
    for peer in ("mambaseq", "mambaseq-bf16", "transformers"):
        result = measure(kind="decode", peer=peer, tokens=tokens, repeats=3)
        check(peer, result, 5e-2 if peer.endswith("bf16") else TOLERANCE)
        times[peer] = add("decode, 130M shape, a token", peer, result)
    for peer in ("mambaseq", "mambaseq-bf16"):
        ratios[f"decode: transformers fp32 / {peer}"] = times["transformers"] / times[peer]
    print()
    for name, ratio in ratios.items():
        print(f"{name:<70} {ratio:6.2f}x")
    if arguments.json:
        arguments.json.write_text(json_text({"rows": rows, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
