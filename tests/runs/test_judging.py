"""What an evaluation says beside its figures: intervals, pictures of the answers, baselines on the same records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import blocks, run_cell
from torchmetrics.aggregation import MeanMetric

import mambaseq as ms
from mambaseq.batch import Batch
from mambaseq.checkpoints.export import save_model
from mambaseq.cli.evaluate import told
from mambaseq.data.baselines import Told, constant
from mambaseq.data.module import SequenceData
from mambaseq.domain import catalog
from mambaseq.errors import UserError
from mambaseq.metrics.answers import Answers, AnswerSheet
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput
from mambaseq.reporting.evaluation import pictures
from mambaseq.runs.finishing import Facts, Outcome
from mambaseq.runs.judging import Judge
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.report import write_report

HERE = "runs.test_judging"
MODEL = """
loader: {batch_size: 8}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 2}, head: {name: HEAD}}
trainer: {accelerator: cpu, enable_progress_bar: false, max_steps: 2, log_every_n_steps: 1}
"""


class Items(list):
    groups: Sequence[object] | None = None


class Parity(SequenceData):
    """The class is the first token's parity: what a rule knows, and two steps of training do not. One test sequence has
    no known class.

    Args:
        positions: a class for each position instead.
        values: the token itself, as a value.
    """

    vocab_size = 4

    def __init__(self, positions: bool = False, values: bool = False) -> None:
        self.positions, self.values = positions, values
        self.class_names = () if values else ("even", "odd")
        self.n_outputs = 1 if values else None

    def setup(self) -> None:
        pass

    def _items(self, seed: int, count: int) -> Items:
        ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (count, 12)))
        targets = ids.float() if self.values else ids % 2
        return Items(Batch(i[None], t[None] if self.positions else t[:1]) for i, t in zip(ids, targets, strict=True))

    def train(self) -> Items:
        return self._items(0, 40)

    def test(self) -> Items:
        items = self._items(1, 30)
        items[3].targets[:] = np.nan if self.values else -100
        items.groups = [number // 2 for number in range(30)]
        return items

    def baselines(self):
        def rule(records: Sequence[Batch]) -> Told:
            return Told(np.stack([np.eye(2)[int(one.inputs[0, 0]) % 2] for one in records]), note="by hand")

        def of_positions(records: Sequence[Batch]) -> Told:
            return Told([np.eye(2)[one.inputs[0] % 2] for one in records])

        def wrong(records: Sequence[Batch]) -> Told:
            raise ValueError("no such file <x>")

        return {"rule": of_positions if self.positions else rule, "wrong": wrong}


def trained(path: Path, metrics: str, head: str, **data: bool) -> ms.Run:
    config = path / "run.yaml"
    settings = {"name": f"{HERE}:Parity", **data}
    config.write_text(f"metrics: {metrics}\ndata: {json.dumps(settings)}{MODEL.replace('HEAD', head)}")
    return ms.fit(config, out=path / "run", progress=False)


def test_intervals_pictures_and_baselines_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "[accuracy, auroc, ece, confusion]", "classification")
    results = run.evaluate(progress=False, baselines=True)
    found = results["test/intervals"]
    assert (found["of"], found["count"]) == ("groups", 15)
    low, high = found["metrics"]["accuracy"]
    assert low < results["test/accuracy"] < high
    beside = results["test/baselines"]
    constant_row, rule, wrong = beside["rows"]
    assert (rule["name"], rule["metrics"]["accuracy"], rule["intervals"]["accuracy"]) == ("rule", 1.0, (1.0, 1.0))
    assert rule["difference"][1] < 0
    share = sum(int(item.targets) for item in Parity().test() if item.targets >= 0) / 29
    assert constant_row["metrics"]["accuracy"] in (pytest.approx(share), pytest.approx(1 - share))
    assert wrong["note"] == "failed: ValueError: no such file <x>"
    assert beside["verdict"].startswith("A baseline is ahead of this run: rule, accuracy 1.000 against 0.")
    text = told(results)
    for line in (f"test/accuracy            {results['test/accuracy']:.4f}  [{low:.4f}, {high:.4f}]", "by hand"):
        assert line in text
    assert beside["verdict"] in text
    assert run.results["test/intervals"]["metrics"]["accuracy"] == [low, high]
    page = run.folder.report.read_text()
    for word in ("ROC", "precision and recall", "reliability", "rule", "A baseline is ahead", "95% interval"):
        assert word in page, word
    assert page.count("<svg") >= 5
    again = run.evaluate(progress=False)  # figures without their baselines have none
    assert again["test/intervals"] == found
    assert "test/baselines" not in run.results
    run.folder.evaluation.write_text('{"test": {"roc": [{"name": 1}], "kind": "labels", "tracks": [3]}, "x": 1}')
    page = _page(run)
    assert ("ROC" in page, "How it went" in page) == (False, True)
    run.folder.evaluation.write_text('{"test": {')
    assert "How it went" in _page(run)
    with pytest.raises(UserError, match="Baselines are compared by a metric of labels"):
        run.evaluate(progress=False, baselines=True, settings={"metrics": ["confusion"]})


def _page(run: ms.Run) -> str:
    facts = Facts(1, ["even", "odd"], 1.0, "loss")
    assert write_report(run.folder, parse_config(str(run.folder.config), []), Outcome("finished", "", facts)) == ""
    return run.folder.report.read_text()


def judged(data: Parity, metric: str, answer) -> tuple[Judge, Items]:
    """A judge of what `answer` makes of each test sequence."""
    items = data.test()
    sheet = AnswerSheet()
    for item in items:
        sheet.update(ModelOutput(logits=answer(item)), item)
    answers = sheet.answers()
    assert answers is not None
    metrics = {metric: catalog()["metrics"].get(metric)(data.class_names)}
    metrics[metric].update(*answers.rows())
    return Judge(metrics, {metric: float(metrics[metric].compute())}, metric, answers), items


def test_labels_of_positions_have_tracks() -> None:
    data = Parity(positions=True)
    judge, items = judged(data, "accuracy", lambda item: torch.eye(2)[item.inputs // 2])
    found = judge.beside(data, items, progress=False)
    assert found["rows"][1]["metrics"]["accuracy"] == 1.0
    assert judge.intervals()["count"] == 29  # sequences are drawn, not positions
    drawn = judge.pictures(data.class_names)
    assert "the truth and the prediction along sequence" in pictures(drawn, "test")
    one = drawn["tracks"][0]
    parity = (items[one["sequence"]].inputs[0] % 2).tolist()
    assert [label for label, length in one["truth"] for _ in range(length)] == parity


@pytest.mark.parametrize(
    ("data", "metric", "answer", "expected"),
    [
        (
            Parity(),
            "mcc",
            [0.0, 1.0],
            "The model answers one class only, 'odd', for all 29 sequences: ",
        ),
        (Parity(positions=True), "accuracy", [2.0, 1.0], "one class only, 'even', for all 348 positions:"),
        (
            Parity(values=True),
            "mae",
            [0.5],
            "The model answers the same value for all 29 sequences: its figures say no more",
        ),
    ],
)
def test_a_model_that_answers_all_alike_is_told_as_such(
    data: Parity, metric: str, answer: list[float], expected: str
) -> None:
    def always(item: Batch) -> torch.Tensor:
        return torch.tensor(answer).expand(*item.targets.shape, -1)  # type: ignore[union-attr]

    def but_one(item: Batch) -> torch.Tensor:
        return always(item) + (item.inputs[:, :1] == 0).float() * torch.tensor([9.0, 0.0])[: len(answer)]

    judge, _ = judged(data, metric, always)
    assert expected in judge.one_answer(data.class_names)
    if not data.positions:
        assert judged(data, metric, but_one)[0].one_answer(data.class_names) == ""


class Held(Metric):
    """The share that is known, by a metric of torchmetrics."""

    higher_is_better = True

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.mean = MeanMetric()

    def reset(self) -> None:
        super().reset()
        self.mean.reset()

    def update(self, output: ModelOutput, batch: Batch) -> None:
        assert output.logits is not None
        assert batch.targets is not None
        self.mean.update(output.logits.argmax(-1).eq(batch.targets).float())

    def compute(self) -> torch.Tensor:
        return self.mean.compute()


@pytest.mark.parametrize("name", ["accuracy", f"{HERE}:Held"])
def test_one_of_several_processes_judges_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of all; it would wait for processes that have ended."""
    judge, _ = judged(Parity(), name, lambda item: torch.eye(2)[item.inputs[:, 0] % 2] * 2)
    metric = catalog()["metrics"].get(name)(Parity().class_names)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    again = Judge({name: metric}, judge.figures, name, judge.answers, judge.groups)
    assert again.intervals() == judge.intervals()
    assert name in again.intervals()["metrics"]


def test_labels_that_are_always_the_same() -> None:
    targets = torch.tensor([[1, 0, 0], [0, 1, 1], [1, -100, 0]])
    for outputs, expected in (
        ([-1.0, 2.0, 3.0], "the same labels, 'b', 'c', for all 3 sequences: what counts"),
        ([-1.0] * 3, "labels, none, for"),
    ):
        answers = Answers.of(torch.tensor([outputs] * 3), targets)
        assert expected in Judge({}, {}, "", answers).one_answer(["a", "b", "c"])


def test_what_looks_certain_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table, in results.json and on the page; until another evaluation finds it otherwise."""
    run = trained(tmp_path, "[accuracy, mcc]", "classification")
    loaded = run.model()
    with torch.no_grad():
        loaded.model.head.linear.weight.zero_()
        loaded.model.head.linear.bias.copy_(torch.tensor([1.0, 0.0]))
    save_model(run.folder.path / "model", loaded.model, loaded.card)
    results = run.evaluate(progress=False)
    line = "test: The model answers one class only, 'even', for all 29 sequences: what counts them (accuracy, F1, MCC)"
    assert results["test/mcc"] == 0
    assert results["test/intervals"]["metrics"]["mcc"] == (0, 0)
    assert line in told(results)
    assert run.results["test/one_answer"] in run.folder.report.read_text().replace("&#x27;", "'")
    results.pop("test/one_answer")
    assert "test: mcc came out the same in every draw of the set, so the interval has no width; that does" in told(
        results
    )
    monkeypatch.setattr(Answers, "alike", lambda self: False)
    assert "test/one_answer" not in run.evaluate(progress=False)
    assert "test/one_answer" not in run.results


def test_values_are_drawn_against_the_truth() -> None:
    data = Parity(values=True)
    judge, items = judged(data, "mae", lambda item: item.inputs[:, :1].float() + 0.5)
    found = judge.beside(data, items, progress=False)
    mean = np.mean([float(item.targets) for item in data.train()])
    errors = [abs(float(item.targets) - mean) for item in items if item.targets >= 0]
    assert found["rows"][0]["metrics"]["mae"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found["verdict"].startswith("This run is ahead of the one baseline, constant: mae 0.500 against")
    assert "predicted against true" in pictures(judge.pictures(()), "test")


def test_what_is_constant_is_the_training_sets_share() -> None:
    rows = torch.tensor([[1, 0, -100], [1, 1, 0], [1, -100, 0], [0, 1, 1]])
    items = [Batch(torch.zeros(1, 2), row[None], target_of="sequence") for row in rows]
    answer = torch.as_tensor(constant(items, items[:2], 3).outputs)
    assert answer.shape == (2, 3)
    assert answer[0].sigmoid().tolist() == pytest.approx([3 / 4, 2 / 3, 1 / 3], abs=1e-3)


def test_the_page_on_evaluation_runs() -> None:
    names: dict[str, Any] = {}
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    for language, text, line in blocks(page):
        assert language == "python"
        run_cell(text, page, line, names)
    assert "95% alike" in names["html"]
    items = Parity().test()
    assert np.asarray(names["Mine"]().baselines()["first token"](items).outputs).shape == (30, 2)
