"""The CUDA sources compile, on any machine that has NVRTC; what they compute is checked where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import calls_of

from mambaseq.ops import nvrtc
from mambaseq.ops.selective_scan import cuda, segments
from mambaseq.ops.selective_scan.arguments import ScanArguments

if (reason := nvrtc.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


def macros_of(monkeypatch: pytest.MonkeyPatch, file: str, *arguments: Any) -> dict[str, int]:
    seen: list[Any] = []
    monkeypatch.setattr(nvrtc, "kernel", lambda files, name, macros, *rest: seen.append(macros))
    cuda._compiled.cache_clear()
    cuda._kernel(file, file, *arguments)
    cuda._compiled.cache_clear()
    return seen[0]


@pytest.mark.parametrize("file", ["forward", "backward"])
@pytest.mark.parametrize(
    ("dtype", "d_state", "channels", "gated"),
    [
        (torch.bfloat16, 16, 128, True),
        (torch.float32, 8, 65, False),
        pytest.param(torch.float16, 3, 64, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, 16, 64, True, marks=pytest.mark.slow),
    ],
)
def test_compile(
    file: str, dtype: torch.dtype, d_state: int, channels: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, B = torch.zeros(1, 8, channels, dtype=dtype), torch.zeros(1, 8, d_state, dtype=dtype)
    vector = torch.zeros(channels) if gated else None
    arguments = ScanArguments(
        x, x, torch.zeros(channels, d_state), B, B, D=vector, z=x if gated else None, dt_bias=vector
    )
    macros = macros_of(monkeypatch, file, cuda._prepare(arguments), gated)
    source = "".join(path.read_text() for path in cuda._FILES[file])
    assert len(nvrtc.compile_to_cubin(source, macros, "80")) > 1000


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path))
    compiled = calls_of(monkeypatch, nvrtc, "compile_to_cubin")
    source = cuda._FILES["combine"][0].read_text()
    code = nvrtc._cubin(source, {}, "80")
    assert nvrtc._cubin(source, {}, "80") == code
    assert len(compiled) == 1
    nvrtc._cubin(source, {}, "90")
    nvrtc._cubin(source + "// changed", {}, "80")
    assert len(compiled) == 3
    monkeypatch.setenv("MAMBASEQ_CACHE", "/dev/null/not-a-folder")
    assert nvrtc._cubin(source, {}, "80") == code


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[5], [0, 3, 0, 700, 16, 1, 0], [128, 129, 127], [0]])
def test_packed_segments_cover_each_row_once(lengths: list[int], reverse: bool) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu_seqlens[-1])
    table = segments.of_packed(cu_seqlens, total, 128, reverse)
    assert len(table.row0) == segments.n_segments(len(lengths), total, 128, True)
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


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_of_a_batch_are_those_of_equal_packed_sequences(reverse: bool) -> None:
    batch = segments.of_batch(3, 300, 128, reverse, torch.device("cpu"))
    packed = segments.of_packed(torch.tensor([0, 300, 600, 900]), 900, 128, reverse)
    for a, b in zip(batch[:5], packed[:5], strict=True):
        assert torch.equal(a, b[: len(a)])
    assert torch.equal(batch.begin, packed.begin)
    assert torch.equal(batch.pieces, packed.pieces)


@pytest.mark.parametrize("channel_blocks", [1, 24, 32])
@pytest.mark.parametrize("length", [1, 100, 8192, 2**20])
@pytest.mark.parametrize("n_sequences", [1, 8, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_steps_of_segments(n_sequences: int, length: int, channel_blocks: int, packed: bool) -> None:
    steps = segments.steps_of(n_sequences, length, channel_blocks, 132, packed)
    assert steps % segments.EVERY == 0
    count = segments.n_segments(n_sequences, length, steps, packed)
    # what is kept for the backward pass does not grow beyond what the rows themselves need
    rows = length if packed else n_sequences * length
    assert count * steps <= 4 * rows + 3 * 128 * n_sequences
    if not packed and n_sequences * channel_blocks >= 2 * 132:
        assert count == n_sequences
