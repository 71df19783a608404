"""The Long Range Arena (Tay et al., arXiv:2011.04006) in small: ListOps, Pathfinder and images pixel by pixel."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mambaseq.atomic import atomic_file
from mambaseq.batch import Batch
from mambaseq.data.module import ItemDataset, SequenceData
from mambaseq.errors import DataError
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import of_arrays
from mambaseq.resources import cores
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_synthetic.digits import DigitsData
from mambaseq_synthetic.listops import ListOpsData
from mambaseq_synthetic.pathfinder import PathfinderData

# Mixer's options, and what is published at the Arena's sizes, which are not ours.
MIXERS: dict[str, tuple[dict, str]] = {
    "s4": ({"mode": "fft"}, "ListOps 59.60, Pathfinder 94.20 (arXiv:2111.00396)"),
    "s4d": ({"init": "legs"}, "ListOps 60.47, Pathfinder 93.06 (S4D-LegS, arXiv:2206.11893)"),
    "s5": ({}, "ListOps 62.15, Pathfinder 95.33 (arXiv:2208.04933)"),
    "mamba": ({}, ""),
    "attention": ({}, "ListOps 36.37, Pathfinder 71.40 (Transformer, arXiv:2011.04006)"),
}
TASKS = {
    "listops": "ListOps",
    "pathfinder": "Pathfinder",
    "digits": "digits",
    "permuted_digits": "permuted digits",
}
_ENOUGH_FOR_A_WORKER = 1000  # examples: below, a process takes longer to start


@dataclasses.dataclass(frozen=True)
class Task:
    """data: where examples come from. pool: how many are trained on. steps, batch_size, lr, dropout: of training."""

    data: SequenceData
    pool: int
    steps: int
    batch_size: int
    lr: float
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Examples:
    """inputs `(examples, length)` int64, targets `(examples,)` int64, mask `(examples, length)` bool where lengths
    differ; on the device."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None


def make_task(name: str, context: Context) -> Task:
    """A task at the sizes of the context's scale."""
    at, batch_size = context.at, context.at(full=64, small=32, tiny=2)
    if name == "listops":
        data: SequenceData = ListOpsData(
            length=at(full=200, small=60, tiny=20),
            min_length=at(full=50, small=20, tiny=10),
            n_test=at(full=2000, small=500, tiny=8),
        )
        return Task(data, at(full=96_000, small=8_000, tiny=16), at(full=4_000, small=1_000, tiny=2), batch_size, 1e-3)
    if name == "pathfinder":
        data = PathfinderData(size=12, n_test=at(full=4000, small=500, tiny=8))
        pool, steps = at(full=100_000, small=32_000, tiny=16), at(full=4_000, small=3_000, tiny=2)
        return Task(data, pool, steps, batch_size, at(full=1e-3, small=2e-3, tiny=2e-3))
    return Task(
        DigitsData(permuted=name == "permuted_digits", n_test=at(full=360, small=360, tiny=10)),
        1_257,  # all that there are
        at(full=1_000, small=300, tiny=2),
        batch_size,
        at(full=2e-3, small=4e-3, tiny=4e-3),
        dropout=0.1,
    )


def run(context: Context) -> list[Table]:
    mixers, names = context.wanted(MIXERS, TASKS), context.wanted(TASKS, MIXERS)
    published = not {"listops", "pathfinder"}.isdisjoint(names)
    lines = {mixer: Line(mixer, {}, MIXERS[mixer][1] if published else "") for mixer in mixers}
    for name in names:  # one after the other, since each has its pool on the device
        task = make_task(name, context)
        pools = _Pools(context, name, task)
        for mixer, line in lines.items():
            found = context.over_seeds(
                f"{mixer} {name} steps={task.steps}",
                lambda seed, checkpoint, mixer=mixer, task=task, pools=pools: _trial(  # type: ignore[misc]
                    context, mixer, task, pools, seed, checkpoint
                ),
            )
            line.values[name] = found["accuracy"]
            before = line.values.get("parameters", found["parameters"])
            line.values["parameters"] = [max(pair) for pair in zip(before, found["parameters"], strict=True)]
    columns = [Column(name, TASKS[name], 1, percent=True) for name in names]
    columns.append(Column("parameters", "parameters", 0))
    return [Table("Long Range Arena, in small", _about(context, names), columns, list(lines.values()))]


def _about(context: Context, names: list[str]) -> str:
    tasks = {name: make_task(name, context) for name in names}
    sizes = {
        "listops": "ListOps has expressions of {data.min_length} to {data.length} tokens (the Arena: 500 to 2,000)",
        "pathfinder": "Pathfinder {data.size} by {data.size} pixels and paths of our own (32 by 32)",
        "digits": "digits are 8 by 8 pixels (MNIST: 28 by 28) of {data.vocab_size} grey levels, row by row",
        "permuted_digits": "permuted digits the same in an order drawn once",
    }
    said = "; ".join(sizes[name].format(data=task.data) for name, task in tasks.items())
    trained = "; ".join(
        f"{TASKS[name]} {task.steps:,} steps on {task.pool:,} examples at {task.lr:g}" for name, task in tasks.items()
    )
    d_model, n_layers = _size(context)
    batch_size = next(iter(tasks.values())).batch_size
    return (
        "Share of test sequences that are classified rightly, after the last step. All mixers in the same causal stack "
        f"of {n_layers} layers, d_model {d_model}, a classifier of the mean over positions; attention has its MLPs. "
        f"{said}. Batches of {batch_size}, AdamW with warm-up and cosine: {trained}. "
        "The papers' figures, in percent, are those at the Arena's sizes (in brackets), with larger models trained for "
        "longer: to compare mixers with each other, not with ours. Parameters are those of the largest task's model."
    )


def _size(context: Context) -> tuple[int, int]:
    """d_model and the number of layers."""
    return context.at(full=128, small=32, tiny=8), context.at(full=4, small=2, tiny=1)


class _Pools:
    """A task's examples, drawn once: in the context's folder for later runs, on the device for this one."""

    def __init__(self, context: Context, name: str, task: Task) -> None:
        self.context, self.name, self.task = context, name, task
        self._found: dict[str, Examples] = {}

    def __call__(self, split: str) -> Examples:
        """Those to train on ("train"), which are the same for all seeds, or to test on ("test")."""
        if split not in self._found:
            self.task.data.setup()
            items: ItemDataset = getattr(self.task.data, split)()
            n = min(self.task.pool, len(items)) if split == "train" else len(items)
            path = self.context.folder / "pools" / f"{self.name}-{self.task.data.length}-{split}-{n}.npz"
            self._found[split] = _read(path, items, n, self.context.device)
        return self._found[split]


def _as_arrays(items: list[Batch]) -> list[tuple[np.ndarray, int]]:
    """Tokens and class of each, as what a process hands over cheaply."""
    return [(item.inputs[0].numpy().astype(np.uint8), int(item.targets)) for item in items if item.targets is not None]


def _read(path: Path, items: ItemDataset, n: int, device: torch.device) -> Examples:
    """The first n items, from the file if it is there, else drawn and written to it."""
    if not path.exists():
        workers = min(cores(), n // _ENOUGH_FOR_A_WORKER)
        loader: DataLoader = DataLoader(Subset(items, range(n)), 256, num_workers=workers, collate_fn=_as_arrays)  # type: ignore[arg-type]
        drawn = [one for some in tqdm(loader, desc=path.stem, leave=False, disable=None) for one in some]
        padded = np.zeros((n, max(len(tokens) for tokens, _ in drawn)), dtype=np.uint8)
        for row, (tokens, _) in zip(padded, drawn, strict=True):
            row[: len(tokens)] = tokens
        with atomic_file(path) as file:
            np.savez(
                file,
                inputs=padded,
                targets=np.array([target for _, target in drawn], dtype=np.uint8),
                lengths=np.array([len(tokens) for tokens, _ in drawn]),
            )
    try:
        # opened here: numpy leaves a damaged archive open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            inputs, targets, lengths = (torch.from_numpy(found[key]) for key in ("inputs", "targets", "lengths"))
        if not len(inputs) == len(targets) == len(lengths) == n or int(lengths.max()) != inputs.shape[1]:
            raise ValueError("its arrays are not of one size")
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({str(error)[:200]}). Remove it; it is drawn again.") from error
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    return Examples(inputs.long().to(device), targets.long().to(device), None if mask.all() else mask.to(device))


def make_model(mixer: str, task: Task, context: Context) -> SequenceModel:
    """A classifier of the mean over positions; see `ClassificationHead` for its scale."""
    d_model, n_layers = _size(context)
    spec = {
        "d_model": d_model,
        "encoder": {"name": "tokens", "vocab_size": task.data.vocab_size},
        "backbone": {"name": "residual", "n_layers": n_layers, "dropout": task.dropout},
        "mixer": {"name": mixer, **MIXERS[mixer][0]},
        "head": {
            "name": "classification",
            "n_classes": len(task.data.class_names),
            "scale": task.data.length**0.5 / 4,
        },
    }
    return build_model(spec).to(context.device)


def _trial(
    context: Context, mixer: str, task: Task, pools: Callable[[str], Examples], seed: int, checkpoint: Path
) -> dict[str, float]:
    torch.manual_seed(seed)
    model = make_model(mixer, task, context)
    pool = pools("train")
    trained = train(
        model,
        of_arrays(pool.inputs, pool.targets, pool.mask, task.batch_size, seed),
        task.steps,
        OptimizerConfig(lr=task.lr, weight_decay=0.05, beta2=0.999, warmup_steps=task.steps // 10),
        checkpoint=checkpoint,
        label=f"{mixer} {task.data.__class__.__name__}",
    )
    return {
        "accuracy": accuracy(model, pools("test")),
        "loss": trained.loss,
        "parameters": model.n_parameters(),
        "steps_per_s": trained.steps_per_second,
    }


@torch.no_grad()
def accuracy(model: SequenceModel, examples: Examples, batch_size: int = 250) -> float:
    """Share of examples that are classified rightly."""
    right = torch.zeros((), dtype=torch.int64, device=examples.inputs.device)
    for some in torch.arange(len(examples.inputs), device=right.device).split(batch_size):
        logits = model(examples.inputs[some], mask=None if examples.mask is None else examples.mask[some]).logits
        assert logits is not None
        right += (logits.argmax(-1) == examples.targets[some]).sum()
    return int(right) / len(examples.inputs)


recipe = Recipe(run, seeds=3)
