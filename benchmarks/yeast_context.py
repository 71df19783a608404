"""Two species of yeast told apart by windows of 2^20 bases, each split over the GPUs of a host: training by `mambaseq
fit` whose losses are held against those of one GPU, which reads the window in chunks.

    python benchmarks/yeast_context.py --data yeasts.fa.xz --out runs/yeasts --only one two    # 100 steps of each
    python benchmarks/yeast_context.py --data yeasts.fa.xz --out runs/8 --only train --precision bf16-mixed  # 8 minutes
    python benchmarks/yeast_context.py --tiny --out runs/tiny                                  # on two CPU processes

data: the archive that the recipe `mambaseq reproduce yeasts` describes. Chromosome VII of six strains is for training,
XV of them for validation, and IV of three other strains for test; no others have 2^20 bases without N. `--seconds` ends
what is running then, with its step done and saved, and the same command goes on with it. `results.json` has the losses
of each step, how far they are apart, tokens a second, and what the longer training ended with. One that is there is
gone on with, so that the GPUs may be measured one after the other.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mambaseq_dna.recipes.yeasts import TESTED, TRAINING

from mambaseq.atomic import atomic_file, json_text
from mambaseq.reporting.runs import RunFolder

TRAIN, VALIDATION, TEST = "chrVII", "chrXV", "chrIV"
SPECIES = {"Scer": "cerevisiae", "Spar": "paradoxus"}
# of the losses of a step, in nats, of which sums of another order are the only cause. In bf16-mixed, whose logits have
# eight bits, those of 75 steps kept it (3e-3), of 88 steps they did not (3e-2): that is for training, not for comparing
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 1e-2}
TOLERANCE_TINY = 1e-4


def wanted() -> dict[str, str]:
    """The records that are used, and their species."""
    strains = [(s, strain, (TRAIN, VALIDATION)) for s, of in TRAINING.items() for strain in of]
    strains += [(s, strain, (TEST,)) for s, of in TESTED.items() for strain in of]
    return {f"{s}_{strain}_{c}": SPECIES[s] for s, strain, chromosomes in strains for c in chromosomes}


def extract(archive: Path | None, folder: Path, length: int) -> None:
    """A FASTA file a species, of what is used; made up where there is no archive."""
    found: dict[str, list[str]] = {name: [] for name in SPECIES.values()}
    records = wanted()
    if archive is None:
        rng = np.random.default_rng(0)
        for name, species in records.items():
            share = [0.35, 0.15, 0.15, 0.35] if species == "cerevisiae" else [0.15, 0.35, 0.35, 0.15]
            found[species].append(f">{name}\n{''.join(rng.choice(list('ACGT'), 2 * length, p=share))}\n")
    else:
        with lzma.open(archive, "rt") as lines:
            for header in lines:
                letters = next(lines)
                if (species := records.get(header[1:].split()[0])) is not None:
                    found[species].append(header + letters)
    folder.mkdir(parents=True, exist_ok=True)
    for species, texts in found.items():
        with atomic_file(folder / f"{species}.fa") as file:
            file.write("".join(texts).encode())


def config(folder: Path, steps: int, precision: str, tiny: bool) -> dict[str, Any]:
    length = 256 if tiny else 2**20
    backbone = {"name": "residual", "n_layers": 2 if tiny else 8, "chunk_length": 64 if tiny else 2**16}
    return {
        "seed": 0,
        "metrics": ["accuracy"],
        "data": {
            "name": "dna/species",
            "species": {species: [str(folder / f"{species}.fa")] for species in SPECIES.values()},
            **{"validation_records": f"*_{VALIDATION}", "test_records": f"*_{TEST}", "length": length},
        },
        "loader": {"batch_size": 2, "num_workers": 0 if tiny else 2},
        "model": {
            "d_model": 16 if tiny else 256,
            "encoder": {"name": "tokens"},
            "backbone": backbone,
            "mixer": {"name": "mamba", "d_state": 16},
            # a larger scale multiplies what all windows have in common: with 32 losses began at 10 to 40
            "head": {"name": "classification", "pooling": "mean"},
        },
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 100, "schedule": "constant"},
        "checkpoint": {"every_n_steps": 50},
        "trainer": {
            **{"max_steps": steps, "accelerator": "cpu" if tiny else "gpu", "log_every_n_steps": 1},
            **{"precision": precision, "enable_progress_bar": False},
            **{"gradient_clip_val": 1.0, "limit_val_batches": 0},
        },
    }


def fit(run: Path, start: list[str], options: list[str], seconds: float) -> None:
    """`mambaseq fit`, begun or gone on with; ended by SIGTERM, with its step saved, after so many seconds. Raises
    SystemExit where it fails."""
    begin = ["--resume", str(run)] if (run / "config.yaml").is_file() else [*start, "--out", str(run)]
    command = [sys.executable, "-m", "mambaseq", "fit", *begin, *options]
    print(" ".join(command), flush=True)
    process = subprocess.Popen(command)
    try:
        if process.wait(seconds):
            sys.exit(process.returncode)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def losses(run: Path) -> dict[int, float]:
    return dict(RunFolder(run).curve("train/loss")) if (run / "config.yaml").is_file() else {}


def compared(out: Path, devices: int, steps: int, tolerance: float) -> dict[str, Any]:
    """What the runs say of themselves, or an earlier one did, and how far apart their losses are."""
    file = out / "results.json"
    former = json.loads(file.read_text()) if file.is_file() else {}
    of: dict[str, dict[int, float]] = {}
    rates: dict[str, float] = dict(former.get("tokens_per_s", {}))
    for name in ("one", "two"):
        of[name] = losses(out / name) or dict(enumerate(former.get("losses", {}).get(name, [])))
        if of[name] and (out / name / "config.yaml").is_file():
            rates[name] = RunFolder(out / name).curve("train/tokens_per_second")[-1][1]
    one, two = of["one"], of["two"]
    both = sorted(one.keys() & two.keys())[:steps]
    apart = [abs(one[step] - two[step]) for step in both]
    return {
        "devices": devices,
        "steps": len(both),
        "tolerance": tolerance,
        "largest_difference": max(apart, default=None),
        "mean_difference": sum(apart) / len(apart) if apart else None,
        "equal": bool(apart) and max(apart) <= tolerance,
        "tokens_per_s": rates,
        "losses": {"one": list(one.values()), "two": list(two.values())},
    }


def ended(run: Path) -> dict[str, Any]:
    """What a training ended with: its results, and what it said of the validation set, by step."""
    metrics = ("val/loss", "val/accuracy")
    return {**json.loads((run / "results.json").read_text()), **{name: RunFolder(run).curve(name) for name in metrics}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="yeasts.fa.xz")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the files, the runs and the results")
    parser.add_argument("--only", nargs="+", choices=("one", "two", "train"), default=("one", "two", "train"))
    parser.add_argument("--devices", type=int, default=2, help="GPUs that share a window")
    parser.add_argument("--steps", type=int, default=100, help="whose losses are compared")
    parser.add_argument("--minutes", type=float, default=8, help="of training after these")
    parser.add_argument("--seconds", type=float, default=3600, help="the most that each part may take")
    parser.add_argument("--precision", choices=TOLERANCE, default="32-true")
    parser.add_argument("--tiny", action="store_true", help="made-up sequences of 256 bases, on CPUs")
    options = parser.parse_args()
    if not options.tiny and options.data is None:
        parser.error("--data is needed: the archive of the genomes")
    out: Path = options.out.absolute()
    genomes = out / "genomes"
    if not all((genomes / f"{species}.fa").is_file() for species in SPECIES.values()):
        extract(None if options.tiny else options.data, genomes, 256)
    start = ["--config", str(out / "c.yaml")]
    (out / "c.yaml").write_text(
        json_text(config(genomes, options.steps, options.precision, options.tiny))
    )  # which is YAML
    split = [f"--model.backbone.context_parallel={options.devices}", f"--trainer.devices={options.devices}"]
    split += ["--trainer.strategy=ddp"]
    tolerance = TOLERANCE_TINY if options.tiny else TOLERANCE[options.precision]
    more = []
    if "train" in options.only:  # from the start if there is no run of `two`, whose first steps are the same
        days, rest = divmod(round(60 * options.minutes), 86_400)  # of all that was trained so far
        most = f"{days:02d}:{time.strftime('%H:%M:%S', time.gmtime(rest))}"
        more = ["--trainer.max_steps=-1", f"--trainer.max_time={most}", "--trainer.limit_val_batches=1.0"]
        more += ["--trainer.val_check_interval=200", "--trainer.check_val_every_n_epoch=null"]
    try:
        if "one" in options.only:
            fit(out / "one", start, ["--trainer.devices=1"], options.seconds)
        if "two" in options.only:
            fit(out / "two", start, split, options.seconds)
        if more:
            fit(out / "two", start, [*split, *more], options.seconds)
    finally:  # what is there when it is interrupted, too
        found = compared(out, options.devices, options.steps, tolerance)
        if more and (out / "two" / "results.json").is_file():
            found |= {"minutes": options.minutes, "trained": ended(out / "two")}
        (out / "results.json").write_text(json_text(found, indent=1) + "\n")
        print(json_text({key: value for key, value in found.items() if key != "losses"}), flush=True)
    sys.exit(0 if found["equal"] or not found["steps"] else 1)


if __name__ == "__main__":
    main()
