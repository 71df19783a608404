"""Species by the length of a window: five mammals, as the figures of HyenaDNA (arXiv:2306.15794) and Mamba
(arXiv:2312.00752, figure 5) have it, with regions held out."""

from __future__ import annotations

from mambaseq.reproduction import Context, Line, Recipe, Table
from mambaseq_dna.recipes import ladder
from mambaseq_dna.recipes.ladder import BASELINES, BOTH_WAYS, CONV, Contender, Rung
from mambaseq_dna.recipes.mammals import mammals

CONTENDERS = {
    "Mamba, pretrained": Contender({"name": "mamba"}, CONV, BOTH_WAYS, 128, pretrained=True),
    "Mamba": Contender({"name": "mamba"}, CONV, BOTH_WAYS, 128),
    "Mamba, LTI": Contender({"name": "mamba", "lti": True}, CONV, BOTH_WAYS, 128),
    "Mamba-2": Contender({"name": "mamba2"}, CONV, BOTH_WAYS, 128),
    "attention": Contender({"name": "attention"}, CONV, BOTH_WAYS, 128, 2**14),
}
FLOORS = {
    BASELINES[0]: "0.565, 0.793 (1 k, 4 k)",
    BASELINES[1]: "0.546, 0.778, 0.903, 0.940, 0.958",
    BASELINES[2]: "0.605, 0.826, 0.939, 1.00, 1.00",
}


def rungs(context: Context) -> list[Rung]:
    """The ladder of lengths."""
    full = [Rung(2**10, 800), Rung(2**12, 400), Rung(2**14, 200), Rung(2**16, 100), Rung(2**17, 70)]
    return context.at(full=full, small=full[:2], tiny=[Rung(32, 20), Rung(64, 20)])


def run(context: Context) -> list[Table]:
    wanted = context.wanted([*CONTENDERS, *BASELINES])
    genomes, steps = mammals(context), rungs(context)
    lengths = [rung.length for rung in steps]
    lines: list[Line] = []
    for name in wanted:
        if name in BASELINES:
            one = context.trial(name, lambda _, name=name: ladder.baselines(context, genomes, lengths, name))  # type: ignore[misc]
            values = {key: [value] for key, value in one.items()}
        else:
            contender = CONTENDERS[name]
            weights = ladder.pretrained(context, genomes, contender, "mammals") if contender.pretrained else None

            def climbed(
                seed: int, contender: Contender = contender, weights: ladder.Weights = weights
            ) -> dict[str, float]:
                return ladder.climb(context, genomes, contender, steps, seed, weights=weights)[0]

            values = context.over_seeds(name, lambda seed, _, climbed=climbed: climbed(seed))  # type: ignore[misc]
        lines.append(ladder.line(name, values, lengths, FLOORS.get(name, "")))
    trained = ", ".join(f"{rung.steps:,} steps at {ladder.kilobases(rung.length)}" for rung in steps)
    about = (
        "Share of disjoint test windows whose species is named rightly: human, galago, mouse, cow and dog; trained on "
        "ENCODE region ENm001, tested on ENm002, which lies on another chromosome; upper case, no N. Test windows: "
        f"{ladder.counted(context, genomes, lengths)}. One model goes up the ladder: 2^17 bases a step, {trained}, "
        "either strand, and is tested at each length on both strands, with the weights that are best on the last tenth "
        f"of the training region. {ladder.MODELS} Attention is trained up to 16 k. The notes are Wilson's 95 % "
        "intervals of the mean accuracy. The column paper has the floors measured when the data were collected, on "
        "overlapping windows."
    )
    return [Table("Species by length: five mammals", about, ladder.columns(lengths), lines)]


recipe = Recipe(run, seeds=3)
