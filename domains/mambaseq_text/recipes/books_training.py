"""What the recipe on books trains: models of one size, the same bytes in the same order, each at its best rate.

Trials that are finished belong to the source of this module: it changes only where they are to be made again."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from mambaseq.atomic import atomic_file
from mambaseq.benchmarking.timing import release
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import Context, train
from mambaseq.reproduction.batches import of_text
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_text.recipes.shakespeare import precision
from mambaseq_text.recipes.shelf import Split, Texts, Tokens
from mambaseq_text.tokenization import ByteTokenizer, TextTokenizer

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
"""Learning rates that a contender may be tried with: the middle ones first, then on to the side of the better one for
as long as that helps."""
FIRST = (1e-3, 2e-3)
TRIED = 8  # one part in so many of a training
DROPOUT = 0.1  # of the variants
PIECES = "GPT-NeoX"


class Contender(NamedTuple):
    """A model at full scale: layers, mixer, and what else `causal_lm` takes."""

    n_layers: int
    mixer: str
    more: dict[str, Any] = {}  # noqa: RUF012 - never changed


_PATTERN = ["mamba2", "mamba2", "attention", "mamba2", "mamba2"]
CONTENDERS = {
    "Mamba": Contender(18, "mamba"),
    "Mamba-2": Contender(18, "mamba2"),
    "hybrid": Contender(20, "mamba2", {"pattern": _PATTERN, "mlp": False}),
    "Transformer++": Contender(9, "attention", {"mixers": {"mlp": {"expand": 3}}}),
}
_DELTA = ["gated_delta", "gated_delta", "gated_delta", "attention"]
TODAY = {
    "Mamba-3": Contender(18, "mamba3"),
    "Mamba-3, rank 4": Contender(14, "mamba3", {"rank": 4}),
    "gated delta": Contender(20, "gated_delta"),
    "KDA": Contender(23, "kda"),
    "gated delta hybrid": Contender(16, "gated_delta", {"pattern": _DELTA}),
}
"""Mixers of today."""
D_MODEL = 512


class Entry(NamedTuple):
    """What is trained: a contender, in bytes or in word pieces."""

    contender: str
    pieces: bool = False
    dropout: float = 0.0


_USUAL = {name: Entry(name) for name in CONTENDERS}
_PIECES = {f"{name}, {PIECES}": Entry(name, True) for name in CONTENDERS}
VARIANTS = {
    f"{name}, dropout {DROPOUT:g}": entry._replace(dropout=DROPOUT) for name, entry in {**_USUAL, **_PIECES}.items()
}
"""Trained only when they are named: they say whether the others overfit."""
_TODAY = {name: Entry(name) for name in TODAY}
ENTRIES = {**_USUAL, **_PIECES, **VARIANTS, **_TODAY}


class Sizes(NamedTuple):
    """length, pieces: of windows in bytes, and in word pieces, which are about as long a text. looks: at the validation
    book during a training. positions: bytes that are tested at once; word pieces, a quarter of it."""

    length: int
    pieces: int
    batch_size: int
    steps: int
    looks: int
    positions: int

    @property
    def every(self) -> int:
        """Steps from one look to the next."""
        return max(self.steps // self.looks, 1)


class Shelf:
    """The books on the device, in the tokens that are asked for, and what is trained on them."""

    def __init__(self, context: Context, texts: Texts, tokenizer: Callable[[], TextTokenizer]) -> None:
        self.context, self.texts, self.tokenizer = context, texts, tokenizer
        usual = context.at(
            full=Sizes(2048, 512, 16, 1200, 12, 2**16),
            small=Sizes(256, 64, 8, 300, 6, 2**13),
            tiny=Sizes(32, 16, 2, 4, 2, 2**10),
        )
        self.sizes = usual if context.steps is None else usual._replace(steps=context.steps)

    @functools.cached_property
    def bytes(self) -> Tokens:
        return Tokens.of(self.texts, ByteTokenizer(), self.context.device)

    @functools.cached_property
    def pieces(self) -> Tokens:
        return Tokens.of(self.texts, self.tokenizer(), self.context.device)

    def of(self, entry: Entry) -> tuple[Tokens, int]:
        """The tokens of an entry, and how many are in a window."""
        return (self.pieces, self.sizes.pieces) if entry.pieces else (self.bytes, self.sizes.length)

    def bits(self, entry: Entry, split: Split, model: SequenceModel) -> float:
        positions = self.sizes.positions // (4 if entry.pieces else 1)  # the logits of a large vocabulary are, too
        return split.bits(model, self.of(entry)[1], positions)

    def make(self, entry: Entry, seed: int) -> SequenceModel:
        of = (CONTENDERS | TODAY)[entry.contender]
        at_least = len(of.more.get("pattern", [0]))
        n_layers = self.context.at(
            full=of.n_layers, small=max(of.n_layers // 4, at_least), tiny=max(of.n_layers // 9, at_least)
        )
        d_model = self.context.at(full=D_MODEL, small=64, tiny=16)
        torch.manual_seed(seed)
        vocab_size = self.of(entry)[0].vocab_size
        model = causal_lm(vocab_size, d_model, n_layers, of.mixer, dropout=entry.dropout, **of.more)
        return model.to(self.context.device)

    def optimizer(self, rate: float, steps: int) -> OptimizerConfig:
        """One for all but its rate."""
        return OptimizerConfig(lr=rate, weight_decay=0.1, warmup_steps=min(100, steps // 4))

    def tried(self, name: str, rate: float) -> float:
        """Bits a byte of the validation book after a short training at this rate."""
        entry, steps = ENTRIES[name], max(self.sizes.steps // TRIED, 1)
        tokens, length = self.of(entry)

        def trial(checkpoint: Path) -> dict[str, float]:
            model = self.make(entry, seed=0)
            batches = of_text(tokens.train, length, self.sizes.batch_size, seed=0)
            config, dtype = self.optimizer(rate, steps), precision(self.context.device)
            label = f"{name}, rate {rate:g}"
            train(model, batches, steps, config, autocast=dtype, checkpoint=checkpoint, label=label)
            return {"validation": self.bits(entry, tokens.validation, model)}

        found = self.context.trial(f"{name} steps={steps} rate={rate:g}", trial)["validation"]
        release()
        return found

    def rate(self, name: str) -> float:
        """The rate with which the short training is best; that of a variant is the one of what it varies.

        Raises UserError if all that were tried diverged.
        """
        usual, found = name.removesuffix(f", dropout {DROPOUT:g}"), dict[float, float]()

        def bits(rate: float) -> float:
            if rate not in found:
                found[rate] = self.tried(usual, rate)
            return found[rate] if math.isfinite(found[rate]) else math.inf

        if self.context.scale == "tiny":
            return RATES[1]
        best = min(FIRST, key=bits)
        side = 1 if best == FIRST[1] else -1
        while 0 <= (place := RATES.index(best) + side) < len(RATES) and bits(RATES[place]) < bits(best):
            best = RATES[place]
        if not math.isfinite(bits(best)):
            raise UserError(f"{usual} diverged at every rate ({', '.join(f'{rate:g}' for rate in found)}).")
        return best

    def _named(self, name: str, rate: float, seed: int) -> str:
        return f"{name} steps={self.sizes.steps} rate={rate:g} seed={seed}"

    def learned(self, name: str, rate: float, seed: int) -> dict[str, float]:
        """Train, keep the weights that are best on the validation book, and test these once."""

        def trial(checkpoint: Path) -> dict[str, float]:
            return self._learn(name, rate, seed, checkpoint)

        found = self.context.trial(self._named(name, rate, seed), trial)
        release()
        return found

    def finished(self, name: str, seed: int) -> dict[str, float] | None:
        """What an earlier call learned, at the rate that it took; None where no training was finished."""
        some = (self.context.finished(self._named(name, rate, seed)) for rate in RATES)
        return next((found for found in some if found is not None), None)

    def _learn(self, name: str, rate: float, seed: int, checkpoint: Path) -> dict[str, float]:
        entry, of = ENTRIES[name], self.sizes
        tokens, length = self.of(entry)
        model = self.make(entry, seed)
        curve_file, best_file = (checkpoint.with_suffix(f".{part}.pt") for part in ("curve", "best"))
        curve: dict[int, float] = torch.load(curve_file, weights_only=True) if curve_file.exists() else {}

        begun = time.perf_counter()

        def look(step: int) -> None:
            now = self.bits(entry, tokens.validation, model)
            if now < min((bits for at, bits in curve.items() if at != step), default=math.inf):
                with atomic_file(best_file) as file:
                    torch.save(model.state_dict(), file)
            curve[step] = now
            tqdm.write(f"{name}, seed {seed}: {now:.3f} bits after step {step:,}, {time.perf_counter() - begun:.0f} s")
            with atomic_file(curve_file) as file:
                torch.save(curve, file)

        run = train(
            model,
            of_text(tokens.train, length, of.batch_size, seed),
            of.steps,
            self.optimizer(rate, of.steps),
            autocast=precision(self.context.device),
            checkpoint=checkpoint,
            watch=look,
            check_every=of.every,
            label=f"{name}, seed {seed}",
        )
        if of.steps not in curve:
            look(of.steps)
        known = {step: bits for step, bits in curve.items() if math.isfinite(bits)}
        best = min(known, key=known.__getitem__) if known else of.steps
        if known:
            model.load_state_dict(torch.load(best_file, map_location=self.context.device, weights_only=True))
        read = of.steps * of.batch_size * length
        return {
            "bits": self.bits(entry, tokens.test, model),
            "carried": tokens.test.carried(model),
            "validation": known.get(best, math.nan),
            "train_bits": run.loss / math.log(2) / tokens.bytes_per_token,
            "best_at": best / of.steps,
            "passes": read / len(tokens.train),
            "rate": rate,
            "captured": float(run.captured),
            "as_run": run.seconds / 60,
            "bytes_per_s": run.steps_per_second * of.batch_size * length * tokens.bytes_per_token,
            "parameters": model.n_parameters(),
            "inner": model.n_parameters() - tokens.vocab_size * model.backbone.d_model,
            **{f"at {step}": bits for step, bits in sorted(curve.items())},
        }

    def speed(self, name: str) -> float:
        """Bytes a second of training steps."""
        entry = ENTRIES[name]
        tokens, length = self.of(entry)
        steps = self.context.at(full=100, small=10, tiny=2)

        def trial(_: Path) -> dict[str, float]:
            batches = of_text(tokens.train, length, self.sizes.batch_size, seed=0)
            config, dtype = self.optimizer(1e-3, steps), precision(self.context.device)
            run = train(self.make(entry, seed=0), batches, steps, config, autocast=dtype, label=f"speed of {name}")
            read = self.sizes.batch_size * length * tokens.bytes_per_token
            return {"bytes_per_s": run.steps_per_second * read}

        found = self.context.trial(_speed_of(name), trial)["bytes_per_s"]
        release()
        return found

    def known_speed(self, name: str) -> float | None:
        """That of an earlier call."""
        found = self.context.finished(_speed_of(name))
        return None if found is None else found["bytes_per_s"]

    def bytes_read(self, name: str, steps: int) -> float:
        tokens, length = self.of(ENTRIES[name])
        return steps * self.sizes.batch_size * length * tokens.bytes_per_token


def _speed_of(name: str) -> str:
    return f"{name} speed"
