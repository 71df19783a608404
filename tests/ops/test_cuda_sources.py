"""The CUDA sources compile, on any machine that has NVRTC; what they compute is checked where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import calls_of

from mambaseq.ops.decoding import stretch
from mambaseq.ops.gpu import nvrtc
from mambaseq.ops.lti import discretise
from mambaseq.ops.lti import launches as lti
from mambaseq.ops.selective_scan import cuda, launches, segments
from mambaseq.ops.selective_scan.arguments import ScanArguments

if (reason := nvrtc.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


def macros_of(monkeypatch: pytest.MonkeyPatch, file: str, inputs: launches.Inputs) -> dict[str, int]:
    seen: list[Any] = []
    monkeypatch.setattr(nvrtc, "kernel", lambda files, name, macros, *rest: seen.append(macros))
    launches.compiled.cache_clear()
    name, *own = file.split()
    states = launches.padded(inputs.d_state)
    channels = launches.narrow_channels(states, min(int(own[0]), states // 4)) if own else launches.CHANNELS
    launches.kernel_of(name, inputs, channels=channels)
    launches.compiled.cache_clear()
    return seen[0]


@pytest.mark.parametrize("file", ["forward", "forward_narrow 2", "forward_narrow 4", "backward", "backward_summary"])
@pytest.mark.parametrize(
    ("dtype", "d_state", "channels", "gated"),
    [
        (torch.bfloat16, 16, 128, True),
        (torch.float32, 8, 65, False),
        (torch.float16, 3, 64, True),
        (torch.float32, 16, 64, True),
    ],
)
def test_compile(
    file: str, dtype: torch.dtype, d_state: int, channels: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, B = torch.zeros(1, 8, channels, dtype=dtype), torch.zeros(1, 8, d_state, dtype=dtype)
    vector = torch.zeros(channels) if gated else None
    arguments = ScanArguments(
        x, x, torch.zeros(channels, d_state), B, B, D=vector, z=x if gated else None, dt_bias=vector, dt_softplus=gated
    )
    macros = macros_of(monkeypatch, file, cuda.prepare(arguments))
    source = "".join(path.read_text() for path in launches.FILES[file.split()[0]])
    for architecture in ("80", "90", "100") if dtype == torch.bfloat16 else ("80",):
        assert len(nvrtc.compile_to_cubin(source, macros, architecture)) > 1000


@pytest.mark.parametrize("file", ["forward", "backward", "backward_summary"])
@pytest.mark.parametrize(
    ("wide", "d_state", "constant"),
    [
        (torch.complex64, 16, ""),
        (torch.float32, 8, "BC"),
        (torch.complex64, 3, "B"),
        (torch.complex64, 8, "C"),
    ],
)
def test_complex_and_constant_ones_compile(
    file: str, wide: torch.dtype, d_state: int, constant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(1, 8, 64)
    B, C = (torch.zeros(*((64,) if name in constant else (1, 8)), d_state, dtype=wide) for name in "BC")
    inputs = cuda.prepare(ScanArguments(x, x, torch.zeros(64, d_state, dtype=wide), B, C, z=x))
    macros = macros_of(monkeypatch, file, inputs)
    assert [macros[key] for key in ("COMPLEX", "CONSTANT_B", "CONSTANT_C")] == [
        wide.is_complex,
        "B" in constant,
        "C" in constant,
    ]
    source = "".join(path.read_text() for path in launches.FILES[file.split()[0]])
    assert len(nvrtc.compile_to_cubin(source, macros, "80")) > 1000


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", ["combine", "gather_states", "gather_channels"])
def test_sums_compile(name: str, is_complex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(nvrtc, "kernel", lambda files, name, macros, *rest: seen.append((files, macros)))
    launches.summer.cache_clear()
    launches.summer(name, torch.bfloat16, 16, not is_complex, 0, is_complex)
    launches.summer.cache_clear()
    ((files, macros),) = seen
    source = "".join(path.read_text() for path in files)
    assert name in source
    for architecture in ("80", "90", "100"):
        assert len(nvrtc.compile_to_cubin(source, macros, architecture)) > 1000


def test_the_zero_order_hold_and_stretches_compile() -> None:
    for is_complex in (0, 1):
        assert len(nvrtc.compile_to_cubin(discretise.FILE.read_text(), {"COMPLEX": is_complex}, "80")) > 1000
    every = [stretch.Phase(kind, 0, 8, 8, flags=stretch.GLU | stretch.COMPLEX, pool=kind - 1) for kind in range(7)]
    for phases, batch in ((every, 1), (every[:3], 64)):
        source = "".join(path.read_text() for path in stretch.FILES)
        settings = stretch.macros(phases, 50, stretch.Shares.of(phases, batch, 132, 101_376))
        assert len(nvrtc.compile_to_cubin(source, settings, "80")) > 1000


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path))
    compiled = calls_of(monkeypatch, nvrtc, "compile_to_cubin")
    source, macros = launches.FILES["combine"][0].read_text(), {"LOG_A": 0}
    code = nvrtc._cubin(source, macros, "80")
    assert nvrtc._cubin(source, macros, "80") == code
    assert len(compiled) == 1
    nvrtc._cubin(source, macros, "90")
    nvrtc._cubin(source + "// changed", macros, "80")
    assert len(compiled) == 3
    monkeypatch.setenv("MAMBASEQ_CACHE", "/dev/null/not-a-folder")
    assert nvrtc._cubin(source, macros, "80") == code


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[5], [0, 3, 0, 700, 16, 1, 0], [128, 129, 127], [0]])
def test_packed_segments_cover_each_row_once(lengths: list[int], reverse: bool) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu_seqlens[-1])
    table = segments.of_packed(cu_seqlens, total, 128, reverse)
    assert len(table.row0) == segments.n_segments(len(lengths), total, 128, 128, True)
    go = -1 if reverse else 1
    seen: dict[int, list[int]] = {s: [] for s in range(len(lengths))}
    for row, length, sequence, flags in zip(*(v.tolist() for v in table[:4]), strict=True):
        if not length:
            continue
        rows = seen[sequence]
        assert (flags & 1 == 1) == (not rows)
        rows += [row + go * t for t in range(length)]
        assert (flags & 2 == 2) == (len(rows) == lengths[sequence])
    for s, rows in seen.items():
        expected = list(range(int(cu_seqlens[s]), int(cu_seqlens[s + 1])))
        assert rows == (expected[::-1] if reverse else expected)
    assert int(table.pieces.sum()) == sum(-(-n // 128) for n in lengths)


@pytest.mark.parametrize("lengths", [[5], [0, 3, 0, 700, 16, 1, 0], [128, 129, 127], [15, 17, 31, 33]])
def test_checkpoints_of_packed_sequences_do_not_share_places(lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu_seqlens[-1])
    table = segments.of_packed(cu_seqlens, total, 128, False)
    taken = [
        start + n
        for start, length in zip(table.checkpoint.tolist(), table.length.tolist(), strict=True)
        for n in range(-(-length // segments.EVERY))
    ]
    assert len(set(taken)) == len(taken)
    assert max(taken) < segments.n_checkpoints(len(lengths), total, True)


@pytest.mark.parametrize("channel_blocks", [1, 24, 32])
@pytest.mark.parametrize("length", [1, 100, 8192, 2**20])
@pytest.mark.parametrize("n_sequences", [1, 8, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_steps_of_segments(n_sequences: int, length: int, channel_blocks: int, packed: bool) -> None:
    for leads in (False, True):
        first, steps = segments.steps_of(n_sequences, length, channel_blocks, 132, packed, leads)
        assert first % segments.EVERY == steps % segments.EVERY == 0
        assert first <= steps
        count = segments.n_segments(n_sequences, length, first, steps, packed)
        if not packed and leads and n_sequences * channel_blocks >= 132:
            assert count == n_sequences
        elif (
            not packed and n_sequences * channel_blocks < 132
        ):  # they all run at once, those of the leading ones' pass and those of the others'
            assert (count - n_sequences * (leads and count > n_sequences)) * channel_blocks <= (4 if leads else 2) * 132


def test_uneven_batches_are_cut_backward() -> None:
    """192 blocks leave some multiprocessors with two and others with one; 4 x 192 spread evenly."""
    assert segments.steps_of(8, 2048, 24, 132, False) == (512, 512)
    assert segments.steps_of(8, 2048, 24, 132, False, leads=True) == (2048, 2048)
    for n_sequences, channel_blocks in ((8, 32), (32, 24), (64, 8)):
        assert segments.steps_of(n_sequences, 2048, channel_blocks, 132, False) == (2048, 2048)


def test_few_channels_are_taken_whole() -> None:
    """Where cutting them would cost more than leaving multiprocessors to themselves, of which there are 132 here."""
    narrow = {(1, 2048, 65536), (2, 2048, 8192), (1, 4096, 8192), (1, 2048, 1024), (1, 1536, 256), (4, 1536, 2048)}
    for batch, channels, length in narrow | {(1, 1024, 16384), (1, 1536, 8192), (8, 2048, 2048), (32, 1536, 2048)}:
        blocks = (batch * channels // size for size in (16, 32, 64))
        chosen = segments.narrow_states(*blocks, length, 132)
        assert bool(chosen) == ((batch, channels, length) in narrow), (batch, channels, length)
    assert segments.narrow_states(256, 128, 64, 2048, 132) == 4  # 1 x 4096 x 2048
    assert segments.narrow_states(264, 176, 88, 2048, 132) != 4  # 88 x 48 x 2048: a second time for some
    assert segments.narrow_states(128, 64, 32, 2048, 132) == 2


def test_gradients_in_bf16_fit_into_smaller_gpus() -> None:
    """Compute capability 8.6, 8.9 and 12: 99 KiB a block."""
    assert launches.shared_memory(torch.bfloat16, 16, True) <= 99 * 1024
    assert launches.shared_memory(torch.float32, 16, True) <= 113 * 1024  # two blocks of an H100


@pytest.mark.parametrize("file", ["forward", "summary", "backward", "combine"])
@pytest.mark.parametrize(
    ("dtype", "d_state", "is_complex", "gated"),
    [
        (torch.bfloat16, 16, True, True),
        (torch.float32, 1, False, False),
        (torch.float32, 64, True, True),
        (torch.float16, 33, False, True),
    ],
)
def test_lti_compiles(
    file: str, dtype: torch.dtype, d_state: int, is_complex: bool, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(nvrtc, "kernel", lambda files, name, macros, *rest: seen.append((files, macros)))
    for made in (lti.compiled, lti.combiner):
        made.cache_clear()
    for from_end in (True, False):
        if file == "combine":
            lti.combiner(is_complex, int(from_end))
        else:
            lti.compiled(file, is_complex, d_state, dtype, gated, gated, from_end, 16, True, 0)
    for made in (lti.compiled, lti.combiner):
        made.cache_clear()
    assert len(seen) == 2
    for files, macros in seen:
        source = "".join(path.read_text() for path in files)
        assert len(nvrtc.compile_to_cubin(source, macros, "80")) > 1000


def test_sequences_that_are_cut_and_those_that_are_not() -> None:
    whole = segments.cut(3, 100, 112, 112, None, False)
    assert (whole.is_cut, whole.pieces, whole.total, whole.arguments()) == (
        False,
        1,
        3,
        (*[None] * 5, 100, 112, 112, 1),
    )
    some = segments.cut(2, 100, 16, 48, None, False)
    assert (some.is_cut, some.pieces, some.total) == (True, 3, 6)
    packed = segments.cut(2, 100, 48, 48, torch.tensor([0, 10, 100]), False)
    assert packed.is_cut
    assert packed.table is not None
    assert packed.table.length.tolist() == [10, 48, 42, 0]


def test_states_of_packed_sequences_of_no_length_are_kept() -> None:
    system, state, bounds = torch.ones(3, 2), torch.randn(4, 3, 2), torch.tensor([0, 1, 1, 2, 5])
    assert segments.room_for_states(system, 4, None, state).shape == state.shape
    kept = segments.room_for_states(system, 4, bounds, state)
    assert torch.equal(kept, state)
    assert kept.data_ptr() != state.data_ptr()
    assert not segments.room_for_states(system, 4, bounds, None).any()
