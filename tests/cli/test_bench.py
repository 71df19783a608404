"""`mambaseq bench` and doctor's speeds, at sizes that take no time, with and without peers."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambaseq.benchmarking import backends, by_length, decode, diagnosis, ops, peers, registered, running, train
from mambaseq.benchmarking.timing import Timing
from mambaseq.checkpoints.upstream import from_upstream
from mambaseq.cli.main import main
from mambaseq.generation import generate
from mambaseq.mixers.mamba import Mamba
from mambaseq.models import causal_lm
from mambaseq.ops import OPS, causal_conv, norm, selective_scan, ssd
from mambaseq.ops import selective_scan as scan_op

BENCHES = {
    "ops": {
        "selective_scan",
        *(timed.name for timed in registered.ALL),
        "causal_conv",
        "add_rms_norm",
        "gated_rms_norm",
        "linear_cross_entropy",
        "scan, attention, convolution",
    },
    "block": {"block"},
    "train": {"train step"},
    "decode": {"generation, tiny"},
}
MEASURED = re.compile(r"_(ms|mib|gib|per_s)$")
pytestmark = pytest.mark.usefixtures("uninterpreted")


def bench(name: str, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = folder / f"{name}.json"
    code = main(["bench", name, "--device", "cpu", "--scale", "tiny", "--repeats", "2", "--json", str(file), *options])
    return code, json.loads(file.read_text())


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_measures_us_and_says_which_peers_are_absent(
    name: str, tmp_path: Path, drawn: None, capsys
) -> None:
    picture = tmp_path / "picture.png"
    code, found = bench(name, tmp_path, "--picture", str(picture))
    assert code == 0
    assert set(found) == {"bench", "scale", "device", "gpu", "torch", "mambaseq", "date", "rows", "ratios"}
    assert (found["bench"], found["scale"], found["device"], found["torch"]) == (name, "tiny", "cpu", torch.__version__)
    assert {row["op"] for row in found["rows"]} == BENCHES[name]
    for row in found["rows"]:
        measured = {key: value for key, value in row.items() if MEASURED.search(key)}
        assert all(size > 0 for size in row["shape"].values())
        if row["contender"] in ("mamba-ssm", "causal-conv1d", "fla"):
            assert (row["status"], bool(row["note"]), measured) == ("absent", True, {})
        else:
            assert row["status"] == "ok"
            assert measured
            assert all(value > 0 for value in measured.values())
    assert {row["op"] for row in found["rows"] if row["contender"] == "mambaseq"} == BENCHES[name]
    assert bool(found["ratios"]) == (name != "block")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    assert "absent" in printed


def off_by_a_hundredth(op: Any, name: str) -> Any:
    """The op with a backend whose first output is 1 % too large."""

    def wrong(backend: Any) -> Any:
        def run(arguments: Any) -> Any:
            y, *rest = backend.run(arguments)
            return 1.01 * y, *rest

        return backend._replace(run=run) if backend.name == name else backend

    return op._replace(backends=tuple(wrong(backend) for backend in op.backends))


def test_what_is_wrong_gets_no_time(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[scan_op.__module__]
    monkeypatch.setattr(module, "OP", off_by_a_hundredth(module.OP, "cpu"))  # type: ignore[attr-defined]
    code, found = bench("ops", tmp_path, "--only", "selective_scan,causal_conv")
    assert code == 1
    rows = [row for row in found["rows"] if row["backend"] == "cpu" and row["op"] == "selective_scan"]
    assert rows
    for row in rows:
        assert row["status"] == "wrong"
        assert row["error"] == pytest.approx(0.01, rel=0.05)
        assert not any(MEASURED.search(key) for key in row)
    assert not [ratio for ratio in found["ratios"] if ratio["op"] == "selective_scan"]
    assert any(row["status"] == "ok" for row in found["rows"] if row["op"] == "causal_conv")
    assert "WRONG: " in capsys.readouterr().out


@pytest.mark.parametrize(("only", "op", "backend"), [("kda", "delta_rule", "torch"), ("lti_scan", "lti_scan", "fft")])
def test_a_registered_backend_that_is_wrong_gets_no_time(
    only: str, op: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPS, op, off_by_a_hundredth(OPS[op], backend))
    code, found = bench("ops", tmp_path, "--only", only)
    assert code == 1
    assert {row["op"] for row in found["rows"]} == {only if only == op else f"{op}, {only}"}
    (row,) = (row for row in found["rows"] if row["backend"] == backend)
    assert (row["status"], row["error"]) == ("wrong", pytest.approx(0.01, rel=0.05))
    assert not any(MEASURED.search(key) for key in row)
    others = [row for row in found["rows"] if row["backend"] not in ("", backend)]
    assert [row["backend"] for row in others] == (["cpu", "torch"] if op == "lti_scan" else [])
    assert all(row["status"] == "ok" for row in others)


@pytest.mark.parametrize(("mixer", "n_layers"), [("gla", 1), ("mamba3", 2)])
def test_steps_of_another_mixer(mixer: str, n_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the layers where an MLP follows the mixer."""
    sizes = train.SIZES["tiny"]
    monkeypatch.setitem(train.SIZES, "tiny", sizes._replace(n_layers=2, shapes=sizes.shapes[:1]))
    code, found = bench("train", tmp_path, "--mixer", mixer)
    assert code == 0
    assert {row["op"] for row in found["rows"]} == {f"train step of {mixer}"}
    status = {row["contender"]: (row["status"], row["note"]) for row in found["rows"]}
    assert status.pop("mamba-ssm") == ("absent", "its models are compared with those of the mixer mamba")
    assert status == {"mambaseq": ("ok", ""), "Transformer": ("ok", "")}
    expected = sum(value.numel() for value in causal_lm(40, 8, n_layers, mixer).parameters())
    assert {row["parameters"] for row in found["rows"] if row["contender"] == "mambaseq"} == {expected}


def test_steps_of_a_mixer_by_its_import_path(tmp_path: Path) -> None:
    path = "mambaseq.mixers.rwkv4:RWKV4"
    code, found = bench("train", tmp_path, "--mixer", path, "--allow-import", "mambaseq")
    assert code == 0
    assert {row["op"] for row in found["rows"]} == {f"train step of {path}"}
    assert {row["status"] for row in found["rows"] if row["contender"] == "mambaseq"} == {"ok"}


def test_a_wrong_gradient_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Any) -> Any:
        y, total = norm.reference.run_add(arguments)
        return y, total.detach() + 0.9 * (total - total.detach())

    op = norm.ADD_OP._replace(backends=(norm.ADD_OP.backends[0]._replace(run=run), *norm.ADD_OP.backends[1:]))
    monkeypatch.setattr(norm, "ADD_OP", op)
    code, found = bench("ops", tmp_path, "--only", "add_rms_norm")
    (row,) = (row for row in found["rows"] if row["op"] == "add_rms_norm" and row["contender"] == "mambaseq")
    assert (code, row["status"]) == (1, "wrong")
    assert row["note"].startswith("dx is off by")


def test_a_loss_that_does_not_fall_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_our_loss", lambda model, inputs, labels: model(inputs, labels).loss * float("nan"))
    code, found = bench("train", tmp_path)
    assert code == 1
    assert all(row["status"] == "wrong" for row in found["rows"] if row["contender"] == "mambaseq")
    assert all(row["status"] == "ok" for row in found["rows"] if row["contender"] == "Transformer")


def test_tokens_from_a_wrong_state_get_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: Any, prompt: Tensor, n: int, **options: Any) -> Tensor:
        out = generate(model, prompt.flip(1), n, **options)
        return torch.cat([prompt, out[:, prompt.shape[1] :]], dim=1)

    monkeypatch.setattr(decode, "generate", other)
    code, found = bench("decode", tmp_path)
    assert code == 1
    statuses = {row["contender"]: row["status"] for row in found["rows"]}
    assert statuses == {"mambaseq": "wrong", "mamba-ssm": "absent", "Transformer": "ok"}


class FakeLanguageModel(nn.Module):
    """As `mamba_ssm.MambaLMHeadModel` is called, around our model."""

    def __init__(self, config: SimpleNamespace, device: torch.device) -> None:
        super().__init__()
        with device:
            self.model = causal_lm(config.vocab_size, config.d_model, config.n_layer)

    def load_state_dict(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(from_upstream(tensors))

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)

    def generate(self, ids: Tensor, max_length: int, cg: bool, top_k: int) -> Tensor:
        assert top_k == 1
        return generate(self.model, ids, max_length - ids.shape[1], temperature=0)


def fake_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor,
              softplus: bool) -> Tensor:  # fmt: skip
    assert u.is_contiguous()
    u, delta, B, C, z = (value.transpose(1, 2) for value in (u, delta, B, C, z))
    return selective_scan(u, delta, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=softplus)[0].transpose(1, 2)


def fake_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    assert activation == "silu"
    return causal_conv(x.transpose(1, 2), weight, bias, activation="silu")[0].transpose(1, 2)


def fake_block(d_model: int, device: torch.device) -> Mamba:
    return Mamba(d_model).to(device)


def fake_dual(*args: Any, **options: Any) -> Tensor:
    *inputs, chunk_size = args
    return ssd(*inputs, chunk_size=chunk_size, **options)[0]


FAKES = {
    "mamba_ssm": SimpleNamespace(Mamba=fake_block, MambaLMHeadModel=FakeLanguageModel),
    "mamba_ssm.models.config_mamba": SimpleNamespace(MambaConfig=SimpleNamespace),
    "mamba_ssm.ops.selective_scan_interface": SimpleNamespace(selective_scan_fn=fake_scan),
    "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=fake_dual),
    "causal_conv1d": SimpleNamespace(causal_conv1d_fn=fake_conv),
}


@pytest.mark.parametrize("name", ["ops", "block", "train", "decode"])
def test_peers_take_part(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find", lambda module, device: (FAKES[module], ""))
    code, found = bench(name, tmp_path, *(("--only", "selective_scan,ssd,causal_conv") if name == "ops" else ()))
    assert code == 0
    theirs = [row for row in found["rows"] if row["contender"] in ("mamba-ssm", "causal-conv1d")]
    assert [row["status"] for row in theirs] == ["ok"] * (4 if name == "ops" else 2)
    assert name == "decode" or all(row["error"] < 1e-4 for row in theirs)
    compared = {ratio["peer"] for ratio in found["ratios"]}
    assert "mamba-ssm" in compared


def test_a_peer_with_another_loss_or_output_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherHead(FakeLanguageModel):
        def forward(self, ids: Tensor) -> Any:
            output = super().forward(ids)
            output.logits = 3 * output.logits + torch.arange(output.logits.shape[-1]) / 10
            return output

    class Twice(Mamba):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    package = SimpleNamespace(Mamba=lambda d_model, device: Twice(d_model), MambaLMHeadModel=OtherHead)
    fakes = FAKES | {"mamba_ssm": package}
    monkeypatch.setattr(peers, "find", lambda module, device: (fakes[module], ""))
    for name in ("block", "train"):
        code, found = bench(name, tmp_path)
        assert code == 1
        statuses = {(row["contender"], row["status"]) for row in found["rows"]}
        assert {("mambaseq", "ok"), ("mamba-ssm", "wrong")} <= statuses


def test_a_peer_that_breaks_does_not_take_the_others_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image\nand more")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    fakes = FAKES | {
        "mamba_ssm.ops.selective_scan_interface": SimpleNamespace(selective_scan_fn=broken),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=broken),
        "causal_conv1d": SimpleNamespace(causal_conv1d_fn=full),
    }
    monkeypatch.setattr(peers, "find", lambda module, device: (fakes[module], ""))
    code, found = bench("ops", tmp_path, "--only", "selective_scan,ssd,causal_conv")
    assert code == 0
    notes = {row["contender"]: (row["status"], row["note"]) for row in found["rows"]}
    assert notes["mamba-ssm"] == ("failed", "RuntimeError: no kernel image")
    assert notes["causal-conv1d"] == ("oom", "out of memory")
    assert notes["mambaseq"] == notes["PyTorch"] == ("ok", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "trian"], "Did you mean 'train'?"),
        (["bnech"], "Did you mean 'bench'?"),
        (["bench", "ops", "--repeats", "0"], "--repeats"),
        (["bench", "ops", "--picture", "a.jpg"], "a.jpg"),
        (["bench", "ops", "--device", "nope"], "'nope' cannot be used"),
        (["bench", "block", "--only", "ssd"], "--only is for ops and decode, not for block"),
        (["bench", "ops", "--device", "cpu", "--only", "wkw"], "Did you mean 'wkv'?"),
        (["bench", "ops", "--only", ","], "--only names nothing"),
        (["bench", "ops", "--mixer", "gla"], "--mixer is for train, not for ops"),
        (["bench", "train", "--device", "cpu", "--mixer", "glaa"], "Did you mean 'gla'?"),
        (["bench", "decode", "--device", "cpu", "--scale", "tiny", "--only", "mambasq"], "Known: tiny, mambaseq"),
        (["bench", "decode", "--device", "cpu", "--scale", "tiny", "--kv-heads", "3"], "2 heads (tiny), not 3"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_the_parser_imports_nothing_heavy() -> None:
    code = "import sys, mambaseq.cli.bench; assert not {'torch', 'matplotlib', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_doctor_times_what_is_right(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = off_by_a_hundredth(OPS["causal_conv"], "cpu")
    monkeypatch.setattr(diagnosis, "OPS", {"causal_conv": wrong, "lti_scan": OPS["lti_scan"]})
    monkeypatch.setitem(backends.SIZES, "cpu", (1, 8, 64))
    assert main(["doctor", "--device", "cpu"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  r")]
    assert len(lines) >= 5
    for line in lines:
        if "WRONG" in line:
            assert line[1] == "cpu"
            assert line[-1] != "ms"
        else:
            assert line[-1] == "ms"
            assert float(line[-2]) > 0
    assert any("WRONG" in line for line in lines)


@pytest.mark.gpu
def test_doctor_holds_kernels_of_half_precision_against_the_reference(
    cuda: torch.device, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They refuse the float32 of the other checks."""
    monkeypatch.setattr(diagnosis, "OPS", {"ssd": OPS["ssd"]})
    assert main(["doctor", "--device", "cuda"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["triton"])
    assert line.split()[:4] == ["half", "triton", "relative", "error"]
    assert "ms  (in bfloat16" in line


def test_after_a_batch_that_does_not_fit_no_larger_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(model: Any, batch: int, *args: Any) -> Any:
        if batch == 1:  # not the check's
            tried.append(batch)
            raise torch.OutOfMemoryError("too much")
        return decode_generation(model, batch, *args)

    decode_generation = decode.CachedGeneration
    monkeypatch.setattr(decode, "CachedGeneration", full)
    code, found = bench("decode", tmp_path)
    assert (code, tried) == (0, [1])
    notes = [(row["status"], row["note"]) for row in found["rows"] if row["contender"] == "Transformer"]
    assert notes == [("oom", "out of memory"), ("oom", "a smaller batch did not fit")]
    assert all(row["status"] == "ok" for row in found["rows"] if row["contender"] == "mambaseq")


def test_a_part_of_the_table_with_its_floors(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(1.0)  # more tokens take longer, whatever else this machine does
    monkeypatch.setattr(decode, "measure", lambda *args, **options: Timing(next(times), 0.0))
    code, found = bench("decode", tmp_path, "--only", "tiny,Transformer", "--kv-heads", "2")
    assert code == 0
    assert {row["contender"] for row in found["rows"]} == {"Transformer"}
    for row in found["rows"]:
        assert "2 of 2 heads" in row["note"]
        share = 100 * row["decode_tokens_per_s"] / row["floor_decode_tokens_per_s"]
        assert row["decode_of_floor_percent"] == pytest.approx(share)
    one, two = (row["floor_decode_tokens_per_s"] for row in found["rows"])
    assert one < two < 2 * one  # weights are read once, keys and values for each
    assert "measured by a copy" in capsys.readouterr().out
    code, found = bench("decode", tmp_path, "--seconds", "0")
    assert {row["status"] for row in found["rows"]} == {"skipped", "absent"}


def test_contenders_are_named_without_their_precision_and_the_slowest_come_last() -> None:
    plan = decode._plan("full", decode.Options(only=["mambaseq", "mamba-ssm", "Transformer"]))
    usual = ["mambaseq", "Transformer", "mamba-ssm"]
    assert [(sizes.name, some) for sizes, some in plan] == [
        ("130M", usual),
        ("1.4B", usual),
        ("Mamba-2 1.3B", ["mambaseq", "mambaseq, bf16 states"]),
    ]
    whole = decode._plan("full", decode.Options(only=["1.4B"]))
    assert [(sizes.name, some) for sizes, some in whole] == [("1.4B", [*usual, "transformers"])]
    (small,) = decode._plan("small", decode.Options(only=["transformers"]))
    assert small[1] == ["transformers", "transformers, bf16"]


@pytest.mark.parametrize("command", ["bench", "doctor"])
def test_the_gpu_that_was_named_is_the_current_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded on the current device's stream: on another GPU's they would time nothing."""
    current: list[torch.device] = []

    class Chosen:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *args: object) -> None:
            current.pop()

    class Seen(Exception):
        pass

    def seen(*args: Any) -> None:
        assert current == [torch.device("cuda:1")]
        raise Seen

    monkeypatch.setattr(torch.cuda, "device", Chosen)
    monkeypatch.setattr(diagnosis, "choose_device", torch.device)
    monkeypatch.setattr(diagnosis, "_diagnose", seen)
    monkeypatch.setitem(running._BENCHES, "block", seen)
    runs: dict[str, Callable[[], int]] = {
        "bench": lambda: running.run("block", torch.device("cuda:1"), "tiny", 2),
        "doctor": lambda: diagnosis.diagnose("cuda:1"),
    }
    with pytest.raises(Seen):
        runs[command]()


@pytest.mark.parametrize("raising", ["check", "time"])
@pytest.mark.parametrize("name", ["cpu", "mamba_ssm"])
def test_doctor_goes_on_after_a_backend_that_raises(
    name: str, raising: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS["causal_conv"]

    def run(arguments: Any) -> Any:
        if raising == "check" or arguments.x.shape[1] > 100:  # only speeds are of such a length
            raise RuntimeError("no image\nand more")
        return op.backends[0].run(arguments)

    broken = op.backends[0]._replace(name=name, run=run)
    monkeypatch.setattr(diagnosis, "OPS", {"causal_conv": op._replace(backends=(broken, op.backends[-1]))})
    assert main(["doctor", "--device", "cpu"]) == (name == "cpu")
    printed = capsys.readouterr().out
    told = "" if raising == "check" else r"relative error \S+ ok +"
    assert re.search(rf"  runs +{name} +{told}RuntimeError: no image$", printed, re.MULTILINE)
    assert re.search("ready  reference .* ms", printed)


def test_inputs_that_do_not_fit_take_no_other_rows_with_them(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(ops, "scan_inputs", full)
    monkeypatch.setattr(by_length, "attention", full)
    code, found = bench("ops", tmp_path, "--only", "selective_scan,ssd,wkv,by_length")
    assert code == 0
    status = {row["op"]: row["status"] for row in found["rows"] if row["contender"] == "mambaseq"}
    assert status.pop("selective_scan") == "oom"
    assert set(status) == {"ssd", "wkv", by_length.OP}
    assert set(status.values()) == {"ok"}
    (first, *_) = (row for row in found["rows"] if row["contender"] == by_length.ATTENTION)
    assert (first["status"], first["note"], first["shape"]["length"]) == ("oom", "out of memory", 16)

    monkeypatch.setattr(decode, "_transformer", full)
    code, found = bench("decode", tmp_path)
    assert code == 0
    statuses = {row["contender"]: row["status"] for row in found["rows"]}
    assert statuses == {"mambaseq": "ok", "mamba-ssm": "absent", "Transformer": "oom"}


@pytest.mark.parametrize("wrong", [False, True])
def test_doctor_tells_of_the_block_as_one(wrong: bool, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "OPS", {})
    assert main(["doctor", "--device", "cpu"]) == 0
    assert re.search(
        "^  no     as one       the kernels run on CUDA, x is on cpu$", capsys.readouterr().out, re.MULTILINE
    )
    # were it so, its ops one by one would be right, and others would not
    monkeypatch.setattr(backends, "why_not_whole", lambda arguments: None)
    if wrong:
        monkeypatch.setattr(
            Mamba, "_A", lambda block: -torch.exp(block.A_log.float()) * (1 + 1e-3 * (block.backend is None))
        )
    assert main(["doctor", "--device", "cpu"]) == wrong
    told = "WRONG" if wrong else r"ok +\S+ ms"
    assert re.search(rf"^  runs   as one       relative error \S+ {told}$", capsys.readouterr().out, re.MULTILINE)
