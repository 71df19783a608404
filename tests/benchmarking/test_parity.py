"""What holds our mixers against their makers' code: right, wrong and not installed are told apart."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# of the shape of flash-linear-attention's naive reference
LOOP = """
import torch

def naive_recurrent_kda(q, k, v, g, beta, initial_state, output_final_state):
    ys = []
    S = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
    for t in range(q.shape[1]):
        S = S * g[:, t, :, :, None].exp(){forgotten}
        wrong = v[:, t] - (S * k[:, t, :, :, None]).sum(-2)
        S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * wrong[:, :, None]
        ys.append((S * q[:, t, :, :, None]).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(ys, 1), S
"""


@pytest.mark.parametrize(("forgotten", "code"), [("", 0), (" * 0.999", 1), (None, 0)])
def test_what_is_beside_is_told(
    forgotten: str | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "fla" / "ops" / "kda"
    folder.mkdir(parents=True)
    # which must not be imported, as it needs a GPU
    (tmp_path / "fla" / "__init__.py").write_text("raise RuntimeError")
    if forgotten is not None:
        (folder / "naive.py").write_text(LOOP.format(forgotten=forgotten))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    parity = importlib.import_module("parity")
    monkeypatch.setattr(parity, "LENGTH", 9)
    monkeypatch.setattr(parity, "NAIVE", {"kda": parity.NAIVE["kda"]._replace(functions=("naive_recurrent_kda",))})
    kept = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["parity.py", "--device", "cpu", "--json", str(kept)])
    assert parity.main() == code
    rows = {row["part"]: row for row in json.loads(kept.read_text())["rows"]}
    assert rows["mamba3"]["note"] == "not run: its kernels need a GPU"
    said = capsys.readouterr().out
    if forgotten is None:
        assert "fla is not installed, or has no ops/kda/naive.py" in rows["rules"]["note"]
    else:
        assert rows["mixers"]["over"] == rows["rules"]["over"] == bool(code)
        assert ("OVER: " in said) == bool(code)
