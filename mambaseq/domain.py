"""Domain: the bundle that a modality supplies, and how domains are found.

A package becomes a domain by an entry point of the group `mambaseq.domains` that names a `Domain` value; the
module that holds it must import no torch. What a domain registers is visible as `DOMAIN/NAME` (`dna/species`),
so two domains can never collide.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from mambaseq.errors import shown
from mambaseq.registry import FUNCTION, Registry

Entries = Mapping[str, tuple[str, str]]

GROUP = "mambaseq.domains"
KINDS = (
    "tokenizers",
    "encoders",
    "datasets",
    "readers",
    "writers",
    "tables",
    "mixers",
    "backbones",
    "heads",
    "metrics",
    "optimizers",
    "callbacks",
    "configs",
    "reports",
    "recipes",
    "commands",
)
WANTED = {  # what each name in a configuration or a model must stand for: see `Registry`
    "tokenizers": "mambaseq.data.tokenizer:Tokenizer",
    "encoders": "torch.nn:Module",
    "datasets": "mambaseq.data.module:SequenceData",
    "readers": FUNCTION,
    "writers": FUNCTION,
    "tables": "mambaseq.runs.tables:Table",
    "mixers": "mambaseq.mixers.base:Mixer",
    "backbones": "mambaseq.backbones.base:Backbone",
    "heads": "torch.nn:Module",
    "metrics": "mambaseq.metrics.base:Metric",
    "optimizers": "torch.optim:Optimizer",
    "callbacks": "lightning.pytorch.callbacks:Callback",
    "reports": FUNCTION,
    "commands": FUNCTION,
}


@dataclasses.dataclass(frozen=True)
class Domain:
    """What a modality supplies: each field maps a short name to `("module:Attr", one-line summary)`.

    tokenizers: raw units to ids and back (see `mambaseq.data.tokenizer.Tokenizer`).
    encoders: `mambaseq.encoders.Encoder` subclasses, from what the data give to `(batch, length, d_model)`.
    datasets: `mambaseq.data.module.SequenceData` subclasses: train, validation and test data of one kind.
    readers: functions from a path to records for `predict`. writers: functions from tokens to a file for `generate`.
    tables: `mambaseq.runs.tables.Table` subclasses, made as `(mambaseq.runs.tables.Files)`, each by the ending of files
        that `predict` writes with it: `"bed"`.
    mixers, backbones, heads: modules that the core does not bring. metrics: `mambaseq.metrics.Metric` subclasses.
    optimizers: `torch.optim.Optimizer` subclasses, made as `(groups, lr=..., **optimizer.options)`: `optimizer.name`.
    callbacks: `lightning.pytorch.callbacks.Callback` subclasses: `trainer.callbacks`. One with a method `section`, from
        a run's folder to a `mambaseq.reporting.Section` or None, stands on the run's page, however the run ended.
    configs: `"package:path/to/run.yaml"` resources, looked up by `mambaseq.resources.find`.
    reports: functions from a finished run's folder to a `mambaseq.reporting.Section`. One with the name of a dataset is
        called by `fit` at the end of its runs, one named "demo" by `mambaseq demo`.
    recipes: `mambaseq.reproduction.Recipe` values: what `mambaseq reproduce` runs.
    commands: functions from the words after `mambaseq DOMAIN/NAME` on the command line to an exit code, None for 0.
    """

    name: str
    summary: str
    tokenizers: Entries = dataclasses.field(default_factory=dict)
    encoders: Entries = dataclasses.field(default_factory=dict)
    datasets: Entries = dataclasses.field(default_factory=dict)
    readers: Entries = dataclasses.field(default_factory=dict)
    writers: Entries = dataclasses.field(default_factory=dict)
    tables: Entries = dataclasses.field(default_factory=dict)
    mixers: Entries = dataclasses.field(default_factory=dict)
    backbones: Entries = dataclasses.field(default_factory=dict)
    heads: Entries = dataclasses.field(default_factory=dict)
    metrics: Entries = dataclasses.field(default_factory=dict)
    optimizers: Entries = dataclasses.field(default_factory=dict)
    callbacks: Entries = dataclasses.field(default_factory=dict)
    configs: Entries = dataclasses.field(default_factory=dict)
    reports: Entries = dataclasses.field(default_factory=dict)
    recipes: Entries = dataclasses.field(default_factory=dict)
    commands: Entries = dataclasses.field(default_factory=dict)


CORE: dict[str, Entries] = {
    "tokenizers": {"alphabet": ("mambaseq.data.tokenizer:Alphabet", "an id a letter of an alphabet")},
    "encoders": {
        "tokens": ("mambaseq.encoders:TokenEncoder", "an embedding table, with an optional condition added"),
        "codes": ("mambaseq.encoders:CodesEncoder", "several codes at a position: the sum of their embeddings"),
        "levels": ("mambaseq.encoders:LevelsEncoder", "ids in order, by a coarse and a fine part: 16-bit samples"),
        "rc_tokens": ("mambaseq.encoders:RCTokenEncoder", "tokens of both strands of DNA, for reverse_complement"),
        "signal": ("mambaseq.encoders:SignalEncoder", "a linear map of continuous channels"),
    },
    "datasets": {},
    "readers": {"csv": ("mambaseq.data.signals:read_csv", "a signal: a column a channel, a row a step")},
    "writers": {"csv": ("mambaseq.data.signals:write_csv", "signals: a column a channel, a row a step")},
    "mixers": {
        "mamba": (
            "mambaseq.mixers.mamba:Mamba",
            "Mamba-1 (S6), selective; its ablations; `lti: true` makes it time-invariant",
        ),
        "s4d": ("mambaseq.mixers.s4d:S4D", "diagonal S4: complex or real, ZOH or bilinear, Lin/Inv/Legs"),
        "h3": ("mambaseq.mixers.h3:H3", "H3: shift and diagonal state spaces between multiplicative gates"),
        "rwkv4": ("mambaseq.mixers.rwkv4:RWKV4", "RWKV-4 time mixing: token shift, WKV with decay and bonus a channel"),
        "attention": ("mambaseq.mixers.attention:Attention", "causal multi-head self-attention, RoPE, grouped KV"),
        "mlp": ("mambaseq.mixers.mlp:MLP", "position-wise SwiGLU or GELU layer, to go between other mixers"),
        "hyena": ("mambaseq.mixers.hyena:Hyena", "gated long convolutions with implicit filters"),
        "s4": ("mambaseq.mixers.s4:S4", "S4: diagonal plus low-rank systems from HiPPO-LegS"),
        "s5": ("mambaseq.mixers.s5:S5", "S5: one diagonal system of many inputs and outputs"),
        "lssl": ("mambaseq.mixers.lssl:LSSL", "LSSL: full HiPPO matrices, LegS or LegT, fixed or trained"),
        "lmu": ("mambaseq.mixers.lmu:LMU", "Legendre memory units in parallel: a sliding window of learned signals"),
        "mamba2": ("mambaseq.mixers.mamba2:Mamba2", "Mamba-2 (SSD): a decay a head, larger states"),
        "mamba3": (
            "mambaseq.mixers.mamba3:Mamba3",
            "Mamba-3: trapezoidal steps, a state that turns",
        ),
        "gated_delta": (
            "mambaseq.mixers.gated_delta:GatedDelta",
            "Gated DeltaNet: a matrix that corrects what it says of each key, and decays",
        ),
        "kda": ("mambaseq.mixers.kda:KDA", "Kimi Delta Attention: the same with a decay a channel"),
        "gla": ("mambaseq.mixers.gla:GLA", "gated linear attention: a decay a channel of the keys"),
        "retention": ("mambaseq.mixers.retention:Retention", "RetNet's retention: fixed decays, rotated keys"),
        "linear_attention": ("mambaseq.mixers.linear_attention:LinearAttention", "linear attention, elu + 1, RoPE"),
    },
    "backbones": {
        "residual": (
            "mambaseq.backbones.residual:ResidualStack",
            "pre-norm residual stack of one mixer, or of a pattern",
        ),
        "bidirectional": ("mambaseq.backbones.bidirectional:BidirectionalStack", "the same, reading both ways"),
        "reverse_complement": (
            "mambaseq.backbones.reverse_complement:ReverseComplementStack",
            "both strands of DNA alike, up to rounding (Caduceus-PS)",
        ),
        "unet": ("mambaseq.backbones.unet:UNet", "layers at several resolutions of time, causal (SaShiMi)"),
    },
    "heads": {
        "lm": ("mambaseq.heads.lm:LMHead", "next tokens, or masked ones"),
        "codes": ("mambaseq.heads.codes:CodesHead", "several codes at a position, each by an output of its own"),
        "levels": (
            "mambaseq.heads.levels:LevelsHead",
            "next ids in order: the coarse part, then the fine part given it",
        ),
        "classification": ("mambaseq.heads.classification:ClassificationHead", "one label a sequence, pooled"),
        "multilabel": ("mambaseq.heads.classification:MultilabelHead", "any of several labels a sequence, pooled"),
        "regression": ("mambaseq.heads.regression:RegressionHead", "real values for a sequence, pooled"),
        "token_classification": ("mambaseq.heads.positions:TokenClassificationHead", "one label a position or bin"),
        "token_multilabel": ("mambaseq.heads.positions:TokenMultilabelHead", "any of several labels a position or bin"),
        "token_regression": ("mambaseq.heads.positions:TokenRegressionHead", "real values for a position or bin"),
        "forecast": ("mambaseq.heads.forecast:ForecastHead", "next values of a signal, as normal or by quantiles"),
        "rc_lm": ("mambaseq.heads.reverse_complement:RCLMHead", "a token each, the same on either strand"),
        "rc_classification": (
            "mambaseq.heads.reverse_complement:RCClassificationHead",
            "one label a sequence, the same on either strand",
        ),
    },
    "metrics": {
        "bits_per_token": ("mambaseq.metrics.likelihood:BitsPerToken", "mean negative log2 likelihood of a target"),
        "bits_per_byte": ("mambaseq.metrics.likelihood:BitsPerByte", "the same, per byte of the raw data"),
        "bits_by_length": (
            "mambaseq.metrics.likelihood:BitsByLength",
            "bits a target in sequences (documents) of each length; a table",
        ),
        "perplexity": ("mambaseq.metrics.likelihood:Perplexity", "exp of the mean negative log likelihood"),
        "token_accuracy": ("mambaseq.metrics.likelihood:TokenAccuracy", "share of targets ranked first"),
        "accuracy": ("mambaseq.metrics.classification:Accuracy", "share of labels that are right"),
        "balanced_accuracy": (
            "mambaseq.metrics.classification:BalancedAccuracy",
            "mean over classes of the share that is right",
        ),
        "macro_f1": ("mambaseq.metrics.classification:MacroF1", "mean of the classes' F1"),
        "mcc": ("mambaseq.metrics.classification:MCC", "Matthews correlation coefficient"),
        "auroc": ("mambaseq.metrics.ranking:LabelAUROC", "area under the ROC curve; of several classes their mean"),
        "auprc": ("mambaseq.metrics.ranking:LabelAUPRC", "average precision; of several classes their mean"),
        "ece": ("mambaseq.metrics.calibration:ECE", "expected calibration error: probabilities against shares"),
        "multilabel_auroc": ("mambaseq.metrics.multilabel:AUROC", "mean of the labels' areas under the ROC curve"),
        "multilabel_auprc": ("mambaseq.metrics.multilabel:MultilabelAUPRC", "mean of the labels' average precisions"),
        "multilabel_f1": ("mambaseq.metrics.multilabel:MultilabelF1", "mean of the labels' F1 at probability 1/2"),
        "mae": ("mambaseq.metrics.values:MAE", "mean absolute error of the known values"),
        "rmse": ("mambaseq.metrics.values:RMSE", "root of the mean squared error of the known values"),
        "crps": ("mambaseq.metrics.values:CRPS", "continuous ranked probability score of the known values"),
        "correlation": (
            "mambaseq.metrics.values:Correlation",
            "mean of the outputs' Pearson's r, over known values",
        ),
        "spearman": ("mambaseq.metrics.values:Spearman", "mean of the outputs' rank correlations, over known values"),
        "confusion": ("mambaseq.metrics.classification:Confusion", "confusion matrix, rows are true classes"),
    },
    "optimizers": {
        "adamw": ("torch.optim:AdamW", "AdamW: moments of gradients, decoupled weight decay"),
        "muon": (
            "mambaseq.tasks.optimizer:MuonAdamW",
            "Muon for matrices of the backbone's linear maps, AdamW for all else",
        ),
    },
    "callbacks": {},
    "configs": {},
    "reports": {},
    "recipes": {},
    "commands": {},
}


@dataclasses.dataclass(frozen=True)
class Catalog:
    """Everything that can be named: a registry for each kind, the domains, and the plugins that failed to load.

    broken: entry point (`"name = target (distribution)"`) to the reason. A broken plugin does not affect the others.
    """

    domains: dict[str, tuple[Domain, str]]
    registries: dict[str, Registry[Any]]
    broken: dict[str, str]

    def __getitem__(self, kind: str) -> Registry[Any]:
        return self.registries[kind]


def _load(point: importlib.metadata.EntryPoint) -> Domain:
    loaded = point.load()
    if not isinstance(loaded, Domain):
        raise TypeError(f"{point.value} is a {type(loaded).__name__}, not a mambaseq.domain.Domain")
    if loaded.name != point.name:
        raise ValueError(f"the entry point is named {shown(point.name)} and its Domain {shown(loaded.name)}")
    return loaded


def not_installed(name: str) -> str:
    """A sentence, after a blank, on a domain whose package lies in the working folder, as `mambaseq new domain` writes
    it, but which is not registered; "" if there is no such package."""
    folder = f"mambaseq-{name}"
    if not name.isidentifier() or not os.path.isfile(os.path.join(folder, "pyproject.toml")):  # noqa: PTH113, PTH118
        return ""
    return f" Its package in {folder} must be installed first: `pip install -e {folder}`."


def build_catalog(points: list[importlib.metadata.EntryPoint]) -> Catalog:
    """Collect the names of the core and of every domain with an entry point.

    Raises nothing for a domain that cannot be loaded, or whose name is taken: it is left out, and `Catalog.broken` says
    why.
    """
    registries: dict[str, Registry[Any]] = {
        kind: Registry(kind.removesuffix("s"), CORE.get(kind), wanted=WANTED.get(kind)) for kind in KINDS
    }
    domains: dict[str, tuple[Domain, str]] = {}
    broken: dict[str, str] = {}
    for point in points:
        origin = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
        label = f"{point.name} = {point.value} ({origin})"
        try:
            domain = _load(point)
            if domain.name in domains:
                raise ValueError(f"the domain name is taken by {domains[domain.name][1]}")
            found = {  # all of them before any is added: a broken plugin leaves no names
                kind: {
                    f"{domain.name}/{name}": (target, summary)
                    for name, (target, summary) in getattr(domain, kind).items()
                }
                for kind in KINDS
            }
            for kind, entries in found.items():
                registries[kind].add_all(entries, origin)
        except Exception as error:  # a third party's module may raise anything; the others must work
            broken[label] = f"{type(error).__name__}: {error}"
            continue
        domains[domain.name] = (domain, origin)
    return Catalog(domains, registries, broken)


@functools.lru_cache(maxsize=1)
def catalog() -> Catalog:
    """The catalog of this environment, built at first use."""
    points: dict[tuple[str, str], importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        points.setdefault((point.name, point.value), point)  # an editable install can be listed twice
    return build_catalog(list(points.values()))
