"""What the first call of a Mamba block costs: `python benchmarks/first_call.py [--json FILE]`.

Forward and backward at 2 x 1024, d_model 768, bf16 autocast, in processes of their own: with empty caches of compiled
kernels, and again with the caches that the first one left. Seconds from the first call to its gradients; importing
PyTorch and making the CUDA context come before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mambaseq.atomic import json_text


def first_call() -> float:
    """In a process that has called nothing yet."""
    import torch

    from mambaseq.mixers.mamba import Mamba

    block = Mamba(768).cuda()
    x = torch.randn(2, 1024, 768, device="cuda", requires_grad=True)
    (x @ x.transpose(1, 2)).sum().item()  # the context, and cuBLAS
    start = time.perf_counter()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = block(x)
    y.float().square().sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(first_call())
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "MAMBASEQ_CACHE": f"{folder}/mambaseq",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "CUDA_CACHE_DISABLE": "1",
        }
        for name in ("empty caches", "warm caches"):
            command = [sys.executable, __file__, "--inside"]
            output = subprocess.run(command, env=os.environ | caches, check=True, capture_output=True, text=True).stdout
            found[name] = float(output)
            print(f"{name}: {found[name]:.2f} s", flush=True)
    if arguments.json:
        arguments.json.write_text(json_text(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
