"""The mixers of today beside their makers' code, on random weights: outputs, and gradients of inputs and all weights.

`python benchmarks/parity.py [--device cpu] [--only PART ...] [--seconds 40] [--json FILE]`. Parts:

    rules    the delta rule and gated linear attention, from a state and to one, beside flash-linear-attention's naive
             references (PyTorch; of its package these files alone are loaded, which need einops): ours in chunks in
             float32 on a CPU, by our kernels in bfloat16 on a GPU, and by steps.
    mixers   whole mixers with our rule, and with theirs in its place: gradients of all weights.
    turning  B and C of Mamba-3 as they turn, of one input a head and of four, beside mamba-ssm's reference in PyTorch.
    mamba3   mamba-ssm's `Mamba3`, its weights by our reader of its checkpoints, under bfloat16 autocast; four inputs a
             head where its kernels for them are installed (TileLang). Both beside ours in float64. Needs a GPU.

A contender that is not installed is told, not failed. Errors are relative RMS; where one is over its tolerance, the
exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import inspect
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.atomic import json_text
from mambaseq.checkpoints import load_upstream
from mambaseq.mixers import delta, gla
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.gated_delta import GatedDelta
from mambaseq.mixers.gla import GLA
from mambaseq.mixers.kda import KDA
from mambaseq.ops import OPS
from mambaseq.ops.delta_rule import DeltaArguments, delta_rule_update_
from mambaseq.ops.dispatch import Backend, outputs_and_gradients, relative_rms_error
from mambaseq.ops.trapezoid.angles import turns
from mambaseq.ops.trapezoid.turning import TurnArguments, turned

BATCH, LENGTH, HEADS, D_KEY, D_VALUE = 2, 256, 3, 32, 48
D_MODEL, D_STATE, HEAD_DIM = 256, 128, 64  # of Mamba-3
# in float32, by kernels whose products are of TF32 thrice, and where products are of bfloat16
EXACT, BY_KERNELS, ROUNDED = 1e-5, 5e-5, 2e-2
# bfloat16 too, but of sums over all positions in which terms cancel, and their rounding does not
SUMMED, OF_SUMS = 8e-2, ("dt_bias", "A_log", "B_bias", "C_bias", "D", "B_norm.weight", "C_norm.weight")
RULES = {backend.name: backend for backend in OPS["delta_rule"].backends}


class Row(NamedTuple):
    """What is held against what; the largest error of an output and of a gradient, each with its name; a note."""

    part: str
    name: str
    beside: str
    output: tuple[float, str] | None = None
    gradient: tuple[float, str] | None = None
    tolerance: float | None = None
    note: str = ""
    over: bool = False


def compared(row: Row, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, outputs: int) -> Row:
    """The first so many are outputs, the others gradients."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    errors = [(relative_rms_error(found[name].cpu(), value.cpu()), name) for name, value in expected.items()]

    def over(error: float, name: str) -> bool:
        allowed = SUMMED if tolerance == ROUNDED and name.endswith(OF_SUMS) else tolerance
        return not error <= allowed  # which numbers that are none are not, either

    wrong = [f"{name} {error:.1e}" for error, name in errors if over(error, name)]
    halves = (max(part, default=None) for part in (errors[:outputs], errors[outputs:]))
    return row._replace(
        **dict(zip(("output", "gradient"), halves, strict=True)),
        tolerance=tolerance,
        over=bool(wrong),
        note="; ".join(filter(None, [row.note, f"OVER: {', '.join(wrong)}" if wrong else ""])),
    )


def in_float32(device: str) -> float:
    return EXACT if device == "cpu" else BY_KERNELS


def file_of(package: str, path: str) -> ModuleType:
    """One file of an installed package, which is not imported itself.

    Raises ModuleNotFoundError: it is not installed, or what the file imports is not.
    """
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found else []:
        if (file := Path(folder) / path).exists():
            spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ModuleNotFoundError(f"{package} is not installed, or has no {path}")


class Rule(NamedTuple):
    """A rule of flash-linear-attention: the folder of its references, those that there are, and our mixer."""

    folder: str
    functions: tuple[str, ...]
    mixer: Callable[[int], Mixer]
    corrects: bool = True
    by_channel: bool = True


NAIVE = {
    "gated_delta": Rule(
        "gated_delta_rule",
        ("naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"),
        functools.partial(GatedDelta, n_value_heads=4, n_heads=2, negative_eigenvalues=True),
        by_channel=False,
    ),
    "kda": Rule("kda", ("naive_recurrent_kda", "naive_chunk_kda"), functools.partial(KDA, n_heads=2, n_value_heads=4)),
    "gla": Rule("gla", ("naive_recurrent_gla",), GLA, corrects=False),
}


def theirs(function: Callable[..., Any], arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """A naive reference as a backend of `delta_rule`. Its states have d_key first, its queries are scaled by it."""
    q, k, v, g, beta, state, *_ = arguments
    assert g is not None
    q, k = (value.repeat_interleave(v.shape[2] // value.shape[2], dim=2) for value in (q, k))
    given = {"q": q * q.shape[-1] ** 0.5, "k": k, "v": v, "gk" if beta is None else "g": g}
    begun = None if state is None else state.mT
    y, last = function(
        **given, **({} if beta is None else {"beta": beta}), initial_state=begun, output_final_state=True
    )
    return y.to(v.dtype), last.mT


def inputs(rule: Rule, device: str) -> DeltaArguments:
    """Rates up to 2, as they are with negative eigenvalues."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    one = (BATCH, LENGTH, HEADS)
    q, k = (F.normalize(normal(*one, D_KEY), dim=-1) for _ in range(2))
    g = F.logsigmoid(normal(*one, *((D_KEY,) if rule.by_channel else ())) + 2)
    beta = 2 * normal(*one).sigmoid() if rule.corrects else None
    made = DeltaArguments(
        q * D_KEY**-0.5, k, normal(*one, D_VALUE), g, beta, 0.1 * normal(BATCH, HEADS, D_VALUE, D_KEY)
    )
    half = OPS["delta_rule"].half
    return made if device == "cpu" or half is None else half(made)


def stepped(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """The same by steps."""
    q, k, v, g, beta, state, *_ = arguments
    assert state is not None
    kept = state.clone()
    ys = []
    for t in range(v.shape[1]):
        now = [None if value is None else value[:, t] for value in (g, beta)]
        ys.append(delta_rule_update_(kept, q[:, t], k[:, t], v[:, t], *now))
    return torch.stack(ys, 1), kept


def rules(device: str) -> Iterator[Callable[[], Row]]:
    for name, rule in NAIVE.items():
        for function in rule.functions:
            yield functools.partial(_rule, name, rule, function, device)


def _rule(name: str, rule: Rule, function: str, device: str) -> Row:
    ours = "triton" if device == "cuda" else "torch"
    row = Row("rules", name, function)
    naive = getattr(file_of("fla", f"ops/{rule.folder}/naive.py"), function)
    arguments = inputs(rule, device)
    by_them = Backend("theirs", functools.partial(theirs, naive), RULES["reference"].why_not)
    names = ["y", "state", "q", "k", "v", "g", *(["beta"] if rule.corrects else []), "initial state"]
    found, expected = (
        dict(zip(names, outputs_and_gradients(backend, arguments), strict=True)) for backend in (RULES[ours], by_them)
    )
    with torch.no_grad():
        pairs = zip(("y", "state"), stepped(arguments), strict=True)
        steps = max(relative_rms_error(value, expected[which]) for which, value in pairs)
    row = row._replace(note=f"by our {ours} backend; by steps {steps:.1e}")
    tolerance = EXACT if device == "cpu" else ROUNDED
    row = compared(row, found, expected, tolerance, outputs=2)
    return row if steps <= tolerance else row._replace(over=True, note=f"{row.note}; OVER: steps")


def mixers(device: str) -> Iterator[Callable[[], Row]]:
    for name, rule in NAIVE.items():
        yield functools.partial(_mixer, name, rule, device)


def _mixer(name: str, rule: Rule, device: str) -> Row:
    naive = getattr(file_of("fla", f"ops/{rule.folder}/naive.py"), rule.functions[0])

    def in_its_place(*sequences: Tensor, return_final_state: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
        return theirs(naive, DeltaArguments(*sequences))

    torch.manual_seed(0)
    mixer = scattered(rule.mixer(64)).to(device)
    x = torch.randn(BATCH, LENGTH, 64, device=device)
    found = with_gradients(mixer, x)
    with mock.patch.object(gla if name == "gla" else delta, "delta_rule", in_its_place):
        expected = with_gradients(mixer, x)
    return compared(Row("mixers", name, rule.functions[0]), found, expected, in_float32(device), outputs=1)


def scattered(module: nn.Module) -> Any:
    """With random weights in place of those that begin as constants."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def with_gradients(module: nn.Module, x: Tensor, like: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """like: what cotangents are rounded to, of outputs that are compared in it."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.device, like)
    of = {"x": leaf, **dict(module.named_parameters())}
    gradients = torch.autograd.grad((y * weight.to(x.dtype)).sum(), list(of.values()))
    return {"y": y.detach(), **dict(zip(of, gradients, strict=True))}


def turning(device: str) -> Iterator[Callable[[], Row]]:
    for rank, share in ((1, 1), (1, 2), (4, 1), (4, 2)):
        yield functools.partial(_turning, rank, D_STATE // 2 // share, device)


def _turning(rank: int, n_angles: int, device: str) -> Row:
    reference = file_of("mamba_ssm", "ops/triton/mamba3/mamba3_mimo_rotary_step.py").apply_rotary_qk_inference_reference
    torch.manual_seed(0)
    # sequences, heads, rank, states; angles from a state and to one
    B, C = (torch.randn(5, rank, HEADS, D_STATE).to(device).requires_grad_() for _ in range(2))
    biases = [torch.randn(HEADS, rank, D_STATE).to(device).requires_grad_() for _ in range(2)]
    before, angles = (torch.randn(5, HEADS, n_angles).to(device).requires_grad_() for _ in range(2))
    dt = torch.rand(5, HEADS).to(device).requires_grad_()
    given = {"B": B, "C": C, "B_bias": biases[0], "C_bias": biases[1], "angle": before, "angles": angles, "dt": dt}

    def ours() -> list[Tensor]:
        angle = before + turns(angles, dt)
        return [*turned(TurnArguments(B, C, *biases, angle, halves=rank > 1)), angle]

    def published() -> list[Tensor]:
        by_rank = [bias.transpose(0, 1) for bias in biases]
        q, k, angle = reference(
            C, B, before, angles, dt, bias_q=by_rank[1], bias_k=by_rank[0], rotate_pairwise=rank == 1
        )
        return [k.transpose(1, 2), q.transpose(1, 2), angle]

    found, expected = (
        dict(
            zip(
                ["turned B", "turned C", "new angle", *given],
                [*outputs, *torch.autograd.grad([y.double().square().sum() + y.double().sin().sum() for y in outputs],
                                                list(given.values()))],
                strict=True,
            )
        )
        for outputs in (ours(), published())
    )  # fmt: skip
    row = Row("turning", f"rank {rank}, {n_angles} of {D_STATE // 2} pairs", "apply_rotary_qk_inference_reference")
    return compared(row, found, expected, in_float32(device), outputs=3)


def mamba3(device: str) -> Iterator[Callable[[], Row]]:
    for rank in (None, 4):
        yield functools.partial(_mamba3, rank, device)


def _mamba3(rank: int | None, device: str) -> Row:
    row = Row("mamba3", "one input a head" if rank is None else f"rank {rank}", "mamba_ssm.modules.mamba3.Mamba3")
    if device != "cuda":
        return row._replace(note="not run: its kernels need a GPU")
    module = importlib.import_module("mamba_ssm.modules.mamba3")
    if rank is not None and module.mamba3_mimo_combined is None:
        return row._replace(note="not run: its kernels need TileLang")
    if rank is None:
        few_configurations()
    torch.manual_seed(0)
    sizes = {"d_state": D_STATE, "headdim": HEAD_DIM}
    several = {} if rank is None else {"is_mimo": True, "mimo_rank": rank, "chunk_size": 64 // rank}
    peer = scattered(module.Mamba3(D_MODEL, **sizes, **several, layer_idx=0, device=device))
    # its release 2.3.2 has another rate of decay than what came later
    rate = {"softplus_rate": True} if "softplus(dd_A" in inspect.getsource(module.Mamba3) else {}
    ours = read(peer, {**sizes, **several, **rate})
    exact = copy.deepcopy(ours).double()
    x = torch.randn(BATCH, 2 * LENGTH, D_MODEL, device=device)
    with torch.autocast(device, torch.bfloat16):
        by_them, by_us = (with_gradients(one, x, torch.bfloat16) for one in (peer, ours))
    expected = with_gradients(exact, x.double(), torch.bfloat16)
    mine = compared(row, by_us, expected, ROUNDED, outputs=1)
    assert mine.output is not None
    assert mine.gradient is not None
    said = "ours output {:.1e} ({}), gradient {:.1e} ({})".format(*mine.output, *mine.gradient)
    row = row._replace(note=f"both against ours in float64; {said}{'; ' if mine.note else ''}{mine.note}")
    told = compared(row, by_them, expected, ROUNDED, outputs=1)
    return told._replace(over=told.over or mine.over)


def few_configurations() -> None:
    """Of its kernels, which would otherwise each try up to 81."""
    for name in ("angle_dt", "mamba3_siso_fwd", "mamba3_siso_bwd"):
        for tuner in vars(importlib.import_module(f"mamba_ssm.ops.triton.mamba3.{name}")).values():
            if hasattr(tuner, "configs"):
                pieces = dict.fromkeys(tuner.configs[0].kwargs, 64)  # lengths of pieces of time
                tuner.configs = [type(tuner.configs[0])(pieces, num_warps=4, num_stages=1)]


def read(peer: nn.Module, ssm: dict[str, Any]) -> Mixer:
    """Ours of the weights of one layer, as a checkpoint of a language model has them."""
    weights = {f"backbone.layers.0.mixer.{name}": value.cpu() for name, value in peer.state_dict().items()}
    ones = dict.fromkeys(("backbone.norm_f.weight", "backbone.layers.0.norm.weight"), torch.ones(D_MODEL))
    embedding = torch.zeros(8, D_MODEL)
    weights |= {**ones, "backbone.embedding.weight": embedding, "lm_head.weight": embedding}
    config = {"d_model": D_MODEL, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"layer": "Mamba3", **ssm}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json_text(config))
        torch.save(weights, Path(folder) / "pytorch_model.bin")
        mixer = load_upstream(folder).backbone.mixers()[0]
    return mixer.to(next(peer.parameters()).device)


def told(row: Row) -> str:
    errors = " ".join(
        f"{'-':<26}" if error is None else f"{f'{error[0]:.1e} ({error[1]})':<26}"
        for error in (row.output, row.gradient)
    )
    allowed = "-" if row.tolerance is None else f"{row.tolerance:.0e}"
    return f"{row.part:<8} {row.name:<24} {row.beside:<36} {errors} {allowed:<6} {row.note}"


PARTS = {"rules": rules, "mixers": mixers, "turning": turning, "mamba3": mamba3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS)[::-1])
    parser.add_argument("--seconds", type=float, default=40, help="nothing is begun when they are over")
    parser.add_argument("--json", type=Path, help="where the rows are written, as they come")
    options = parser.parse_args()
    begin, rows = time.monotonic(), list[Row]()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; relative RMS: worst output, worst gradient, tolerance "
          f"({SUMMED:g} of sums in which terms cancel, in bfloat16)", flush=True)  # fmt: skip
    for part in options.only:
        for run in PARTS[part](options.device):
            if time.monotonic() - begin > options.seconds:
                row = Row(part, "", "", note="not begun in time")
            else:
                try:
                    row = run()
                except ImportError as error:
                    row = Row(part, str(run.args[0]), "", note=f"not run: {error}")  # type: ignore[attr-defined]
                except Exception as error:  # a package's kernels may raise anything
                    note = f"{type(error).__name__}: {str(error)[:300]}"
                    row = Row(part, str(run.args[0]), "", note=note, over=True)  # type: ignore[attr-defined]
            rows.append(row)
            print(told(row), flush=True)
            if options.json is not None:
                kept = {"device": name, "torch": torch.__version__, "rows": [row._asdict() for row in rows]}
                options.json.write_text(json_text(kept, indent=1) + "\n")
    return int(any(row.over for row in rows))


if __name__ == "__main__":
    sys.exit(main())
