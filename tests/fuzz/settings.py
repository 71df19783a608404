"""Configurations, overrides and options of commands."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mutations as m
from cases import Case, Place, as_argument, condition, generated_as, predict
from world import INPUTS, configurations


def config(place: Place) -> Case:
    """A harmed configuration."""
    rng = place.rng
    name = place.one_of(*place.world.names)
    path = place.folder / "config.yaml"
    mutated, touched = m.yaml_text(rng, configurations(place.world.data)[name], place.canary)
    path.write_bytes(mutated)
    if rng.random() < 0.03:
        m.of_path(rng, path, place.world.folder / "elsewhere.txt")
    keys = m.dotted(configurations(place.world.data)[name])
    return Case(["fit", "--config", str(path), "--out", str(place.folder / "run")], {"config.yaml", *touched, *keys})


TRAINER_KEYS = [
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "logger",
    "callbacks",
    "fast_dev_run",
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "max_time",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "deterministic",
    "benchmark",
    "inference_mode",
    "use_distributed_sampler",
    "profiler",
    "detect_anomaly",
    "barebones",
    "plugins",
    "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
    "default_root_dir",
]
KEYS = {
    "": [
        "seed",
        "metrics",
        "loader.batch_size",
        "loader.num_workers",
        "loader.pack",
        "checkpoint.every_n_steps",
        "checkpoint.monitor",
        "checkpoint.mode",
        "generation.temperature",
        "generation.top_p",
        "generation.top_k",
        "generation.max_new_tokens",
        "length_warmup.start",
        "length_warmup.steps_per_stage",
        "model.d_model",
        "model.tie_embeddings",
        "model.encoder.name",
        "model.backbone.name",
        "model.backbone.n_layers",
        "model.backbone.pattern",
        "model.backbone.norm_eps",
        "model.backbone.dropout",
        "model.backbone.chunk_length",
        "model.backbone.mlp",
        "model.backbone.checkpoint",
        "model.mixer.name",
        "model.mixer.d_state",
        "model.mixer.dt_rank",
        "model.mixer.expand",
        "model.mixer.d_conv",
        "model.mixer.backend",
        "model.mixer.lti",
        "model.mixers",
        "model.head.name",
        "model.head.scale",
        "model.head.n_outputs",
        "optimizer.lr",
        "optimizer.weight_decay",
        "optimizer.warmup_steps",
        "optimizer.beta1",
        "optimizer.beta2",
        "optimizer.schedule",
        "optimizer.min_lr_ratio",
        "config",
        "out",
        "resume",
        "help",
    ],
    "dna_lm": [
        "data.fasta",
        "data.length",
        "data.test_records",
        "data.validation_records",
        "data.validation_fraction",
        "data.drop_n",
        "data.samples_per_epoch",
        "data.n_validation",
        "data.cache",
        "data.lowercase",
        "data.seed",
    ],
    "dna_labels": ["data.species", "data.length", "data.test_records", "model.encoder.k", "model.encoder.stride"],
    "audio": [
        "data.files",
        "data.pattern",
        "data.condition",
        "data.split",
        "data.validation",
        "data.test",
        "data.length",
        "data.sample_rate",
        "data.resample",
        "data.channels",
        "data.validation_list",
    ],
    "text": [
        "data.files",
        "data.validation_files",
        "data.validation_fraction",
        "data.field",
        "data.encoding",
        "data.tokenizer",
        "data.tokenizer_options",
        "data.length",
        "data.epoch_size",
    ],
    "pieces": [
        "data.files",
        "data.unit",
        "data.streaming",
        "data.shuffle_windows",
        "data.tokenizer_options",
        "data.length",
    ],
    "synthetic": ["data.length", "data.n_data", "data.vocab_size", "data.n_validation", "data.samples_per_epoch"],
}


def _values(rng: random.Random, key: str, canary: str) -> Any:
    if rng.random() < 0.5:
        return m.value(rng, rng.choice((1, 8, 0.5, "mamba", [], True)), canary)
    if key.startswith("trainer."):
        return rng.choice(
            (
                "auto",
                "cpu",
                "gpu",
                "ddp",
                "fsdp",
                "deepspeed",
                "bf16-true",
                "16-mixed",
                "64-true",
                "16-true",
                "simple",
                "advanced",
                "norm",
                "value",
                2,
                4,
                0.5,
                1.0,
                0,
                -1,
                True,
                False,
                None,
                "EarlyStopping",
                ["x"],
                [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}],
                [{"class_path": "BackboneFinetuning"}],
                {"class_path": "WandbLogger"},
                "00:00:00:01",
            )
        )
    return rng.choice(
        (0, 1, 2, 3, 5, 16, 17, 64, 1000, -1, 0.1, 0.999, True, "mamba2", "s4d", "hyena", "rwkv4", "lssl", "h3", "s4")
    )


def overrides(place: Place) -> Case:
    """Harmed `--key value`, for fit, --resume and test."""
    rng = place.rng
    name = place.one_of(*[name for name in KEYS if name])
    chosen, wrong = [], set()
    for _ in range(rng.choice((1, 1, 1, 2))):
        pool = rng.choice((KEYS[""], KEYS[name], [f"trainer.{key}" for key in TRAINER_KEYS]))
        key = rng.choice(pool)
        wrong |= {key, key.rpartition(".")[2], key.rpartition(".")[0]}
        if rng.random() < 0.08:
            key = rng.choice(
                (key + "s", key[:-1], key.upper(), key.replace(".", ".."), "", "trainer", "model", "data", key + ".x")
            )
            wrong |= {key, key.rpartition(".")[2]}
        given = as_argument(rng, _values(rng, key, place.canary))
        wrong |= {given[:40], Path(given[:40]).name}
        chosen += [f"--{key}={given}"] if rng.random() < 0.4 else [f"--{key}", given]
    kind = rng.random()
    if kind < 0.7:
        base = place.world.folder / "configs" / f"{name}.yaml"
        return Case(["fit", "--config", str(base), "--out", str(place.folder / "run"), *chosen], wrong)
    run = place.run(name)
    if kind < 0.85:
        return Case(["fit", "--resume", str(run), "--trainer.max_steps", "2", *chosen], wrong)
    return Case(["test", "--checkpoint", str(run), *chosen], wrong)


def options(place: Place) -> Case:
    """Harmed options of every other command."""
    rng, canary = place.rng, place.canary
    command = rng.choice(("predict", "predict", "generate", "generate", "test", "list", "data"))
    name = place.one_of(*INPUTS)
    run, given = place.world.run(name), lambda: as_argument(rng, m.value(rng, rng.choice((3, "x", 0.5)), canary))
    if command == "list":
        return Case(["list", given()], {"kind"})
    if command == "data":
        action = rng.choice(("list", "info", "fetch", given()))
        name = given()
        argv = ["data", action, *([name] if action != "list" else [])]
        return Case([*argv, "--cache", str(place.folder / "cache")], {"name", "action", name[:40], "manifest"})
    if command == "test":
        target = given()
        return Case(["test", "--checkpoint", target], {"checkpoint", "run", target[:40]})
    out = place.folder / "out.csv"
    if command == "predict":
        argv = predict(run, place.world.data / INPUTS[name], out, *condition(name))
        keys = ["--window", "--batch-size", "--reader", "--condition", "--out", "--checkpoint", "--device", "INPUT"]
    else:
        argv = [
            "generate",
            "--checkpoint",
            str(run),
            "--out",
            str(place.folder / generated_as(name)),
            "-n",
            "4",
            "--device",
            "cpu",
            *condition(name),
        ]
        keys = [
            "--prompt",
            "--prompt",
            "--condition",
            "--out",
            "-n",
            "--samples",
            "--temperature",
            "--top-k",
            "--top-p",
            "--seed",
            "--writer",
            "--device",
            "--checkpoint",
        ]
    wrong = {"--checkpoint", "model.json", "--out"}  # a domain without a writer cannot generate, whatever else is said
    for _ in range(rng.choice((1, 1, 2))):
        key, value = rng.choice(keys), given()
        if key in ("--samples", "-n", "--window", "--batch-size") and rng.random() < 0.5:
            value = rng.choice(("0", "-1", "3", "nan", "2.5", "1e3", "0x10", str(2**63)))
        if key == "--out" and not value.startswith("/dev"):
            value = str(place.folder / value.lstrip("/")) if rng.random() < 0.8 and "\0" not in value else value
        argv += [value] if key == "INPUT" else [key, value]
        wrong |= {key, key.lstrip("-").lower(), value[:40], Path(value).name[:40] if "\0" not in value else ""}
        wrong |= {"max-new-tokens", "new tokens"} if key == "-n" else set()
    return Case(argv, wrong)
