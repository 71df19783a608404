"""Training of a recipe's models: what is learned, that it goes on where it was interrupted, and captured steps."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, build_model, causal_lm
from mambaseq.reproduction import train, training
from mambaseq.reproduction.batches import of_text
from mambaseq.tasks.optimizer import OptimizerConfig

VOCABULARY = 7
CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_steps=3)


def make(
    mixer: str = "s4d", device: str | torch.device = "cpu", dropout: float = 0.1, **options: object
) -> SequenceModel:
    torch.manual_seed(1)
    return causal_lm(VOCABULARY, 16, 1, mixer, dropout=dropout, **options).to(device)


def batches(device: str | torch.device = "cpu") -> Callable[[Tensor], Batch]:
    """The next token is the one before plus one."""
    return of_text(torch.arange(300, device=device) % VOCABULARY, 12, 4, seed=0)


def weights(model: SequenceModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Interrupted(Exception):
    pass


def until(step: int, batch_of: Callable[[Tensor], Batch]) -> Callable[[Tensor], Batch]:
    """Batches up to this step, at which the run dies."""

    def batch_of_earlier(number: Tensor) -> Batch:
        if int(number) == step:
            raise Interrupted
        return batch_of(number)

    return batch_of_earlier


def test_the_loss_falls() -> None:
    model = make(dropout=0.0)
    trained = train(model, batches(), 60, OptimizerConfig(lr=5e-2, warmup_steps=5))
    assert trained.loss < 0.5 < math.log(VOCABULARY)  # the mean of all 60
    assert trained.steps == 60
    assert trained.seconds > 0
    assert trained.steps_per_second > 1
    assert not trained.captured
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("at", [1, 3, 9])
def test_interrupted_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """With dropout, so that random numbers go on as well."""
    whole = make()
    train(whole, batches(), 12, CONFIG)
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)  # after each step
    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(make(), until(at, batches()), 12, CONFIG, checkpoint=path)
    resumed = make()
    torch.manual_seed(99)
    trained = train(resumed, batches(), 12, CONFIG, checkpoint=path)
    assert trained.steps == 12
    assert same(weights(whole), weights(resumed))
    again = make()  # a finished run has nothing left to do
    trained = train(again, until(0, batches()), 12, CONFIG, checkpoint=path)
    assert trained.steps == 12
    assert math.isfinite(trained.steps_per_second)
    assert same(weights(whole), weights(again))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(make(), batches(), 2, CONFIG, checkpoint=path)
    other = make("mamba")
    before = weights(other)
    with pytest.raises(UserError, match=r"run.pt is a checkpoint of another run: parameters, initial weights differ"):
        train(other, batches(), 2, CONFIG, checkpoint=path)
    assert same(before, weights(other))
    with pytest.raises(UserError, match="optimizer, steps, clip"):
        train(make(), batches(), 3, OptimizerConfig(lr=1e-3), clip=0.5, checkpoint=path)
    torch.manual_seed(2)
    with pytest.raises(UserError, match="another run: initial weights differ"):
        train(causal_lm(VOCABULARY, 16, 1, "s4d", dropout=0.1), batches(), 2, CONFIG, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        train(make(), batches(), 2, CONFIG, checkpoint=path)
    torch.save({"model": 1}, path)
    with pytest.raises(UserError, match="another run"):
        train(make(), batches(), 2, CONFIG, checkpoint=path)


def test_a_run_that_has_learned_enough_stops(tmp_path: Path) -> None:
    model, asked = make(), []

    def finished() -> bool:
        asked.append(model.training)
        return len(asked) == 2

    path = tmp_path / "run.pt"
    trained = train(model, batches(), 20, CONFIG, finished=finished, check_every=3, checkpoint=path)
    assert trained.steps == 6
    assert asked == [False, False]
    stopped = make()  # what was interrupted after its end does not begin again
    trained = train(stopped, batches(), 20, CONFIG, finished=finished, check_every=3, checkpoint=path)
    assert trained.steps == 6
    assert len(asked) == 2
    assert same(weights(model), weights(stopped))


def test_a_curve_is_told_at_its_steps_also_by_a_run_that_goes_on(tmp_path: Path) -> None:
    told: list[tuple[int, bool]] = []
    model = make()

    def watch(step: int) -> None:
        told.append((step, model.training))

    def stop() -> bool:
        return told[-1][0] == 4  # asked after the step was told

    train(model, batches(), 7, CONFIG, watch=watch, finished=stop, check_every=2, checkpoint=tmp_path / "run.pt")
    assert told == [(2, False), (4, False)]
    told.clear()
    train(model := make(), batches(), 7, CONFIG, watch=watch, check_every=2)
    assert told == [(2, False), (4, False), (6, False)]


def test_the_learning_rate_follows_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        used.append({float(group["lr"]) for group in self.param_groups}.pop())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = OptimizerConfig(lr=0.5, warmup_steps=2, schedule="linear", min_lr_ratio=0.1)
    train(make(), batches(), 6, config)
    assert used == pytest.approx([0.25, 0.5, 0.5, 0.3875, 0.275, 0.1625])


def test_gradients_are_cut() -> None:
    """AdamW's first moment after one step is (1 - beta1) times the gradient."""
    seen = []
    for clip in (0.0, 1e-3):
        model = make()
        run = training._Run(model, batches(), 1, CONFIG, clip, None, False)
        run.step(0)
        moments = [state["exp_avg"].flatten() for state in run.optimizer.state.values()]
        seen.append(torch.cat(moments).norm().item() / (1 - CONFIG.beta1))
    assert seen[0] > 0.01
    assert seen[1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(
    ("mixer", "options"), [("mamba", {}), ("s4d", {}), ("s4", {"mode": "fft"}), ("lssl", {}), ("attention", {})]
)
def test_captured_steps_are_eager_steps(cuda: torch.device, mixer: str, options: dict) -> None:
    found = []
    for cuda_graph in (True, False):
        model = make(mixer, cuda, dropout=0.0, **options)
        trained = train(model, batches(cuda), 20, CONFIG, cuda_graph=cuda_graph, average=0.9)
        assert trained.captured == cuda_graph
        found.append((weights(model), trained.loss))
    (one, loss), (other, same_loss) = found
    assert loss == pytest.approx(same_loss, rel=1e-3)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
def test_a_captured_run_learns_under_autocast_and_stops(cuda: torch.device) -> None:
    model = make("mamba", cuda, dropout=0.0)
    asked: list[int] = []
    trained = train(
        model,
        batches(cuda),
        400,
        CONFIG,
        autocast=torch.bfloat16,
        finished=lambda: bool(asked.append(1)) or len(asked) == 3,  # type: ignore[func-returns-value]
        check_every=100,
    )
    assert trained.captured
    assert trained.steps == 300
    assert trained.loss < 0.5


@pytest.mark.gpu
@pytest.mark.usefixtures("full_precision")
def test_a_captured_run_resumes(cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: a graph's random numbers go on as well. It is interrupted in a check, of which replays know
    nothing."""
    whole = make(device=cuda)
    train(whole, batches(cuda), 20, CONFIG, average=0.9)
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)

    def interrupt() -> bool:
        raise Interrupted

    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(
            *(make(device=cuda), batches(cuda), 20, CONFIG),
            **{"checkpoint": path, "finished": interrupt, "check_every": 10, "average": 0.9},  # type: ignore[arg-type]
        )
    resumed = make(device=cuda)
    torch.manual_seed(99)
    trained = train(resumed, batches(cuda), 20, CONFIG, checkpoint=path, average=0.9)
    assert trained.captured
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(resumed)[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
def test_a_backbone_with_graphs_of_its_own_keeps_them(cuda: torch.device) -> None:
    torch.manual_seed(1)
    model = causal_lm(VOCABULARY, 16, 1, cuda_graph=True).to(cuda)
    trained = train(model, batches(cuda), 8, CONFIG)
    assert not trained.captured
    assert model.backbone.graphs.replays > 0


def test_a_run_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends in time, and so does its learning rate; a continued one has the rest of the time, and its average."""
    rates: list[float] = []
    step = training._Run.step

    def told(run: training._Run, number: float) -> None:
        step(run, number)
        rates.append(run.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(training._Run, "step", told)
    config = OptimizerConfig(lr=1e-2, warmup_steps=0, min_lr_ratio=0.0)
    trained = train(make(), batches(), 10**6, config, clock=0.3)
    assert 0.3 <= trained.clock < 2
    assert trained.steps == len(rates) < 10**6
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.7e-2
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)
    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(make(), until(9, batches()), 10**6, config, clock=1000, average=0.9, checkpoint=path)
    saved = torch.load(path)
    assert 0 < saved["clock"] < 300
    saved["clock"] = 999.9
    torch.save(saved, path)
    rates.clear()
    model = make()
    trained = train(model, batches(), 10**6, config, clock=1000, average=0.9, checkpoint=path)
    assert trained.clock < 1010
    assert rates[0] < 1e-7
    assert not same(weights(model), torch.load(path)["model"])  # the average is left in it
    with pytest.raises(UserError, match="clock, average differ"):
        train(make(), batches(), 10**6, config, checkpoint=path)


def test_progress_is_told_soon_and_then_rarely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count()  # each look at the clock, of which a step has one, is a second
    monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    train(make(), batches(), 150, CONFIG, label="it")
    told = [int(line.split()[2]) for line in capsys.readouterr().out.splitlines() if line.startswith("it: step")]
    gaps = [later - earlier for earlier, later in itertools.pairwise([0, *told])]
    assert 1 <= gaps[0] <= 3
    assert gaps == sorted(gaps)
    assert gaps[-3:] == [31, 31, 31]


def test_the_average_of_the_weights_is_checked_and_left() -> None:
    model, seen, steps = make(dropout=0.0), [], []
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: p.clone() for name, p in own.items()}

    def look() -> bool:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return False

    def after(number: Tensor) -> Batch:
        steps.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return batches()(number)

    train(model, after, 4, CONFIG, average=0.3, finished=look, check_every=1)
    for number, now in enumerate(steps[1:]):  # what the next step begins with
        kept = min(0.3, (2 + number) / (11 + number))
        average = {name: kept * value + (1 - kept) * now[name] for name, value in average.items()}
        for name, value in seen[number].items():
            torch.testing.assert_close(value, average[name])
    assert all(torch.equal(p, seen[-1][name]) for name, p in model.named_parameters())


def told_what_to_say(device: str | torch.device) -> tuple[SequenceModel, Callable[[Tensor], Batch]]:
    """A model whose targets are its condition, which a tenth of the sequences are not told."""
    torch.manual_seed(1)
    encoder = {"name": "tokens", "vocab_size": VOCABULARY, "n_conditions": VOCABULARY, "condition_dropout": 0.1}
    spec = {"d_model": 16, "encoder": encoder, "backbone": {"name": "residual", "n_layers": 1}}
    head = {"name": "lm", "vocab_size": VOCABULARY}
    model = build_model({**spec, "mixer": {"name": "s4d"}, "head": head}).to(device)

    def batch_of(step: Tensor) -> Batch:
        condition = (step + torch.arange(16, device=device)) % VOCABULARY
        inputs = torch.zeros(16, 4, dtype=torch.int64, device=device)
        return Batch(inputs=inputs, targets=condition[:, None].expand(16, 4), condition=condition)

    return model, batch_of


def test_conditions_reach_the_model() -> None:
    model, batch_of = told_what_to_say("cpu")
    train(model, batch_of, 40, OptimizerConfig(lr=5e-2, warmup_steps=5))
    batch = batch_of(torch.tensor(0))
    with torch.no_grad():
        assert float(model(batch.inputs, batch.targets, condition=batch.condition).loss) < 0.1 < math.log(VOCABULARY)


@pytest.mark.gpu
def test_a_captured_run_is_told_conditions(cuda: torch.device) -> None:
    model, batch_of = told_what_to_say(cuda)
    trained = train(model, batch_of, 200, OptimizerConfig(lr=5e-2, warmup_steps=5), average=0.5, clock=60.0)
    assert trained.captured
    assert 0 < trained.clock < 60
    batch = batch_of(torch.tensor(0, device=cuda))
    with torch.no_grad():
        assert float(model(batch.inputs, batch.targets, condition=batch.condition).loss) < 0.1
