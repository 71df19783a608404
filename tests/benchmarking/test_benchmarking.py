"""What the benchmarks stand on: clocks, comparisons, the Transformer that is compared with, and the checks' reach."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import Tensor

from mambaseq.benchmarking import backends, by_length, ops, registered
from mambaseq.benchmarking.cases import COLUMNS, Case, Contender, channels_first, errors, output_of, reference_results
from mambaseq.benchmarking.decode import CachedGeneration
from mambaseq.benchmarking.long_scan import long_scan
from mambaseq.benchmarking.pictures import draw
from mambaseq.benchmarking.report import OURS, Column, Report, Row
from mambaseq.benchmarking.timing import attempt, measure, peak_bytes
from mambaseq.benchmarking.transformer import Transformer
from mambaseq.ops import OPS, selective_scan

CPU = torch.device("cpu")


def test_a_median_of_calls() -> None:
    calls = []

    def sleep() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.1 if len(calls) == 3 else 0.004)  # one of the counted calls is disturbed

    timing = measure(sleep, CPU, 5, budget_s=10, warm_up_s=0)
    assert len(calls) == 6
    assert 4 <= timing.ms < 40


def test_the_budget_ends_sampling() -> None:
    calls: list[int] = []

    def sleep() -> None:
        calls.append(1)
        time.sleep(0.02)

    measure(sleep, CPU, 100, budget_s=0.05, warm_up_s=None)
    assert 1 <= len(calls) <= 4


@pytest.mark.gpu
def test_the_time_of_the_gpu_alone(cuda: torch.device) -> None:
    x = torch.randn(64, 64, device=cuda)  # microseconds of work

    def slow_to_ask() -> Tensor:
        time.sleep(2e-3)
        return x @ x

    # other processes on this GPU may shorten a sample that begins on an idle GPU, and lengthen one that is held
    assert max(measure(slow_to_ask, cuda, 5).ms for _ in range(5)) >= 2
    held = min((measure(slow_to_ask, cuda, 5, hold=True) for _ in range(5)), key=lambda timing: timing.ms)
    assert held.host_ms >= 2
    assert held.ms < 0.5


@pytest.mark.gpu
def test_the_peak_is_what_a_call_adds(cuda: torch.device) -> None:
    kept = torch.zeros(2**20, device=cuda)
    peak = peak_bytes(lambda: kept + 1, cuda)
    assert peak is not None
    assert 2**22 <= peak < 2**23


def test_what_goes_wrong_is_told() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken() -> None:
        raise ValueError("first line\nsecond line")

    assert attempt(lambda: 7) == ("ok", "", 7)
    assert attempt(full) == ("oom", "out of memory", None)
    assert attempt(broken) == ("failed", "ValueError: first line", None)


def test_ratios_and_their_means() -> None:
    report = Report("ops", CPU, "tiny", (Column("ms", "ms"), Column("rate", "rate", more_is_better=True)))
    for batch, ours, theirs in ((1, 2.0, 4.0), (1, 1.0, 8.0), (4, 3.0, 3.0)):
        shape = {"batch": batch, "length": int(ours)}
        report.add(Row("op", shape, OURS, values={"ms": ours, "rate": 6.0}))
        report.add(Row("op", shape, "peer", values={"ms": theirs, "rate": 3.0}))
    report.add(Row("op", {"batch": 9, "length": 9}, OURS, status="wrong", note="y is off"))
    report.add(Row("op", {"batch": 9, "length": 9}, "peer", values={"ms": 1.0}))
    found = {(r.value, r.over or r.shape["length"] if r.shape else r.over): r.ratio for r in report.ratios()}
    assert {key: value for key, value in found.items() if key[0] == "ms"} == pytest.approx(
        {
            ("ms", 2): 2.0,
            ("ms", 1): 8.0,
            ("ms", 3): 1.0,
            ("ms", "all"): 16 ** (1 / 3),
            ("ms", "batch 1"): 4.0,
        }
    )
    assert found["rate", "all"] == pytest.approx(2.0)
    assert report.failed


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_transformer_steps_as_it_reads(kv_heads: int) -> None:
    torch.manual_seed(0)
    model = Transformer(31, d_model=16, n_layers=3, n_heads=4, d_hidden=24, max_length=20, n_kv_heads=kv_heads).double()
    ids = torch.randint(31, (2, 20))
    whole = model(ids)
    cache = model.init_cache(2, 20)
    assert cache[0].shape[3] == kv_heads
    torch.testing.assert_close(model.extend_(ids[:, :7], cache, 0), whole[:, 6])
    for position in range(7, 20):
        torch.testing.assert_close(model.extend_(ids[:, position : position + 1], cache, position), whole[:, position])
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 31
    torch.testing.assert_close(model(changed)[:, :12], whole[:, :12])
    assert not torch.allclose(model(changed)[:, 12:], whole[:, 12:])
    loss = torch.nn.functional.cross_entropy(whole.flatten(0, 1), ids.flatten())
    assert model(ids, ids).item() == pytest.approx(loss.item())


def test_the_transformers_steps_by_kernels_are_its_steps() -> None:
    """A layer at a position that is not the first; without a GPU under Triton's interpreter."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Transformer(31, d_model=12, n_layers=1, n_heads=2, d_hidden=8, max_length=20, n_kv_heads=1).to(device)
    ids = torch.randint(31, (1, 6)).to(device)
    caches = [model.init_cache(1, 8) for _ in range(2)]
    for cache in caches:
        model.extend_(ids[:, :5], cache, 0)
    with torch.no_grad():
        expected = model._hidden(ids[:, 5:], caches[0], 5)[:, 0]
        torch.testing.assert_close(model.step(ids[:, 5], caches[1], 5), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[1], caches[0])


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generation_with_a_cache_is_greedy(place: str, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("cuda") if place == "cuda" else CPU
    torch.manual_seed(0)
    model = Transformer(vocab_size=31, d_model=16, n_layers=2, n_heads=2, d_hidden=24, max_length=20).to(device)
    prompt = torch.randint(31, (2, 9), device=device)
    generate = CachedGeneration(model, 2, 9, 8, device)
    out = generate(prompt, 8)
    assert torch.equal(out[:, :9], prompt)
    assert torch.equal(out[:, 9:], model(out[:, :-1])[:, 8:].argmax(-1))
    assert torch.equal(generate(prompt, 8), out)  # nothing of the first call is left in the cache
    assert len(generate.graphs) == (7 if place == "cuda" else 0)


def some_of_it(tensor: Tensor) -> Tensor:
    """Nine steps of four channels; B and C have no channels."""
    if tensor.ndim == 3:
        return tensor[:1, :9] if tensor.shape[-1] == ops.D_STATE else tensor[:1, :9, :4]
    return tensor[:4]


@pytest.mark.parametrize("make", [ops.scans, ops.convs])
def test_a_part_is_checked_as_the_whole_would_be(make) -> None:  # type: ignore[no-untyped-def]
    case = next(iter(make(CPU, "tiny"))).make()
    mine = case.contenders[0]
    part = dataclasses.replace(case, part=some_of_it)
    for some in (case, part):
        found = errors(some, mine, reference_results(some))
        assert set(found) == {"y", *(f"d{name}" for name in case.inputs)}
        assert 0 < max(found.values()) < 1e-5

    # a contender in a layout of its own gets its inputs in it, and its results are taken back
    def swapped(**inputs: Tensor) -> Tensor:
        assert inputs["x"].shape[1] == case.shape["channels"]
        return channels_first(mine.run(**{name: channels_first(value) for name, value in inputs.items()}))

    found = errors(part, Contender("peer", swapped, layout=channels_first), reference_results(part))
    assert max(found.values()) < 1e-5


def test_a_leak_into_the_checked_part_is_seen() -> None:
    case = next(iter(ops.scans(CPU, "tiny"))).make()
    part = dataclasses.replace(case, part=some_of_it)
    mine = case.contenders[0]

    def leaking(**inputs: Tensor) -> Tensor:
        return mine.run(**inputs) + 0.01 * inputs["x"].roll(-20, dims=1)

    found = errors(part, Contender("leaking", leaking), reference_results(part))
    assert found["y"] > 1e-3


def test_of_gradients_that_are_a_number_a_head_all_heads_are_checked() -> None:
    """Of two, rounding may be any share of sums in which terms cancel."""
    case = registered_case("ssd", "tiny")
    assert reference_results(case).values["dA"].shape == case.inputs["A"].shape == (3,)


@pytest.mark.parametrize("gated", [True, False])
def test_a_long_scan_is_checked_whole(gated: bool) -> None:
    """In segments side by side, as by a loop over time."""
    inputs = {name: value.double() for name, value in ops.scan_inputs(1, 6, 24 * 5, CPU).items()}
    if not gated:
        del inputs["z"]
    results = []
    for run in (long_scan, output_of(selective_scan, dt_softplus=True, backend="reference")):
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        y = run(**leaves)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, list(leaves.values()), noise)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("late", ["y", "dB"])
def test_what_goes_wrong_late_in_a_long_scan_is_seen(late: str) -> None:
    *_, plan = ops.scans(CPU, "small")
    case = plan.make()
    assert case.shape["batch"] == 1
    mine = case.contenders[0]

    def wrong(**inputs: Tensor) -> Tensor:
        if late == "dB":  # its last tenth
            B, cut = inputs["B"], 9 * inputs["B"].shape[1] // 10
            return mine.run(**(inputs | {"B": torch.cat([B[:, :cut], B[:, cut:].detach()], dim=1)}))
        y = mine.run(**inputs)
        return torch.cat([y[:, :-100], 1.01 * y[:, -100:]], dim=1)

    expected = reference_results(case)
    assert expected.values["dx"].shape == (1, case.shape["length"], 64)
    assert max(errors(case, mine, expected).values()) < 1e-5
    assert errors(case, Contender("late", wrong), expected)[late] > 1e-3


def test_every_registered_op_is_timed() -> None:
    """A new one needs a row of `registered.ALL`."""
    made = (make(CPU, "tiny") for make in (ops.scans, ops.convs, ops.norms, ops.losses))
    assert {plan.op for plans in made for plan in plans} | {timed.op for timed in registered.ALL} == set(OPS)


def registered_case(name: str, scale: str) -> Case:
    (timed,) = (timed for timed in registered.ALL if name in (timed.op, timed.variant))
    *_, plan = timed.plans(CPU, scale)
    return plan.make()


@pytest.mark.parametrize("name", [timed.variant or timed.op for timed in registered.ALL])
def test_a_part_of_a_registered_op_is_checked_as_the_whole_would_be(name: str) -> None:
    case = registered_case(name, "tiny")
    whole = dataclasses.replace(case, part=lambda tensor: tensor)
    x = next(iter(case.inputs.values()))
    assert (case.part(x).shape == x.shape) == (name in ("ssd", "unit_norm", "log_decays"))
    for some in (case, whole):
        found = errors(some, case.contenders[0], reference_results(some))
        assert set(found) == {"y", *(f"d{key}" for key in case.inputs)}
        assert 0 < max(found.values()) < 1e-5


def test_what_goes_wrong_late_in_a_registered_op_is_seen() -> None:
    case = registered_case("wkv", "small")
    assert case.shape["batch"] == 1
    mine = case.contenders[0]

    def late(**inputs: Tensor) -> Tensor:
        y = mine.run(**inputs)
        return torch.cat([y[:, :-100], 1.01 * y[:, -100:]], dim=1)

    expected = reference_results(case)
    assert max(errors(case, mine, expected).values()) < 1e-5
    assert errors(case, Contender("late", late), expected)["y"] > 1e-3


def test_gradients_of_complex_inputs_are_checked() -> None:
    case = registered_case("lti_scan", "tiny")
    assert case.inputs["C"].is_complex()
    mine = case.contenders[0]

    def half(**inputs: Tensor) -> Tensor:
        C = inputs["C"]
        return mine.run(**inputs | {"C": torch.complex(C.real, C.imag.detach())})

    found = errors(case, Contender("half", half), reference_results(case))
    assert found["dC"] > 0.1
    assert found["y"] < 1e-5


@pytest.mark.parametrize("make", [by_length.scan, by_length.attention, by_length.convolution])
def test_what_the_scan_is_compared_with_is_right(make) -> None:  # type: ignore[no-untyped-def]
    case: Case = make(80, "tiny", CPU)
    assert case.passes == by_length.PASSES
    found = errors(case, case.contenders[0], reference_results(case))
    assert max(found.values()) < 1e-5


def test_doctor_has_a_moderate_sample_of_every_op() -> None:
    for op in OPS.values():
        what, arguments = backends.moderate(op, CPU)
        assert what == "1 x 128 x 128"
        assert any(backend.why_not(arguments) is None for backend in op.backends)
    unknown = OPS["causal_conv"]._replace(name="another")
    assert backends.moderate(unknown, CPU)[0] == "x, weight"


@pytest.mark.parametrize("peer", [True, False])
def test_a_picture_of_ops_has_ratios_or_else_our_times(peer: bool, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("ops", CPU, "tiny", COLUMNS)
    report.add(Row("kda", {"batch": 2, "length": 9}, "mambaseq", values={"forward_ms": 2.0, "both_ms": 4.0}))
    if peer:
        report.add(Row("kda", {"batch": 2, "length": 9}, "PyTorch", values={"forward_ms": 6.0, "both_ms": 4.0}))
    (axes,) = draw(report).axes
    assert axes.get_xlabel() == ("times as fast" if peer else "ms")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["kda, 2 × 9" + "\nover PyTorch" * peer]
    assert [text.get_text() for text in axes.texts] == (["3", "1"] if peer else ["2", "4"])
