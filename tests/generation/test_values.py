"""Signals continued: stepwise equals full, each sample alone as beside others, from configuration to CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.cli.main import main
from mambaseq.data.signals import read_csv, write_csv
from mambaseq.errors import ConfigError, DataError, UserError
from mambaseq.generation.checks import NotFinite
from mambaseq.generation.decode import generate
from mambaseq.generation.values import continue_values
from mambaseq.models import SequenceModel, build_model

QUANTILE: dict[str, Any] = {"loss": "quantile", "quantiles": [0.1, 0.5, 0.9]}


def forecaster(backbone: str = "residual", **head: Any) -> SequenceModel:
    torch.manual_seed(0)
    model = build_model(
        {
            "d_model": 8,
            "encoder": {"name": "signal", "n_channels": 2, "n_conditions": 2},
            "backbone": {"name": backbone, "n_layers": 1},
            "mixer": {"name": "mamba"},
            "head": {"name": "forecast", "n_channels": 2, **head},
        }
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("head", [{}, QUANTILE, {"horizon": 3}])
def test_the_mean_fed_back_equals_the_full_forward(head: dict[str, Any]) -> None:
    model, prompt, condition = forecaster(**head), torch.randn(2, 5, 2), torch.tensor([1, 0])
    found = continue_values(model, prompt, 6, temperature=0, condition=condition)
    whole = prompt
    with torch.no_grad():
        for _ in range(6):
            told = model(whole, condition=condition)
            assert told.values is not None
            whole = torch.cat([whole, told.values[:, -1:]], 1)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_replayed_steps_equal_the_cpu(cuda: torch.device) -> None:
    """From a CUDA graph, whose output the next step overwrites."""
    model, prompt = forecaster(), torch.randn(2, 5, 2)
    expected = continue_values(model, prompt, 40, temperature=0)
    found = continue_values(model.to(cuda), prompt.to(cuda), 40, temperature=0).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_each_sample_is_what_it_is_alone() -> None:
    model, prompts = forecaster(), torch.randn(3, 4, 2)
    condition = torch.tensor([0, 1, 1])
    together = continue_values(model, prompts, 5, seed=3, condition=condition, samples=2)
    alone = continue_values(
        model, prompts[1:2], 5, seed=3, condition=condition[1:2], samples=1, numbers=torch.tensor([[1]])
    )
    torch.testing.assert_close(together[3], alone[0])
    assert not torch.equal(together[2, 4:], together[3, 4:])
    other = continue_values(model, prompts, 5, seed=4, condition=condition, samples=2)
    assert not torch.equal(together[:, 4], other[:, 4])
    assert torch.equal(together[:, :4], prompts.repeat_interleave(2, 0))
    nearly = prompts[:1] + 1e-4  # draws depend on what the prompt holds, not on its whole numbers
    assert not torch.equal(
        continue_values(model, nearly, 1, seed=3, condition=condition[:1])[:, 4].round(decimals=2),
        together[:1, 4].round(decimals=2),
    )


def test_samples_follow_what_is_told() -> None:
    model, prompt = forecaster(), torch.randn(1, 4, 2)
    with torch.no_grad():
        told = model(prompt).distribution
    drawn = continue_values(model, prompt, 1, seed=0, samples=4000)[:, -1]
    mean, scale = told.mean[0, -1], told.scale[0, -1]
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.06 * float(scale.max()), rtol=0)
    torch.testing.assert_close(drawn.std(0), scale, rtol=0.05, atol=0)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.06  # channels are drawn each by itself


def test_what_cannot_be_continued_is_refused() -> None:
    prompt = torch.randn(1, 4, 2)
    with pytest.raises(ConfigError, match="Only a causal model that predicts next values"):
        continue_values(forecaster("bidirectional"), prompt, 1)
    with pytest.raises(ConfigError, match="lm head"):
        generate(forecaster(), torch.zeros(1, 3, dtype=torch.long), 1)
    with pytest.raises(ConfigError, match="at least one step"):
        continue_values(forecaster(), prompt[:, :0], 1)
    with pytest.raises(ConfigError, match="temperature"):
        continue_values(forecaster(), prompt, 1, temperature=-1)
    with pytest.raises(UserError, match="MAMBASEQ_MAX_GENERATED"):
        continue_values(forecaster(), prompt, 10**9)
    model = forecaster()
    with torch.no_grad():
        model.head.linear.bias.fill_(float("inf"))
    with pytest.raises(NotFinite, match="not a finite number"):
        continue_values(model, prompt, 2)


def test_signals_in_csv_files(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    (one,) = write_csv(tmp_path / "x.csv", [values], None, columns=["a", "b"])
    assert one.read_text().splitlines()[0] == "a,b"
    for columns in (None, ["a", "b"]):
        (record,) = read_csv(one, None, columns)
        assert (record.name, record.signal.tolist()) == ("x", values.tolist())
    assert [path.name for path in write_csv(tmp_path / "y.csv", [values] * 2, None)] == ["y-000.csv", "y-001.csv"]
    assert (tmp_path / "y-001.csv").read_text().startswith("value_1,value_2\n")
    with pytest.raises(DataError, match=r"first line must name each of 'a,c'"):
        next(read_csv(one, None, ["a", "c"]))
    with pytest.raises(ConfigError, match="not what has the shape"):
        write_csv(tmp_path / "z.csv", [values], None, columns=["a"])
    with pytest.raises(DataError, match="cannot be read as a CSV"):
        next(read_csv(tmp_path / "none.csv", None))


def test_a_forecaster_from_configuration_to_csv(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, run, prompt = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "p.csv"
    config.write_text(
        'data: {name: "tiny:TinySeries"}\n'
        "model: {d_model: 16, encoder: {name: signal}, head: {name: forecast}, backbone: {n_layers: 1}}\n"
        "metrics: [mae, rmse, correlation, crps]\nloader: {batch_size: 8}\noptimizer: {lr: 0.02, warmup_steps: 5}\n"
        "trainer: {max_steps: 60, accelerator: cpu, enable_progress_bar: false}\n"
    )
    assert main(["fit", "--config", str(config), "--out", str(run)]) == 0
    assert load_model(run).card.task == "next_values"
    steps = np.arange(20)
    write_csv(prompt, [np.stack([np.sin(steps / 4), np.cos(steps / 4)], 1)], None, columns=["sine", "cosine"])
    generate_ = ["generate", "--checkpoint", str(run), "--prompt", str(prompt), "-n", "4", "--device", "cpu"]
    out = tmp_path / "o.csv"
    assert main([*generate_, "--out", str(out), "--temperature", "0"]) == 0
    (record,) = read_csv(out, None, ["sine", "cosine"])
    assert record.signal is not None
    assert record.signal.shape == (24, 2)
    late = np.arange(24) / 4  # it was learned
    np.testing.assert_allclose(record.signal, np.stack([np.sin(late), np.cos(late)], 1), atol=0.3)
    assert main([*generate_, "--out", str(tmp_path / "s.csv"), "--samples", "3"]) == 0
    assert (tmp_path / "s-002.csv").is_file()
    assert main(["predict", "--checkpoint", str(run), str(prompt), "--out", str(out), "--device", "cpu"]) == 0
    header, *rows = out.read_text().splitlines()
    assert header.split(",")[4:-1] == ["mean_1", "std_1", "mean_2", "std_2"]
    assert len(rows) == 20
    capsys.readouterr()
    for more, message in (
        (["--top-k", "3"], "--top-k is about tokens"),
        (["--prompt", "no such"], "(--prompt), and a signal is read from a file"),
    ):
        assert main([*generate_, "--out", str(tmp_path / "e.csv"), *more]) == 2
        assert message in capsys.readouterr().err
    assert main([part for part in [*generate_, "--out", "e.csv"] if part not in ("--prompt", str(prompt))]) == 2
    assert "Give one: --prompt FILE" in capsys.readouterr().err


def test_values_that_are_not_those_that_come_next_are_no_continuation(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = forecaster()
    card = ModelCard(spec=model.spec or {}, task="values", reader="csv", writer="csv", condition_names=["a", "b"])
    save_model(tmp_path / "m", model, card)
    arguments = ["--prompt", "x.csv", "--out", str(tmp_path / "o.csv"), "-n", "1", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(tmp_path / "m"), *arguments]) == 2
    assert "was not trained to predict the next values of its own channels" in capsys.readouterr().err


def test_a_header_may_have_spaces_and_many_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("room temp, load\n1,2\n")
    (record,) = read_csv(path, None)
    assert record.signal is not None
    assert record.signal.tolist() == [[1.0, 2.0]]
    names = [f"a rather long name of channel {number}" for number in range(400)]
    path.write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    (record,) = read_csv(path, None)
    assert record.signal is not None
    assert record.signal.shape == (1, 400)
