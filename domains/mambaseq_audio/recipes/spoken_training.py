"""Models of spoken digits and how they are trained: by the clock."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mambaseq.atomic import atomic_file
from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import train
from mambaseq.reproduction.training import Trained
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_audio.mulaw import LEVELS, MuLaw
from mambaseq_audio.recipes import spoken
from mambaseq_audio.recipes.spoken import Rows, Variation

if TYPE_CHECKING:
    from mambaseq_audio.recipes.spoken_digits import Digits

LONGEST = 8192  # of a generated clip; 0.6 % of the recordings are longer
RATES = (5e-4, 1.5e-3, 4e-3)
"""Peak learning rates that short trainings try."""


class Contender(NamedTuple):
    """A model: its parts at full scale, and how it is trained.

    rate: the peak learning rate, as short trainings at `RATES` and whole ones have shown.
    """

    d_model: int
    backbone: dict[str, Any]
    mixer: dict[str, Any]
    more: dict[str, Any] = {}  # noqa: RUF012 - never changed
    dropout: float = 0.1
    condition_dropout: float = 0.1
    rate: float = 2e-3
    variation: Variation = Variation(gain=6.0, shift=256)


_UNET = {"name": "unet", "n_layers": 4, "pool": [4, 4], "expand": 2}
_STACK = {"name": "residual", "n_layers": 8}
_LTI = {"name": "mamba", "lti": True}
MAMBA, LTI = "Mamba U-Net", "LTI U-Net"
CONTENDERS = {
    MAMBA: Contender(88, _UNET, {"name": "mamba"}, rate=1.5e-3),
    LTI: Contender(88, _UNET, _LTI),
    "isotropic Mamba": Contender(336, _STACK, {"name": "mamba"}),
    "isotropic LTI": Contender(336, _STACK, _LTI),
    "S4 U-Net": Contender(
        72,
        {**_UNET, "mlp": True},
        {"name": "s4d", "d_state": 32},
        {"mixers": {"mlp": {"activation": "gelu"}}},
        rate=4e-3,
    ),
}
UNCHANGED = f"{LTI}, recordings unchanged"
DROPOUTS = {f"{LTI}, dropout {rate}": rate for rate in (0.0, 0.2, 0.3)}
SMALL = f"small {LTI}"
VARIANTS = {
    SMALL: Contender(40, _UNET, _LTI),
    UNCHANGED: CONTENDERS[LTI]._replace(variation=Variation()),
    **{name: CONTENDERS[LTI]._replace(dropout=rate) for name, rate in DROPOUTS.items()},
}
"""What is trained only when it is named: a model that is small enough to ship, and what of the training does which
part."""
HELD_OUT = {f"{name}, held-out speakers": name for name in (MAMBA, LTI)}
RATED = {f"{name}, rate {rate:g}": (name, rate) for name in CONTENDERS for rate in RATES}
"""The short trainings that choose learning rates, so that they can run side by side."""


def build(digits: Digits, of: Contender) -> SequenceModel:
    context = digits.context
    layers = context.at(full=of.backbone["n_layers"], small=2, tiny=1)
    spec = {
        "d_model": context.at(full=of.d_model, small=32, tiny=8),
        "encoder": {
            **{"name": "tokens", "vocab_size": LEVELS, "n_conditions": len(digits.names)},
            "condition_dropout": of.condition_dropout,
        },
        "backbone": {**of.backbone, "n_layers": layers, "dropout": of.dropout},
        "mixer": of.mixer,
        "head": {"name": "lm", "vocab_size": LEVELS},
        **of.more,
    }
    return build_model(spec).to(context.device)


class Learned(NamedTuple):
    """model: with the weights that are best on the validation recordings, where it has `best` bits. passes: times
    through the training recordings."""

    model: SequenceModel
    best: float
    run: Trained
    passes: float


def learn(digits: Digits, name: str, of: Contender, seed: int, minutes: float, checkpoint: Path) -> Learned:
    """Train by the clock and keep the weights that are best on the validation recordings.

    Raises UserError for a training that diverges.
    """
    context = digits.context
    torch.manual_seed(seed)
    model = build(digits, of)
    chosen = digits.split["train"]
    length, together = context.at(full=4096, small=2048, tiny=128), context.at(full=16, small=4, tiny=2)
    rows = Rows([digits.recordings.signals[i] for i in chosen], digits.conditions[chosen], length, context.device)
    best_file = checkpoint.with_suffix(".best.pt")
    best = math.inf
    if best_file.exists():
        best = torch.load(best_file, map_location="cpu", weights_only=True)["bits"]

    def look() -> bool:
        nonlocal best
        now = digits.bits(model, "validation")
        if now < best:
            best = now
            with atomic_file(best_file) as file:
                torch.save({"bits": now, "weights": model.state_dict()}, file)
        return False

    steps = context.at(full=1_000_000, small=100_000, tiny=4)
    run = train(
        model,
        rows.batches(together, seed, of.variation),
        steps,
        OptimizerConfig(lr=of.rate, weight_decay=0.1, warmup_steps=steps // 10, min_lr_ratio=0.02),
        autocast=torch.bfloat16 if context.device.type == "cuda" else None,
        checkpoint=checkpoint,
        finished=look,
        check_every=context.at(full=1000, small=100, tiny=2),
        label=name,
        clock=60 * minutes,
        average=context.at(full=0.999, small=0.99, tiny=0.9),
    )
    look()
    if not best_file.exists():  # no look found a number of bits
        raise UserError(
            f"The training of {name} diverged: its bits on the validation recordings were never a finite number. Give "
            "another seed with --seed."
        )
    model.load_state_dict(torch.load(best_file, map_location=context.device, weights_only=True)["weights"])
    return Learned(model, best, run, run.steps * together * length / rows.total)


def tried(digits: Digits, name: str, rate: float) -> dict[str, float]:
    """Bits on the validation recordings after a fifth of the time at a learning rate; a training that diverges has
    none."""
    minutes = digits.minutes / 5

    def trial(checkpoint: Path) -> dict[str, float]:
        try:
            found = learn(digits, name, CONTENDERS[name]._replace(rate=rate), 0, minutes, checkpoint)
        except UserError:
            return {"validation": math.nan}
        return {"validation": found.best, "seconds": found.run.clock, "steps": found.run.steps}

    found = digits.context.trial(f"{name} rate={rate:g} minutes={minutes:g}", trial)
    return {key: math.nan if value is None else value for key, value in found.items()}  # as a file has it


def export(digits: Digits, model: SequenceModel, folder: Path, step: int) -> None:
    """A model that `mambaseq generate` reads."""
    assert model.spec is not None
    card = ModelCard(
        spec=model.spec,
        tokenizer={"name": "audio/mulaw", "options": {}},
        condition_names=digits.names,
        length=LONGEST,
        start_ids=[MuLaw.start_id],
        reader="audio/audio",
        writer="audio/wav",
        reader_options={"sample_rate": spoken.RATE, "resample": True, "channels": "mean"},
        writer_options={"sample_rate": spoken.RATE},
        generation={"max_new_tokens": 4000},
        step=step,
        task="next_token",
    )
    save_model(folder, model, card, MuLaw())
