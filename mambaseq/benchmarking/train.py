"""`bench train`: AdamW steps of a language model of any mixer, next to a Transformer and, if that is Mamba, to
mamba-ssm's with the same weights.

bf16 autocast on a GPU, fp32 weights; ours computes the loss without making the logits, the others from logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.backbones.graphed import CudaGraph
from mambaseq.benchmarking import peers
from mambaseq.benchmarking.block import autocast
from mambaseq.benchmarking.report import OURS, Column, Report, Row
from mambaseq.benchmarking.timing import measure, peak_bytes, release
from mambaseq.benchmarking.transformer import Transformer
from mambaseq.checkpoints.upstream import to_upstream
from mambaseq.domain import catalog
from mambaseq.models import causal_lm

OP = "train step"
COLUMNS = (
    Column("step_ms", "step ms", 1, compared=False),
    Column("tokens_per_s", "tokens/s", 0, more_is_better=True),
    Column("peak_gib", "peak GiB", 2),
    Column("parameters", "parameters", 0, compared=False),
)


class Sizes(NamedTuple):
    """Sizes of the models. n_layers of a mixer alone; of one that an MLP follows half as many, which have about as many
    parameters. vocab_size is a multiple of 8, as mamba-ssm pads it (50,277 tokens)."""

    d_model: int
    n_layers: int
    vocab_size: int
    transformer_layers: int
    heads: int
    d_hidden: int
    shapes: tuple[tuple[int, int], ...]


SIZES = {
    "full": Sizes(768, 24, 50280, 12, 12, 2240, ((8, 2048), (1, 65536))),
    "small": Sizes(64, 2, 512, 1, 4, 192, ((2, 256), (1, 1024))),
    "tiny": Sizes(8, 1, 40, 1, 2, 16, ((2, 17), (1, 33))),
}
# steps before anything is timed, on one batch: the loss must be finite and fall
STEPS = 5
UNGRAPHED = f"{OURS}, no graphs"  # the same model with `cuda_graph: false`
# nats between our loss and mamba-ssm's with the same weights
LOSS_TOLERANCE = 1e-2

Loss = Callable[[Any, Tensor, Tensor], Tensor]


def run(device: torch.device, scale: str, repeats: int, mixer: str = "mamba") -> Report:
    """Measure; prints as it goes. mixer: the registered name of our model's.

    Raises ConfigError if there is none of that name.
    """
    sizes = SIZES[scale]
    if catalog()["mixers"].get(mixer, "--mixer").companion is not None:
        sizes = sizes._replace(n_layers=max(1, sizes.n_layers // 2))
    report = Report("train", device, scale, COLUMNS)
    report.head(
        f"train step with AdamW: {sizes.n_layers} layers of {mixer}, width {sizes.d_model}, vocabulary "
        f"{sizes.vocab_size}"
    )
    op = OP if mixer == "mamba" else f"{OP} of {mixer}"
    module, absent = peers.find("mamba_ssm", device)
    if mixer != "mamba":
        module, absent = None, "its models are compared with those of the mixer mamba"
    for batch, length in sizes.shapes:
        shape = {"batch": batch, "length": length}
        generator = torch.Generator(device).manual_seed(1)
        tokens = torch.randint(sizes.vocab_size, (batch, length + 1), generator=generator, device=device)
        ours = report.attempted(
            op,
            shape,
            OURS,
            lambda t=tokens: _row(op, OURS, t, lambda: _ours(sizes, device, mixer), _our_loss, repeats),  # type: ignore[misc]
        )
        release()
        if device.type == "cuda":
            report.attempted(
                op,
                shape,
                UNGRAPHED,
                lambda t=tokens, like=ours: _row(  # type: ignore[misc]
                    op, UNGRAPHED, t, lambda: _ours(sizes, device, mixer, cuda_graph=False), _our_loss, repeats, like
                ),
            )
            release()
        if module is None:
            report.add(Row(op, shape, "mamba-ssm", status="absent", note=absent))
        else:
            report.attempted(
                op,
                shape,
                "mamba-ssm",
                lambda t=tokens, like=ours: _row(  # type: ignore[misc]
                    op, "mamba-ssm", t, lambda: _mamba_ssm(module, sizes, device), _loss_of_logits, repeats, like
                ),
            )
            release()
        report.attempted(
            op,
            shape,
            "Transformer",
            lambda t=tokens: _row(  # type: ignore[misc]
                op, "Transformer", t, lambda: _transformer(sizes, device), _transformer_loss, repeats
            ),
        )
        release()
    return report


def _row(
    op: str,
    contender: str,
    tokens: Tensor,
    make: Callable[[], nn.Module],
    loss_of: Loss,
    repeats: int,
    same_weights_as: Row | None = None,
) -> Row:
    """Train on one batch `(batch, length + 1)`; the peak counts the model, its optimizer and everything."""
    device = tokens.device
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    row = Row(op, {"batch": inputs.shape[0], "length": inputs.shape[1]}, contender)
    timings: dict[str, float] = {}

    def work() -> None:
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=device.type == "cuda")

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with autocast(device):
                loss = loss_of(model, inputs, labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses = [float(step()) for _ in range(STEPS)]
        row.values.update(first_loss=losses[0], last_loss=losses[-1])
        row.values["parameters"] = sum(value.numel() for value in model.parameters())
        if all(map(math.isfinite, losses)) and losses[-1] < losses[0]:
            timings["ms"] = measure(step, device, repeats, budget_s=4.0, warm_up_s=None).ms

    peak = peak_bytes(work, device)
    first, last = row.values["first_loss"], row.values["last_loss"]
    if "ms" not in timings:
        row.status, row.note = "wrong", f"the loss of a repeated batch goes from {first:.3f} to {last:.3f}"
        return row
    if same_weights_as is not None and same_weights_as.status == "ok":
        row.error = abs(first - same_weights_as.values["first_loss"])
        if not row.error <= LOSS_TOLERANCE:
            row.status, row.note = "wrong", f"the same weights give another loss, {row.error:.1e} nats away"
            return row
    row.values.update(step_ms=timings["ms"], tokens_per_s=inputs.numel() / timings["ms"] * 1e3)
    if peak is not None:
        row.values["peak_gib"] = peak / 2**30
    return row


def _ours(sizes: Sizes, device: torch.device, mixer: str = "mamba", cuda_graph: CudaGraph = "auto") -> nn.Module:
    torch.manual_seed(0)
    with device:
        return causal_lm(sizes.vocab_size, sizes.d_model, sizes.n_layers, mixer, cuda_graph=cuda_graph)


def _mamba_ssm(module: Any, sizes: Sizes, device: torch.device) -> nn.Module:
    config_module, absent = peers.find("mamba_ssm.models.config_mamba", device)
    if config_module is None:
        raise ImportError(absent)
    config = config_module.MambaConfig(d_model=sizes.d_model, n_layer=sizes.n_layers, vocab_size=sizes.vocab_size)
    model = module.MambaLMHeadModel(config, device=device)
    model.load_state_dict(to_upstream(_ours(sizes, device).state_dict()))
    return model


def _transformer(sizes: Sizes, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    longest = max(length for _, length in sizes.shapes)
    with device:
        return Transformer(
            sizes.vocab_size, sizes.d_model, sizes.transformer_layers, sizes.heads, sizes.d_hidden, longest
        )


def _our_loss(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    return model(inputs, labels).loss


def _loss_of_logits(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).logits.float().flatten(0, 1), labels.flatten())


def _transformer_loss(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    return model(inputs, labels)
