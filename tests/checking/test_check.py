"""`mambaseq check` finds planted faults, says which, and lets what is right alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyTokens
from torch import Tensor, nn

from mambaseq.batch import Batch
from mambaseq.checking import check
from mambaseq.checking.laws import LawBroken, check_optimizer
from mambaseq.checking.training import check_training
from mambaseq.cli.main import main
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.domain import Domain, catalog
from mambaseq.encoders import Encoder
from mambaseq.metrics import Metric
from mambaseq.mixers.mamba import Mamba

HERE = "checking.test_check"


class Near(Encoder):
    """Each position and the one before it, or behind it."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, d_model)

    def moved(self, x: Tensor, cu_seqlens: Tensor | None, turn: int) -> Tensor:
        bounds = torch.tensor([0, x.shape[1]]) if cu_seqlens is None else cu_seqlens.long()
        moved = x.roll(turn, 1).clone()
        ends = bounds[:-1] if turn > 0 else bounds[1:] - 1
        moved[:, ends] = 0
        return moved


class Honest(Near):
    causal = True

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.table(inputs)
        return x + self.moved(x, cu_seqlens, 1)


class Ahead(Near):
    """Says that it is causal, and is not."""

    causal = True

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.table(inputs)
        return x + self.moved(x, cu_seqlens, -1)


class Bleeds(Near):
    """Sees the end of the sequence before it in a pack."""

    causal = True

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.table(inputs)
        return x + self.moved(x, None, 1)


class Silent(Near):
    """Does not say whether it is causal."""

    takes_mask = True

    def forward(self, inputs, condition=None, cu_seqlens=None, mask=None):
        return self.table(inputs)


class Forgets(Mamba):
    """Its chunks begin anew."""

    def forward(self, x, state=None, cu_seqlens=None, return_state=False):
        fresh = None if state is None else self.init_state(len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
        return super().forward(x, fresh, cu_seqlens, return_state)


class Leaks(Mamba):
    """Sees the mean of the whole sequence."""

    def forward(self, x, state=None, cu_seqlens=None, return_state=False):
        return super().forward(x - x.mean(1, keepdim=True), state, cu_seqlens, return_state)


class Plain(TinyTokens):
    pass


class Drifts(TinyTokens):
    """What an item holds depends on how many were read."""

    def train(self):
        return Drifting(super().train())


class Drifting:
    def __init__(self, items) -> None:
        self.items, self.read = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        self.read += 1
        item = self.items[index]
        return Batch(inputs=(item.inputs + self.read) % 7, targets=item.targets)


class Beyond(TinyTokens):
    """Has ids that its vocabulary has not."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 3


class Words(Tokenizer):
    """Its options do not say how many words it knows."""

    def __init__(self, vocab_size: int = 7) -> None:
        self.vocab_size = vocab_size

    @property
    def options(self) -> dict[str, int]:
        return {}

    def encode(self, raw):
        return raw

    def decode(self, ids):
        return ids


class Forgetful(TinyTokens):
    tokenizer, tokenizer_name = Words(9), "faulty/words"


class LastOnly(Metric):
    """The last batch's, whatever came before."""

    def __init__(self, class_names=()) -> None:
        super().__init__(class_names)
        self.add_state("value", torch.tensor(0.0))

    def update(self, output, batch) -> None:
        self.value = output.loss

    def compute(self) -> Tensor:
        return self.value


class Unsaved(Honest):
    """Counts its calls where no checkpoint sees it."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size)
        self.calls = 0

    def forward(self, inputs, condition=None, cu_seqlens=None):
        self.calls += self.training
        return super().forward(inputs, condition, cu_seqlens) * (1 + self.calls)


def read_naively(path: Path, tokenizer: None):
    return [int(word) for word in path.read_text().split()]


CONFIG = """
data: {name: faulty/plain, size: 12}
metrics: [faulty/last]
model:
  d_model: 8
  encoder: {name: faulty/honest}
  backbone: {name: residual, n_layers: 1}
  mixer: {name: mamba, d_state: 4}
checkpoint: {every_n_steps: 2}
trainer: {max_steps: 4, accelerator: cpu}
"""
OPTIONS = ["--loader.batch_size=2", "--trainer.max_steps=4", "--checkpoint.every_n_steps=2"]
Plain.reader = "faulty/digits"


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A domain `faulty` among the others, and without a package of its own."""

    def named(**classes: type) -> dict[str, tuple[str, str]]:
        return {name: (f"{HERE}:{kind.__name__}", "") for name, kind in classes.items()}

    domain = Domain(
        "faulty",
        "faults",
        encoders=named(honest=Honest, ahead=Ahead, bleeds=Bleeds, silent=Silent, unsaved=Unsaved),
        mixers=named(forgets=Forgets, leaks=Leaks) | {"right": ("mambaseq.mixers.mamba:Mamba", "")},
        datasets=named(plain=Plain, drifts=Drifts, beyond=Beyond, forgetful=Forgetful),
        tokenizers=named(words=Words),
        readers={"digits": (f"{HERE}:read_naively", "")},
        metrics=named(last=LastOnly),
    )
    names = catalog()
    monkeypatch.setitem(names.domains, "faulty", (domain, "tests"))
    added = []
    for kind, registry in names.registries.items():
        for name, (target, summary) in getattr(domain, kind).items():
            registry.add(f"faulty/{name}", target, summary, "tests")
            added.append((registry, f"faulty/{name}"))
    yield
    for registry, name in added:
        del registry._entries[name]


def test_planted_faults_are_found_and_nothing_else(faulty: None) -> None:
    found = check("faulty")
    failed = {(one.part, one.law): one.reason for one in found if one.failed}
    sees = "the encoder sees only what it declares"
    ways = "full, in chunks, step by step and packed give the same"
    wanted = {
        ("encoder faulty/ahead", sees): "says that it is causal",
        ("encoder faulty/bleeds", sees): "sees the others of a pack",
        ("encoder faulty/silent", sees): "does not say whether it is causal",
        ("mixer faulty/forgets", ways): "in chunks of",
        ("mixer faulty/leaks", "the future is not seen"): "changes with position 25, which comes after it",
        ("dataset faulty/drifts", "the order depends only on the seed"): "training item",
        ("dataset faulty/beyond", "items are batches of one, as declared"): "vocab_size is 3",
        ("dataset faulty/forgetful", "sources and options are plain and constant"): "another vocab_size",
        ("reader faulty/digits", "files"): "FileNotFoundError",
    }
    for key, reason in wanted.items():
        assert reason in failed[key], (key, failed.get(key))
    parts = {part for part, _ in wanted}
    assert {part for part, _ in failed} == parts
    assert all(len(str(one)) < 1100 for one in found)
    assert any(one.part == "mixer faulty/right" and one.state == "ok" for one in found)


class Momentum(torch.optim.Optimizer):
    """fault: what it does wrong."""

    def __init__(self, params: Any, lr: float, fault: str = "") -> None:
        super().__init__(params, {"lr": lr})
        self.fault, self.mean = fault, torch.zeros(2, 3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.fault != "closure":
            closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            mean = self.mean if self.fault == "state" else state.setdefault("mean", torch.zeros(2, 3))
            if self.fault == "kind":
                state["seen"] = [1]
            mean.add_(parameter.grad)
            parameter.sub_(self.param_groups[0]["lr"] * mean)


@pytest.mark.parametrize(
    ("fault", "told"), [("", ""), ("closure", "closure"), ("state", "neither in its state"), ("kind", "state seen")]
)
def test_faults_of_an_optimizer_are_found(fault: str, told: str) -> None:
    held = pytest.raises(LawBroken, match=told) if fault else contextlib.nullcontext()
    with held:
        check_optimizer(lambda groups: Momentum(groups, lr=0.1, fault=fault))


def test_what_no_checkpoint_holds_is_found(faulty: None, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    with pytest.raises(LawBroken, match="something that it depends on is not in its checkpoint"):
        check_training(str(path), [*OPTIONS, "--model.encoder.name=faulty/unsaved"], tmp_path / "unsaved")


def test_the_exit_code_says_whether_something_fails(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from mambaseq import checking
    from mambaseq.checking import Finding

    for state, code in (("ok", 0), ("not checked", 0), ("fails", 1)):
        one = Finding("encoder x", "law", state, "why")  # type: ignore[arg-type]
        monkeypatch.setattr(checking, "check", lambda name, told, one=one: [told(one) or one])
        assert main(["check", "dna"]) == code
        assert f"{state}: encoder x: law: why" in capsys.readouterr().out


def test_data_that_are_to_be_fetched_are_no_fault_of_a_domain(tmp_path: Path) -> None:
    from mambaseq.checking.domain import _Domain
    from mambaseq.data.cache import locate

    checked = _Domain("dna", tmp_path, None)
    for name, state in (("fetched:hg38/none.fa", "not checked"), ("none.fa", "fails")):
        assert checked.hold("config x", "its data are set up", lambda name=name: locate(name)) is None  # type: ignore[misc]
        assert (checked.findings[-1].state, name in checked.findings[-1].reason) == (state, True)


def test_a_domain_that_is_none_is_named(capsys) -> None:
    assert main(["check", "dnna"]) == 2
    assert "Did you mean 'dna'?" in capsys.readouterr().err


def test_a_metric_of_the_last_batch_is_found(faulty: None) -> None:
    from mambaseq.checking.laws import check_metric
    from mambaseq.checking.samples import sequences
    from mambaseq.metrics.likelihood import BitsPerToken
    from mambaseq.models import causal_lm

    model = causal_lm(6, 8, 1).eval()
    items = sequences(model, signal=False)[:3]
    check_metric(BitsPerToken(), model, items)
    with pytest.raises(LawBroken, match="it depends on the batches"):
        check_metric(LastOnly(), model, items)


def test_a_domain_that_is_not_installed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", "unheard"]) == 2
    assert "package must be installed first: `pip install -e FOLDER`." in capsys.readouterr().err
    assert main(["new", "domain", "unheard"]) == 0
    capsys.readouterr()
    for words in (["check", "unheard"], ["list", "unheard"], ["fit", "--config", "unheard/waves"]):
        assert main(words) == 2
        assert "must be installed first: `pip install -e mambaseq-unheard`." in capsys.readouterr().err
