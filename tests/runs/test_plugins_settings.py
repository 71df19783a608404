"""What a plugin can rely on in a configuration: metrics by their whole names, paths that stay where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyTokens, TinyValues

from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.heads.classification import ClassificationHead
from mambaseq.heads.regression import RegressionHead
from mambaseq.metrics import Metric
from mambaseq.metrics.likelihood import Perplexity
from mambaseq.runs.config import metric_labels
from mambaseq.runs.parsing import parse_config

HERE = "runs.test_plugins_settings"
CONFIG = f"""
data: {{name: "{HERE}:InFolder", place: here}}
loader: {{batch_size: 4}}
model: {{d_model: 8, backbone: {{name: residual, n_layers: 1}}, mixer: {{name: mamba, d_state: 4}}}}
metrics: [perplexity, "{HERE}:Mine"]
trainer: {{accelerator: cpu, enable_progress_bar: false, max_steps: 2, val_check_interval: 2, log_every_n_steps: 1}}
"""


class InFolder(TinyTokens):
    """Its path has a name that says nothing."""

    def __init__(self, place: Path, others: list[Path] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.place = Path(place)

    def setup(self) -> None:
        (self.place / "there.txt").read_text()
        super().setup()


class Three(TinyValues):
    n_outputs = 3


class Named(TinyTokens):
    class_names = ("a", "b", "c")


class Needing(RegressionHead):
    def __init__(self, d_model: int, n_outputs: int) -> None:
        super().__init__(d_model, n_outputs)


class Mine(Perplexity):
    pass


def test_metrics_keep_their_names() -> None:
    assert metric_labels(["perplexity", "series/perplexity", "a.b:Mine", "c.d:Mine"]) == {
        "perplexity": "perplexity",
        "series/perplexity": "series/perplexity",
        "a.b:Mine": "a.b:Mine",
        "c.d:Mine": "c.d:Mine",
    }
    assert issubclass(Mine, Metric)


class Standing(ClassificationHead):
    """On another, to which it hands on what it does not know itself.

    Args:
        weight: of nothing.
    """

    def __init__(self, d_model: int, weight: float = 1.0, **options: Any) -> None:
        super().__init__(d_model, **options)


def test_the_data_say_how_many_outputs_and_classes_there_are(tmp_path: Path) -> None:
    """Unless the configuration does; a run's own configuration leaves it to the data again."""
    config = tmp_path / "run.yaml"

    def head(data: str, name: str, *more: str, again: bool = False) -> Any:
        config.write_text(f'data: {{name: "{HERE}:{data}"}}\nmodel: {{d_model: 8, head: {{name: "{name}"}}}}\n')
        settings = parse_config(str(config), list(more))
        if again:
            config.write_text(settings.yaml)
            settings = parse_config(str(config), [])
        return settings.model_spec(settings.make_data())["head"]

    assert head("Three", "regression", again=True)["n_outputs"] == 3
    assert head("Three", "token_regression", "--model.head.n_outputs=2", again=True)["n_outputs"] == 2
    assert head("Three", f"{HERE}:Needing")["n_outputs"] == 3
    assert "n_outputs" not in head("TinyValues", "regression")  # its own default
    with pytest.raises(ConfigError, match=r"needs n_outputs, which the dataset .* Set model\.head\.n_outputs"):
        head("TinyValues", f"{HERE}:Needing")
    for name in ("classification", "token_classification", "multilabel", "token_multilabel", f"{HERE}:Standing"):
        assert head("Named", name)["n_classes"] == 3


@pytest.mark.parametrize(
    ("monitor", "wanted"),
    [
        ("val/perplexity", "val/perplexity"),
        ("perplexity", "val/perplexity"),
        ("series/perplexity", "val/series/perplexity"),
        ("val/series/perplexity", "val/series/perplexity"),
        ("series/mae", "val/series/mae"),
        ("mae", "val/series/mae"),
    ],
)
def test_the_monitor_is_a_metric_as_it_was_named(tmp_path: Path, monitor: str, wanted: str) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG.replace("place: here", f"place: {tmp_path}"))
    settings = parse_config(str(tmp_path / "run.yaml"), [f"--checkpoint.monitor={monitor}"])
    metrics = {name: Mine([]) for name in ("perplexity", "series/perplexity", "series/mae")}
    assert settings.best(metrics)[0] == wanted


def test_a_word_that_two_metrics_end_with_is_no_monitor(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG.replace("place: here", f"place: {tmp_path}"))
    settings = parse_config(str(tmp_path / "run.yaml"), ["--checkpoint.monitor=mae"])
    with pytest.raises(ConfigError, match="which this run does not log"):
        settings.best({name: Mine([]) for name in ("a/mae", "b/mae")})


def test_a_run_whose_paths_are_typed_goes_on_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "there.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "run.yaml", "--out", "run", "--data.others=[a,b]"]) == 0
    assert "val/Mine" in json.loads(Path("run/results.json").read_text())
    settings = parse_config("run/config.yaml", []).settings["data"]
    assert [str(path) for path in settings["others"]] == [str(tmp_path / name) for name in "ab"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["fit", "--resume", "../run", "--trainer.max_steps=4"]) == 0
