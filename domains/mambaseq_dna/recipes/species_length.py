"""Species by the length of a window: five mammals, as the figures of HyenaDNA (arXiv:2306.15794) and Mamba
(arXiv:2312.00752, figure 5) have it, with regions held out."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambaseq.errors import UserError
from mambaseq.reproduction import Context, Line, Recipe, Table, train
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_dna.recipes import ladder
from mambaseq_dna.recipes.common import VOCABULARY, Stretches
from mambaseq_dna.recipes.ladder import AHEAD, BASELINES, BOTH_WAYS, CONV, WORDS, Contender, Rung
from mambaseq_dna.recipes.mammals import mammals

CONTENDERS = {
    "Mamba": Contender({"name": "mamba"}, WORDS, AHEAD, 192),
    "Mamba, LTI": Contender({"name": "mamba", "lti": True}, WORDS, AHEAD, 192),
    "Mamba-2": Contender({"name": "mamba2"}, WORDS, AHEAD, 192),
    "attention": Contender({"name": "attention"}, WORDS, AHEAD, 192),
    "bases, both ways, from scratch": Contender({"name": "mamba"}, CONV, BOTH_WAYS, 128, 2**14, 0.5),
    "bases, both ways, pretrained": Contender({"name": "mamba"}, CONV, BOTH_WAYS, 128, 2**14, 0.5, True),
}
FLOORS = {
    BASELINES[0]: "0.565, 0.793 (1 k, 4 k)",
    BASELINES[1]: "0.546, 0.778, 0.903, 0.940, 0.958",
    BASELINES[2]: "0.605, 0.826, 0.939, 1.00, 1.00",
}


def rungs(context: Context) -> list[Rung]:
    full = [Rung(2**10, 1500), Rung(2**12, 800), Rung(2**14, 400), Rung(2**16, 200), Rung(2**17, 150)]
    return context.at(full=full, small=full[:2], tiny=[Rung(256, 20), Rung(512, 20)])


def pretrained(context: Context, contender: Contender) -> dict[str, Tensor]:
    """Weights after masked modelling of the training regions of all five mammals; trained once."""
    path = context.folder / "pretrained.safetensors"

    def run(checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(0)
        model = contender.build(context, {"name": "lm", "vocab_size": VOCABULARY})
        length, steps = context.at(full=1024, small=256, tiny=64), context.at(full=4_000, small=200, tiny=2)
        genomes = mammals(context)
        found = train(
            model,
            Stretches(genomes.tokens, genomes.train, length).masked(context.at(full=64, small=8, tiny=2), 0),
            steps,
            OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=steps // 20),
            autocast=ladder.precision(context),
            checkpoint=checkpoint,
            label="pretraining",
        )
        kept = model.state_dict()
        save_file({key: kept[key].cpu().contiguous() for key in kept if not key.startswith("head.")}, path)
        return {"loss": found.loss, "minutes": found.seconds / 60}

    context.trial("pretraining", run)
    if not path.exists():
        raise UserError(f"{path} is missing. Remove the trial 'pretraining' of that folder to train it again.")
    return load_file(path, device=str(context.device))


def run(context: Context) -> list[Table]:
    genomes, steps = mammals(context), rungs(context)
    lengths = [rung.length for rung in steps]
    lines: list[Line] = []
    for name in context.wanted([*CONTENDERS, *BASELINES]):
        if name in BASELINES:
            one = context.trial(name, lambda _, name=name: ladder.baselines(context, genomes, lengths, name))  # type: ignore[misc]
            values = {key: [value] for key, value in one.items()}
        else:
            contender = CONTENDERS[name]
            weights = pretrained(context, contender) if contender.pretrained else None

            def climbed(
                seed: int,
                checkpoint: Path,
                contender: Contender = contender,
                weights: dict[str, Tensor] | None = weights,
            ) -> dict[str, float]:
                return ladder.climb(context, genomes, contender, steps, seed, checkpoint, weights=weights)[0]

            values = context.over_seeds(name, climbed)
        lines.append(ladder.line(name, values, lengths, FLOORS.get(name, "")))
    trained = ", ".join(f"{rung.steps:,} steps at {ladder.kilobases(rung.length)}" for rung in steps)
    about = (
        "Share of disjoint test windows whose species is named rightly: human, galago, mouse, cow and dog; trained on "
        "ENCODE region ENm001, tested on ENm002, which lies on another chromosome; upper case, no N. Test windows: "
        f"{ladder.counted(context, genomes, lengths)}. One model goes up the ladder: 2^17 bases a step, {trained}, "
        "either strand, and is tested at each length on both strands. Words of 6 bases every 3 bases and 4 layers; "
        "'bases, both ways' is a convolution over bases and 2 bidirectional layers, half the steps, up to 16 k, "
        "pretrained by masked modelling of the training regions for 4,000 steps. The notes are Wilson's 95 % intervals "
        "of the mean accuracy. The column paper has the floors measured when the data were collected, on overlapping "
        "windows."
    )
    return [Table("Species by length: five mammals", about, ladder.columns(lengths), lines)]


recipe = Recipe(run, seeds=3)
