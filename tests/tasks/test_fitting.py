"""What does not go together is refused before the first step: heads, metrics, encoders and what the data ask for."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning
import pytest
import torch
from mambaseq_dna.encoders import KmerEncoder
from tasks.ragged import NAN, model_of
from tiny import TinySeries, TinyTokens
from torch import Tensor, nn

from mambaseq.batch import Batch
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import SequenceData
from mambaseq.encoders import Encoder, TokenEncoder
from mambaseq.errors import ConfigError, DataError
from mambaseq.heads.classification import ClassificationHead, MultilabelHead
from mambaseq.heads.lm import LMHead
from mambaseq.metrics.base import Metric
from mambaseq.metrics.classification import Accuracy, MacroF1
from mambaseq.metrics.likelihood import BitsPerToken, TokenAccuracy
from mambaseq.metrics.multilabel import MultilabelF1
from mambaseq.metrics.values import CRPS, MAE
from mambaseq.models import SequenceModel, build_model
from mambaseq.tasks.fitting import check_data, check_kinds, probe_future, probe_neighbours
from mambaseq.tasks.task import Task

IDS = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5]])
LABEL, VALUE = torch.tensor([2]), torch.tensor([0.5])
TOKENS, LEVELS = IDS.roll(3, 1), torch.randn(1, 8, 2)


class Ahead(nn.Module):
    """A plugin's encoder that says nothing of itself and sees the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.table(inputs) + self.table(inputs.roll(-1, 1))


class Liar(Ahead):
    causal = True


class Honest(Ahead):
    causal = False


class Convolution(Encoder):
    """Sees the last tokens alone, through a transform of the whole row: rounding is everywhere."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.table(inputs)
        n = x.shape[1]
        kernel = torch.fft.rfft(torch.rand(n, 1, generator=torch.Generator().manual_seed(0)), 2 * n, 0)
        return torch.fft.irfft(torch.fft.rfft(x, 2 * n, 1) * kernel, 2 * n, 1)[:, :n]


class NextTokens(TinyTokens):
    """Streamed: no example can be had before it is placed."""

    def train(self) -> Any:
        items = super().train()

        class Stream(torch.utils.data.IterableDataset):
            def place(self, **_: int) -> None:
                pass

            def __iter__(self) -> Any:
                return (items[index] for index in range(len(items)))

        return Stream()

    def validation(self) -> Any:
        return None


class Sets(SequenceData):
    """One batch of one, again and again."""

    vocab_size = 7

    def __init__(self, item: Batch, class_names: tuple[str, ...] = ()) -> None:
        self.item, self.class_names = item, class_names

    def setup(self) -> None:
        pass

    def train(self) -> list[Batch]:
        return [self.item] * 4

    def validation(self) -> list[Batch]:
        return [self.item] * 2


def with_encoder(encoder: nn.Module) -> SequenceModel:
    model = model_of("lm")
    return SequenceModel(encoder, model.backbone, model.head)


def fit(data: SequenceData, model: SequenceModel, metrics: dict[str, Metric] | None = None, **options: Any) -> Task:
    task = Task(model, metrics=metrics)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=SequenceDataModule(data, batch_size=2))
    return task


@pytest.mark.parametrize(
    ("head", "targets", "fitting"),
    [
        ("regression", LABEL, "classification"),
        ("regression", TOKENS, "lm"),
        ("regression", LEVELS, "token_regression"),
        ("classification", VALUE, "regression"),
        ("classification", TOKENS, "lm"),
        ("lm", LABEL, "classification"),
        ("lm", VALUE, "regression"),
        ("lm", LEVELS, "token_regression"),
        ("token_classification", LABEL, "classification"),
        ("token_classification", LEVELS, "token_regression"),
        ("token_regression", TOKENS, "token_classification"),
        ("multilabel", LABEL, "classification"),
        ("multilabel", VALUE, "regression"),
        ("token_classification", torch.ones(1, 8, 3, dtype=torch.long), "token_multilabel"),
    ],
)
def test_heads_learn_what_they_say(head: str, targets: Tensor, fitting: str) -> None:
    batch = Batch(IDS, targets)
    with pytest.raises(ConfigError, match=f"model.head.name is '{head}', but the dataset 'x' gives one .*{fitting}"):
        check_data(model_of(head), Sets(batch), "'x'", {})
    with pytest.raises(ConfigError, match=r"model\.head\.name"):
        fit(Sets(batch), model_of(head))


def test_several_labels_a_sequence_are_not_told_apart_by_their_number() -> None:
    """A batch says that eight labels of a row of eight tokens are the sequence's."""
    batch = Batch(IDS, torch.ones_like(IDS), target_of="sequence")
    for head in ("lm", "classification", "token_classification"):
        with pytest.raises(ConfigError, match=r"gives one set of yes-or-no labels a sequence.*such as 'multilabel'"):
            fit(Sets(batch), model_of(head))
    model = model_of("lm")
    fit(Sets(batch), SequenceModel(model.encoder, model.backbone, MultilabelHead(8, 8)))


def test_bins_of_the_head_are_those_of_the_data() -> None:
    batch = Batch(IDS, torch.randn(1, 2, 2), stride=4)
    with pytest.raises(ConfigError, match=r"answers once for 3 .*one value for 4\. Set model\.head\.stride to 4"):
        check_data(model_of("token_regression"), Sets(batch), "'x'", {})
    labels = Batch(IDS, torch.ones(1, 2, dtype=torch.long), stride=4)
    with pytest.raises(ConfigError, match=r"'lm', which answers once for 1 .*Choose the head 'token_classification'"):
        check_data(model_of("lm"), Sets(labels), "'x'", {})
    with pytest.raises(DataError, match=r"in bins of 4 \(Batch\.stride\)"):
        check_data(model_of("lm"), Sets(Batch(IDS, torch.ones(1, 3, dtype=torch.long), stride=4)), "'x'", {})


@pytest.mark.parametrize(
    ("head", "targets", "message"),
    [
        ("classification", torch.tensor([3]), r"labels from 3 to 3, and the head 'classification' tells 3 classes"),
        ("token_classification", TOKENS, r"labels from 1 to 6, and the head 'token_classification' tells 3 classes"),
        ("multilabel", torch.tensor([[1, 0, 2]]), r"labels from 0 to 2 where any of several may apply\. Give 1"),
    ],
)
def test_labels_that_a_head_has_no_output_for(head: str, targets: Tensor, message: str) -> None:
    batch = Batch(IDS, targets, target_of="sequence" if head == "multilabel" else None)
    with pytest.raises(ConfigError, match=message):
        check_data(model_of(head), Sets(batch), "'x'", {})


class PerPosition(Metric):
    """A plugin's that does not say what it needs, and fails."""

    def update(self, output: Any, batch: Batch) -> None:
        output.logits[:, 10_000]

    def compute(self) -> Tensor:
        return torch.zeros(())


class OfSequences(TokenAccuracy):
    per_token: ClassVar[bool | None] = False


@pytest.mark.parametrize(
    ("head", "targets", "metric", "message"),
    [
        ("regression", torch.tensor([[0.5, NAN]]), Accuracy(("a", "b")), "'m' needs a label, .* one value a sequence"),
        ("regression", torch.tensor([[0.5, NAN]]), BitsPerToken(), "'m' needs a label, .* one value a sequence"),
        ("lm", TOKENS, OfSequences(), "'m' needs a label for each sequence, but .* one label a position"),
        ("lm", TOKENS, Accuracy(("a", "b")), "counts the 2 classes of the data, but the head has 7"),
        ("lm", TOKENS, MAE(), "'m' needs a value, but the dataset .* one label a position"),
        ("lm", TOKENS, MultilabelF1(("a",)), "'m' needs a set of yes-or-no labels, but .* one label a position"),
        ("lm", TOKENS, PerPosition(), "'m' cannot be computed from the output of the head 'lm': .*out of bounds"),
    ],
)  # fmt: skip
def test_metrics_that_do_not_fit_are_refused_before_the_first_step(
    head: str, targets: Tensor, metric: Metric, message: str
) -> None:
    model = model_of(head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        fit(Sets(Batch(IDS, targets)), model, {"m": metric})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_class_metrics_count_labels_of_positions() -> None:
    """A labeller of positions: one right of two, -100 is no label."""
    names = tuple("abcdefg")
    task = fit(
        Sets(Batch(IDS, TOKENS), names), model_of("lm"), {"accuracy": Accuracy(names), "macro_f1": MacroF1(names)}
    )
    assert 0 <= task.results["val/accuracy"] <= 1
    metric = Accuracy(("a", "b"))
    logits = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]])
    metric.update(type("Output", (), {"logits": logits}), Batch(torch.zeros(1, 3), torch.tensor([[0, 1, -100]])))
    assert float(metric.compute()) == 0.5


def test_next_tokens_need_an_encoder_that_is_causal() -> None:
    for encoder, message in (
        (Ahead(), "encoder 'Ahead' may see: .*Declare causal = True in Ahead"),
        (Honest(), "next token, which the encoder 'Honest' sees"),
        (Liar(), "'Liar' says that it is causal, but its outputs for the first 8 positions"),
    ):
        for data in (TinyTokens(size=4), NextTokens(size=4)):
            with pytest.raises(ConfigError, match=message):
                fit(data, with_encoder(encoder))
        if not isinstance(encoder, Liar):
            with pytest.raises(ConfigError, match=message):
                check_data(with_encoder(encoder), TinyTokens(), "'tiny'", {})
    fit(TinyTokens(size=4), with_encoder(Convolution()))


def test_next_values_must_not_be_seen() -> None:
    """A signal's next values, of which the data set says nothing, by a backbone that reads both ways."""
    for backbone in ("residual", "bidirectional"):
        spec = {
            "d_model": 8,
            "encoder": {"name": "signal", "n_channels": 2},
            "backbone": {"name": backbone, "n_layers": 1},
            "mixer": {"name": "mamba"},
            "head": {"name": "forecast", "n_channels": 2, "horizon": 2},
        }
        if backbone == "residual":
            task = fit(TinySeries(), build_model(spec), {"mae": MAE(), "crps": CRPS()}, val_check_interval=1)
            assert all(0 < task.results[f"val/{name}"] < 2 for name in ("mae", "crps"))
            continue
        with pytest.raises(ConfigError, match=r"asks for the next value, which the backbone 'bidirectional' sees"):
            check_data(build_model(spec), TinySeries(), "'x'", {})
        with pytest.raises(ConfigError, match=r"asks for the next value"):
            fit(TinySeries(), build_model(spec))


def test_other_targets_may_be_seen() -> None:
    """Labels of positions that are not the next token: an encoder that looks ahead is what is wanted."""
    fit(Sets(Batch(IDS, TOKENS)), with_encoder(Honest()))
    fit(Sets(Batch(IDS, LABEL)), SequenceModel(Ahead(), model_of("lm").backbone, ClassificationHead(8, 3)))


def test_a_data_set_that_says_what_it_asks_for_is_believed() -> None:
    data = Sets(Batch(IDS, TOKENS))
    data.task = "next_token"
    with pytest.raises(ConfigError, match="which the encoder 'Honest' sees"):
        check_data(with_encoder(Honest()), data, "'x'", {})


def test_a_first_sequence_without_a_target_tells_nothing() -> None:
    data = TinyTokens(size=4)
    items = [data.train()[index] for index in range(4)]
    items[0].targets = torch.full_like(items[0].targets, -100)
    data.train = lambda: items  # type: ignore[assignment, method-assign]
    with pytest.raises(ConfigError, match="sees"):
        check_data(with_encoder(Honest()), data, "'x'", {})


def test_the_probe_leaves_nothing_behind() -> None:
    model = model_of("lm").train()
    model.backbone.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_kinds(model, Batch(IDS, TOKENS), {})
    for inputs in (IDS, torch.ones_like(IDS)):  # nothing can be changed in a row of one value
        probe_future(model, Batch(inputs, TOKENS))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_what_sees_padding_or_keeps_no_state_is_refused() -> None:
    mask = torch.tensor([[True] * 5 + [False] * 3])
    for encoder in (Ahead(), Honest()):
        with pytest.raises(ConfigError, match=f"The encoder {type(encoder).__name__} .* takes no mask"):
            with_encoder(encoder)(IDS, mask=mask)
        with pytest.raises(ConfigError, match=r"position_wise = True"):
            with_encoder(encoder)(IDS, return_state=True)
        model = with_encoder(encoder)
        with pytest.raises(ConfigError, match=r"position_wise = True"):
            model.step_(IDS[:, 0], model.init_state(1))

    class Both(type(model_of("lm").backbone)):  # type: ignore[misc]
        causal = False

    model = model_of("lm")
    model.backbone.__class__ = Both
    with pytest.raises(ConfigError, match=r"The backbone Both .* takes no mask"):
        model(IDS, mask=mask)


def test_sequences_are_long_enough_for_the_encoder() -> None:
    model = with_encoder(TokenEncoder(8, 7))
    model.encoder.min_length = 9  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"reads 9 inputs at once, but the dataset 'x' gives a sequence of 8"):
        check_data(model, Sets(Batch(IDS, TOKENS)), "'x'", {})


def test_documents_in_a_pack_ask_for_the_next_token_too() -> None:
    """Where one ends, its target is not the input behind it."""
    packed = Batch(IDS, torch.tensor([[1, 4, 6, 5, 2, 6, 5, 0]]), cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    with pytest.raises(ConfigError, match="which the encoder 'Honest' sees"):
        check_data(with_encoder(Honest()), Sets(packed), "'x'", {})


class Smeared(Encoder):
    """Causal, and yet it sees the sequence before it in a pack."""

    causal = True

    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.table, self.honest = nn.Embedding(7, 8), honest

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.table(inputs)
        before = x.roll(1, 1)
        before[:, 0] = 0
        if self.honest and cu_seqlens is not None:
            before[:, cu_seqlens[:-1].long()] = 0
        return x + before


class SeesPadding(Ahead):
    """Takes the mask, and does not look at it."""

    causal, takes_mask = False, True

    def forward(self, inputs: Tensor, condition: Any = None, cu_seqlens: Any = None, mask: Any = None) -> Tensor:
        return super().forward(inputs)


def test_encoders_are_held_to_see_their_own_sequence_alone() -> None:
    packed = Batch(IDS, IDS, cu_seqlens=torch.tensor([0, 0, 3, 8], dtype=torch.int32))
    reversed_pack = Batch(IDS, IDS, cu_seqlens=torch.tensor([0, 5, 8], dtype=torch.int32))
    padded = Batch(IDS.repeat(2, 1), IDS.repeat(2, 1), mask=torch.arange(8) < torch.tensor([[8], [3]]))
    for batch in (packed, reversed_pack, padded):
        probe_neighbours(with_encoder(Smeared(honest=True)), batch)
        probe_neighbours(with_encoder(TokenEncoder(8, 7)), batch)
        model = SequenceModel(KmerEncoder(8, 4, 3), model_of("lm").backbone, ClassificationHead(8, 3))
        probe_neighbours(model, batch)
    with pytest.raises(ConfigError, match=r"'Smeared' .* sees the others of a pack"):
        probe_neighbours(with_encoder(Smeared(honest=False)), packed)
    with pytest.raises(ConfigError, match=r"'SeesPadding' .* sees padding"):
        probe_neighbours(with_encoder(SeesPadding()), padded)


def test_a_condition_needs_a_model_of_conditions() -> None:
    with pytest.raises(ConfigError, match=r"model\.encoder\.n_conditions"):
        fit(Sets(Batch(IDS, TOKENS, condition=torch.tensor([1]))), model_of("lm"))


def test_a_stride_needs_a_head_of_sequences() -> None:
    encoder = TokenEncoder(8, 7)
    encoder.stride = 2
    with pytest.raises(
        ConfigError, match=r"TokenEncoder gives one position for 2 inputs \(stride\), but the head LMHead"
    ):
        SequenceModel(encoder, model_of("lm").backbone, LMHead(8, 7))
