"""Synthetic tasks that measure what a mixer can remember, select and compute over distance."""

from __future__ import annotations

from mambaseq.domain import Domain

domain = Domain(
    name="synthetic",
    summary="tasks for measurements: copying, recall, state tracking, ListOps, Pathfinder, pixels of digits",
    datasets={
        "selective_copying": (
            "mambaseq_synthetic.selective_copying:SelectiveCopyingData",
            "repeat the data tokens among noise, in order",
        ),
        "induction_heads": (
            "mambaseq_synthetic.induction_heads:InductionHeadsData",
            "which token followed the special token earlier; tested at other lengths",
        ),
        "recall": (
            "mambaseq_synthetic.recall:RecallData",
            "which values went with keys, several of a sequence (MQAR); tested at other lengths",
        ),
        "state_tracking": (
            "mambaseq_synthetic.state_tracking:StateTrackingData",
            "parity, modular arithmetic or permutations: the state after each token; tested at other lengths",
        ),
        "digits": ("mambaseq_synthetic.digits:DigitsData", "handwritten digits pixel by pixel, in order or permuted"),
        "listops": ("mambaseq_synthetic.listops:ListOpsData", "the value of nested MIN, MAX, MED, SM expressions"),
        "pathfinder": ("mambaseq_synthetic.pathfinder:PathfinderData", "whether a dashed path joins two dots"),
    },
    metrics={
        "sequence_accuracy": (
            "mambaseq_synthetic.metrics:SequenceAccuracy",
            "share of sequences with all targets ranked first",
        ),
        "accuracy_by_length": (
            "mambaseq_synthetic.metrics:AccuracyByLength",
            "token accuracy for each power of two of the length",
        ),
    },
    recipes={
        "lra": (
            "mambaseq_synthetic.recipes.lra:recipe",
            "Long Range Arena in small: ListOps, Pathfinder and digits by five mixers",
        ),
        "induction_heads": (
            "mambaseq_synthetic.recipes.induction_heads:recipe",
            "Mamba paper, section 4.1.2: trained at 256, tested up to 2^20",
        ),
        "state_tracking": (
            "mambaseq_synthetic.recipes.state_tracking:recipe",
            "parity, modular arithmetic and permutations by mixers of positive, negative and complex eigenvalues",
        ),
        "recall": (
            "mambaseq_synthetic.recipes.recall:recipe",
            "recall of many keys (MQAR) by mixers of three sizes",
        ),
        "selective_copying": (
            "mambaseq_synthetic.recipes.selective_copying:recipe",
            "Mamba paper, Table 1: what a time-invariant model cannot do",
        ),
        "selection": (
            "mambaseq_synthetic.recipes.selection:recipe",
            "Mamba paper, Table 7 on selective copying: which of dt, B and C must be selective",
        ),
    },
    configs={
        "selective_copying": ("mambaseq:configs/synthetic/selective_copying.yaml", "as in the Mamba paper, on a GPU"),
        "induction_heads": (
            "mambaseq:configs/synthetic/induction_heads.yaml",
            "as in the Mamba paper, tested up to 2^20, on a GPU",
        ),
        "state_tracking": (
            "mambaseq:configs/synthetic/state_tracking.yaml",
            "parity by Mamba-3, tested at lengths that it was not trained at",
        ),
        "recall": (
            "mambaseq:configs/synthetic/recall.yaml",
            "8 keys and their values by the gated delta rule, a minute on a CPU",
        ),
        "digits": ("mambaseq:configs/synthetic/digits.yaml", "digits pixel by pixel, minutes on a CPU"),
        "listops": ("mambaseq:configs/synthetic/listops.yaml", "ListOps of 50 to 200 tokens, on a GPU"),
        "pathfinder": ("mambaseq:configs/synthetic/pathfinder.yaml", "Pathfinder of 16 by 16 pixels, on a GPU"),
    },
)
