"""Odd values for every setting: each is refused in words that name it, or used."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from keys import flat, written

from mambaseq.errors import ConfigError, UserError
from mambaseq.plain import dump_yaml
from mambaseq.runs.naming import resolve_config
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.settings import read_settings

# a configuration of each domain
CONFIGS = ("dna/demo", "audio/demo", "text/demo", "synthetic/selective_copying")
ODD: tuple[Any, ...] = (
    *(None, [], {}, -1, 0, float("nan"), float("inf"), 2**63),
    *("x" * 3000, [[[]]], True, ""),
)
PER_CONFIG = 20  # a seeded choice of all keys with all values: all of them take minutes


def try_value(raw: dict[str, Any], key: str, value: Any, path: Path) -> str | None:
    """What is wrong with how one value of one key is taken; None when nothing is."""
    path.write_text(dump_yaml(written(raw, key, value)))
    case = f"{key}: {value!r:.30}"
    try:
        run = parse_config(str(path), [])
        data = run.make_data()
        if data.vocab_size or data.n_channels:  # else files tell
            run.model_spec(data)
    except UserError as error:
        text = str(error)
        if len(text) >= 1000 or "\n" in text or "<class" in text or key.rpartition(".")[2] not in text:
            return f"{case}: {len(text)} characters: {text[:300]}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error!s:.300}"
    return None


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_values_are_refused_by_key_or_used(name: str, tmp_path: Path) -> None:
    keys = flat(parse_config(name, []).settings)
    raw = read_settings(resolve_config(name))
    cases = [(key, value) for key in keys for value in ODD]
    wrong = [
        found
        for key, value in random.Random(name).sample(cases, min(PER_CONFIG, len(cases)))
        if (found := try_value(raw, key, value, tmp_path / "odd.yaml")) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", float("inf")), ("model.d_model", "x" * 3000), ("model.backbone.pattern", "x" * 3000)],
)
def test_what_once_ended_otherwise(key: str, value: Any, tmp_path: Path) -> None:
    raw = read_settings(resolve_config("dna/demo"))
    assert try_value(raw, key, value, tmp_path / "odd.yaml") is None
    with pytest.raises(UserError):
        parse_config(str(tmp_path / "odd.yaml"), [])


def test_what_the_data_do_not_have_is_told_with_how_they_are_set(tmp_path: Path) -> None:
    raw = read_settings(resolve_config("synthetic/pathfinder"))
    assert try_value(raw, "data.continuous", True, tmp_path / "odd.yaml") is None
    run = parse_config(str(tmp_path / "odd.yaml"), [])
    with pytest.raises(ConfigError, match=r"does not have with .*data\.continuous True"):
        run.model_spec(run.make_data())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_a_scale_that_leaves_nothing_of_the_pooled_vector_is_refused(scale: float) -> None:
    from mambaseq.heads.classification import ClassificationHead

    with pytest.raises(ConfigError, match="finite scale above 0"):
        ClassificationHead(8, 3, scale=scale)


def test_several_machines_are_refused_where_nothing_says_which_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from mambaseq.runs.processes import check_devices

    for name in ("NODE_RANK", "GROUP_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes is 2"):
        check_devices({"num_nodes": 2})
    check_devices({"num_nodes": 1})
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_devices({"num_nodes": 2})


def test_more_workers_than_a_machine_has_room_for_are_refused_by_their_key() -> None:
    from mambaseq.runs.config import LoaderConfig

    with pytest.raises(UserError, match=r"loader\.num_workers asks for 32,768"):
        LoaderConfig(num_workers=32768)


def test_arguments_that_are_left_over_are_quoted() -> None:
    from mambaseq.arguments import Arguments

    with pytest.raises(ConfigError, match=r"'\\t' on the command line"):
        Arguments(prog="mambaseq predict").parse_args(["\t"])


def test_a_misspelt_option_is_named_with_the_one_that_it_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    from mambaseq.cli.main import main

    for command, near in (
        (["generate", "--checkpoint", "run", "--out", "x", "--temprature", "0"], "--temperature"),
        (["predict", "--checkpoint", "run", "x", "--out", "x", "--batchsize=3"], "--batch-size"),
        (["runs", "--srot", "name"], "--sort"),
    ):
        assert main(command) == 2
        told = capsys.readouterr().err
        wrong = next(text for text in reversed(command) if text.startswith("--")).partition("=")[0]
        assert f"there is no option {wrong}. Did you mean '{near}'?" in told
        assert "all inputs" not in told


def test_short_names_of_the_trainer_are_told_with_ours() -> None:
    from mambaseq.runs.trainer_classes import make_classes

    with pytest.raises(ConfigError, match=r"profiler 'part'\. Did you mean 'parts'\? Known: parts, simple"):
        make_classes("profiler", "part")
    with pytest.raises(
        ConfigError, match=r"strategy 'dpp'\. Did you mean 'ddp'\? Known: fsdp2, ddp, auto, ddp_find"
    ) as told:
        make_classes("strategy", "dpp")
    assert "fork" not in str(told.value)  # refused, as are others of its kind
    assert [make_classes("profiler", "Simple"), make_classes("strategy", "auto")] == ["Simple", "auto"]


def test_strategies_whose_checkpoints_no_run_can_read_are_refused() -> None:
    """All of Lightning's that write them another way than it does by itself, by each of their names."""
    from lightning.pytorch import strategies

    from mambaseq.runs.trainer_classes import make_classes

    public = [getattr(strategies, name) for name in strategies.__all__]
    refused = [kind for kind in public if kind.save_checkpoint is not strategies.Strategy.save_checkpoint]
    assert {strategies.FSDPStrategy, strategies.ModelParallelStrategy, strategies.DeepSpeedStrategy} <= {*refused}
    for kind in refused:
        for path in (kind.__name__, f"{strategies.__name__}.{kind.__name__}", f"{kind.__module__}:{kind.__name__}"):
            for value in (path, {"class_path": path}):
                with pytest.raises(ConfigError, match=rf"{kind.__name__} writes .* Use trainer\.strategy fsdp2"):
                    make_classes("strategy", value)
    for short in ("fsdp", "fsdp_cpu_offload", "deepspeed_stage_2"):
        with pytest.raises(ConfigError, match=r"Use trainer\.strategy fsdp2"):
            make_classes("strategy", short)
    with pytest.raises(ConfigError, match="Known: ") as told:
        make_classes("strategy", {"class_path": "None"})
    assert "fsdp2" in str(told.value)
    assert not any(kind.__name__ in str(told.value) for kind in refused)


@pytest.mark.parametrize("module", ["", "lightning.pytorch.strategies.", "lightning.pytorch.strategies.ddp:"])
def test_ddp_is_ours_by_whatever_name(module: str) -> None:
    from mambaseq.runs.trainer_classes import make_classes
    from mambaseq.tasks.replicated import Replicated

    made = make_classes("strategy", {"class_path": f"{module}DDPStrategy", "init_args": {"bucket_cap_mb": 50}})
    assert type(made) is Replicated
    assert made._ddp_kwargs["bucket_cap_mb"] == 50


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.backbone.norm_eps", -1),
        ("model.backbone.norm_eps", float("nan")),
        ("model.backbone.dropout", 1.5),
        ("model.head.label_smoothing", -1),
        ("model.mixer.dt_max", 2**63),
        ("model.mixer.dt_init_floor", 0),
        ("model.mixer.d_state", "1:30"),
        ("seed", "1:30"),
        ("optimizer.weight_decay", 2**63),
        ("data.cache", "a\0b"),
        ("trainer.gradient_clip_val", float("nan")),
        ("generation.temperature", float("nan")),
        ("trainer.min_steps", -1),
        ("trainer.num_nodes", 0),
        ("trainer.accumulate_grad_batches", None),
        ("trainer.detect_anomaly", None),
        ("trainer.strategy", None),
        ("trainer.callbacks", "a\0b"),
        ("trainer.accelerator", "[cpu"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(dump_yaml(written(read_settings(resolve_config("dna/demo")), key, value)))
    with pytest.raises(UserError, match=re.escape(key)):
        parse_config(str(path), [])


@pytest.mark.parametrize("devices", [100_000, "100000", [0] * 300])
def test_more_processes_than_a_machine_has_room_for_are_refused_by_their_key(devices: Any) -> None:
    from mambaseq.runs.processes import check_devices

    with pytest.raises(UserError, match=r"trainer\.devices asks for .*MAMBASEQ_MAX_DEVICES"):
        check_devices({"devices": devices})
    for fine in (2, "auto", "2", "0,1", [0, 1], -1, None):
        check_devices({} if fine is None else {"devices": fine})
