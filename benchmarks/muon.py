"""Muon against AdamW on text, at equal time: what each reaches of bits a byte on text that it has not seen.

    python benchmarks/muon.py --data books/*.txt --seconds 60 --seeds 3

Both train the same model, from the same weights and on the same batches, for as many steps as fit into the same time on
this machine: the time of a step is measured first. Each takes the best of the learning rates, found with a seed of its
own. Printed are the mean over seeds and their standard deviation.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
import time
from pathlib import Path

import torch

from mambaseq.models import SequenceModel, causal_lm
from mambaseq.resources import find
from mambaseq.tasks.optimizer import OptimizerConfig, make_optimizer

NAMES = ("adamw", "muon")


def read_bytes(paths: list[Path]) -> torch.Tensor:
    """The bytes of all files, one after another: `(n,)` uint8. Those that end in .gz are unpacked."""
    contents = [gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in paths]
    return torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)


class Bench:
    """One model's training. arguments: of the command line; train, validation: `(n,)` uint8."""

    def __init__(self, arguments: argparse.Namespace, train: torch.Tensor, validation: torch.Tensor) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.train, self.validation = train.to(self.device), validation.to(self.device)

    def clock(self) -> float:
        """Seconds: of this process alone on a CPU, which others may be using too."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def batch(self, part: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """`(batch, length + 1)` int64 windows of a part."""
        length = self.arguments.length
        starts = torch.randint(len(part) - length - 1, (self.arguments.batch,), generator=generator)
        return part[starts.to(self.device)[:, None] + torch.arange(length + 1, device=self.device)].long()

    def loss(self, model: SequenceModel, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        assert loss is not None
        return loss

    def run(self, name: str, lr: float, seed: int, steps: int) -> tuple[float, float]:
        """Bits a byte on the validation part after so many steps, and the seconds of a step."""
        torch.manual_seed(seed)
        model = causal_lm(256, self.arguments.d_model, self.arguments.layers).to(self.device)
        config = OptimizerConfig(name=name, lr=lr, warmup_steps=min(20, steps // 5))  # type: ignore[arg-type]
        optimizer, schedule = make_optimizer(model, config, steps)
        drawn = torch.Generator().manual_seed(seed)
        began = self.clock()
        for step in range(steps):
            if step == 3:  # kernels are compiled by then
                began = self.clock()
            self.loss(model, self.batch(self.train, drawn)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        seconds = (self.clock() - began) / max(1, steps - 3)
        fixed = torch.Generator().manual_seed(0)
        with torch.no_grad():
            losses = [float(self.loss(model, self.batch(self.validation, fixed))) for _ in range(32)]
        return statistics.mean(losses) / math.log(2), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, help="files of text; the shipped Shakespeare when left out")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--lrs", nargs="+", type=float, default=[2e-3, 6e-3, 1.8e-2], help="of which each takes its best"
    )
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    text = read_bytes(arguments.data or [find("mambaseq:data/text/tinyshakespeare.txt")])
    cut = len(text) * 9 // 10
    bench = Bench(arguments, text[:cut], text[cut:])
    # a step's time in turns, so that a machine that slows down slows both
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(3):
        for name in NAMES:
            times[name].append(bench.run(name, 1e-3, 0, 13)[1])
    steps = {name: max(20, int(arguments.seconds / statistics.median(times[name]))) for name in NAMES}
    where = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"a CPU, {torch.get_num_threads()} thread(s)"
    )
    print(f"{len(text):,} bytes; {arguments.seconds:.0f} s a run on {where}; {arguments.seeds} seeds\n", flush=True)
    print("| optimizer | lr | ms a step | steps | bits a byte |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in NAMES:
        tried = {lr: bench.run(name, lr, 1000, steps[name])[0] for lr in arguments.lrs}
        lr = min(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)
        found = [bench.run(name, lr, seed, steps[name])[0] for seed in range(arguments.seeds)]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        milliseconds = 1000 * statistics.median(times[name])
        print(
            f"| {name} | {lr:g} (of {', '.join(f'{rate:g}: {bits:.3f}' for rate, bits in tried.items())}) | "
            f"{milliseconds:.0f} | {steps[name]} | {statistics.mean(found):.4f} ± {spread:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
