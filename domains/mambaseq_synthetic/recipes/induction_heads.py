"""Induction heads (Gu and Dao, arXiv:2312.00752, section 4.1.2): trained at length 256, tested up to a million."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from torch import Tensor

from mambaseq.benchmarking.timing import peak_bytes
from mambaseq.mixers.base import Mixer
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import drawn
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_synthetic.drawing import TEST, VALIDATION
from mambaseq_synthetic.induction_heads import draw

VOCABULARY = 16
# Learning rates at full scale. At length 256 attention does not learn at 1e-3.
MODELS = {"mamba": 2e-3, "s4d": 2e-4, "attention": 2e-4}
PAPER = {
    "mamba": "100 % at every length up to 2^20",
    "attention": "none but Mamba goes beyond twice the training length",
}
_CHUNK = 2**16  # positions
# Of each length as many sequences are tested as have so many tokens, within these numbers; validated are twice as many.
_TOKENS, _FEWEST, _MOST = 2**22, 64, 512
_LONGEST_WHOLE = 2**17  # of mixers whose state grows: longer ones take hours and show nothing new


def run(context: Context) -> list[Table]:
    length = context.at(full=256, small=64, tiny=16)
    longest = context.at(full=20, small=12, tiny=5)
    lengths = [2**k for k in range(context.at(full=6, small=6, tiny=4), longest + 1)]
    steps = context.at(full=200_000, small=3_000, tiny=2)
    batch_size = context.at(full=32, small=16, tiny=2)
    lines = []
    names = context.wanted(MODELS)
    for name in names:
        # those that are to fail take all of the steps, which one seed shows
        seeds = context.seeds if name == "mamba" else context.seeds[:1]
        values = dataclasses.replace(context, seeds=seeds).over_seeds(
            f"{name} steps={steps}",
            lambda seed, checkpoint, name=name: _trial(  # type: ignore[misc]
                context, name, seed, checkpoint, length, lengths, steps, batch_size
            ),
        )
        lines.append(Line(name, values, PAPER.get(name, ""), _wanted(name, length, lengths)))
    columns = [Column(_key(n), f"2^{n.bit_length() - 1}", 0, percent=True) for n in lengths]
    more = [
        Column("parameters", "parameters", 0),
        Column("steps", "steps", 0),
        Column("minutes", "minutes", 1),
        Column("steps_per_s", "steps/s", 0),
        Column("eager_steps_per_s", "steps/s, not captured", 0),
        Column("mib_at_chunk", f"MiB to read 2^{_CHUNK.bit_length() - 1}", 0),
        Column("mib_at_longest", "MiB to read the longest", 0),
    ]
    about = (
        "Share of test sequences whose last token is right, by length. Two layers, d_model 64, trained at length "
        f"{length} with batches of {batch_size}, AdamW at a constant learning rate after a warm-up "
        f"({', '.join(f'{name} {_rate(context, name):g}' for name in names)}), {steps:,} steps or until all validation "
        f"sequences of every length are right ({2 * _tested(lengths[0]):,} of the shortest to "
        f"{2 * _tested(lengths[-1]):,} of the longest; half as many are tested): how far what is learned at {length} "
        f"holds goes up and down. Of S4D and attention one seed. "
        f"Long sequences are run in chunks of {_CHUNK:,}, the state handed on. On a GPU the whole training step is "
        "replayed from a CUDA graph."
    )
    return [Table("Induction heads", about, [*columns, *more], lines)]


def _key(length: int) -> str:
    return f"accuracy at {length}"


def _wanted(name: str, length: int, lengths: list[int]) -> tuple[Bound, ...]:
    if name == "mamba":
        return tuple(Bound(_key(n), ">=", 1.0) for n in lengths)
    return tuple(Bound(_key(n), "<=", 0.9) for n in lengths if n >= 4 * length)


def _trial(
    context: Context,
    name: str,
    seed: int,
    checkpoint: Path,
    length: int,
    lengths: list[int],
    steps: int,
    batch_size: int,
) -> dict[str, float]:
    torch.manual_seed(seed)

    def make() -> SequenceModel:
        return causal_lm(VOCABULARY, 64, 2, name).to(context.device)

    batches = drawn(functools.partial(draw, length=length, vocab_size=VOCABULARY), batch_size, seed)
    config = OptimizerConfig(
        lr=_rate(context, name), weight_decay=0.0, beta2=0.999, warmup_steps=min(1000, steps // 2), schedule="constant"
    )
    eager = train(make(), batches, min(steps, 50), config, cuda_graph=False) if context.device.type == "cuda" else None
    model = make()
    readable = [n for n in lengths if _bounded(model) or n <= _LONGEST_WHOLE]

    def right_at_all() -> bool:
        return all(accuracy(model, VALIDATION, n, 2 * _tested(n)) == 1 for n in readable)

    trained = train(
        model,
        batches,
        steps,
        config,
        checkpoint=checkpoint,
        finished=right_at_all,
        check_every=context.at(full=2_000, small=500, tiny=1),
        label=name,
    )
    found = {_key(n): accuracy(model, TEST, n, _tested(n)) for n in readable}
    found |= {"parameters": model.n_parameters(), "steps": trained.steps, "minutes": trained.seconds / 60}
    found |= {"steps_per_s": trained.steps_per_second}
    if eager is not None:
        found["eager_steps_per_s"] = eager.steps_per_second
        for key, n in (("mib_at_chunk", _CHUNK), ("mib_at_longest", readable[-1])):
            found[key] = _memory(model, n)
    return found


def _rate(context: Context, name: str) -> float:
    return context.at(full=MODELS[name], small=1e-3, tiny=1e-3)


def _tested(length: int) -> int:
    """How many sequences of a length."""
    return max(_FEWEST, min(_MOST, _TOKENS // length))


def _bounded(model: SequenceModel) -> bool:
    return all(mixer.bounded_state for mixer in model.modules() if isinstance(mixer, Mixer))


@torch.no_grad()
def accuracy(model: SequenceModel, seed: int, length: int, n: int) -> float:
    """Of the last token of the first n sequences of a set."""
    device = next(model.parameters()).device
    right = 0
    inputs, labels = draw(seed, torch.arange(n, device=device), length=length, vocab_size=VOCABULARY)
    together = max(1, 2**20 // min(length, _CHUNK if _bounded(model) else length))
    for some, targets in zip(inputs.split(together), labels[:, -1].split(together), strict=True):
        right += int((_last_logits(model, some).argmax(-1) == targets).sum())
    return right / n


def _last_logits(model: SequenceModel, tokens: Tensor) -> Tensor:
    """`(batch, vocab_size)` after tokens `(batch, length)`: read in chunks where the state is bounded, else whole."""
    bounded = _bounded(model)
    state = None
    for part in tokens.split(_CHUNK if bounded else tokens.shape[1], dim=1):
        x = model.backbone(model.encoder(part), state=state, return_state=bounded)
        x, state = x if bounded else (x, None)
    return model.head(x[:, -1:])[1][:, -1]


@torch.no_grad()
def _memory(model: SequenceModel, length: int) -> float:
    """MiB that reading one sequence allocates on the GPU at most, besides the model and the sequence."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    return (peak_bytes(lambda: _last_logits(model, tokens), device) or 0) / 2**20


recipe = Recipe(run, seeds=3)
