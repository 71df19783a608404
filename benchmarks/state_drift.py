"""What states kept in bf16 between steps do to predictions: logits and KL against fp32 states, over a long sequence.

`python benchmarks/state_drift.py [--checkpoint RUN] [--mixer mamba mamba2] [--d-model N] [--layers N] [--positions N]
[--seconds N] [--json FILE]`: one sequence is read token by token by two copies of the state, one rounded after every
step. Without a checkpoint weights and tokens are random, a model for each mixer: drift is then that of the arithmetic
alone, with decays as they are at the beginning of training. Told at powers of two and at the end, each over the
positions since the last: the logits' relative RMS error, KL(fp32 || bf16) in nats a token, and how often the likeliest
token differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.checkpoints.export import load_model
from mambaseq.generation import Decoder
from mambaseq.models import SequenceModel, causal_lm

MIXERS = ("mamba", "mamba2", "mamba3", "gated_delta", "kda", "gla")


@dataclasses.dataclass
class Drift:
    """Over the positions up to `position`, since the one told before."""

    position: int
    logits: float
    kl: float
    other_token: float


@torch.no_grad()
def drift(model: SequenceModel, tokens: Tensor, first: int = 256) -> Iterator[Drift]:
    """tokens `(positions,)`; told from `first` on."""
    decoders = [
        Decoder(model, [layer.stored_as(dtype) for layer in model.init_state(1)])
        for dtype in (torch.float32, torch.bfloat16)
    ]
    told, sums, count = first, torch.zeros(4, dtype=torch.float64, device=tokens.device), 0
    for position, token in enumerate(tokens, 1):
        exact, rounded = (decoder.step(token[None])[0].double() for decoder in decoders)
        p, q = exact.log_softmax(-1), rounded.log_softmax(-1)
        centred = exact - exact.mean()
        kl, other = (p.exp() * (p - q)).sum(), (exact.argmax() != rounded.argmax()).double()
        sums += torch.stack([(rounded - rounded.mean() - centred).square().sum(), centred.square().sum(), kl, other])
        count += 1
        if position in (told, len(tokens)):
            error, size, kl_sum, others = sums.tolist()
            yield Drift(position, (error / size) ** 0.5, kl_sum / count, others / count)
            told, count = 2 * position, 0
            sums.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a run or an exported model")
    parser.add_argument("--mixer", nargs="+", default=["mamba2"], choices=MIXERS)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--text", type=Path, help="read by the checkpoint's tokenizer; else random tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="go on for no longer")
    parser.add_argument("--json", type=Path, help="write the figures here too, as they come")
    arguments = parser.parse_args()
    end, rows = time.monotonic() + arguments.seconds, list[dict[str, Any]]()
    for mixer in ["checkpoint"] if arguments.checkpoint else arguments.mixer:
        if time.monotonic() > end:
            print(f"{mixer}: the time is up")
            continue
        model, tokens = _loaded(arguments) if arguments.checkpoint else (_random(arguments, mixer), None)
        model = model.to(arguments.device).eval()
        if torch.device(arguments.device).type == "cuda":
            model = model.bfloat16()
        if tokens is None:
            vocabulary = model.get_parameter("encoder.embedding.weight").shape[0]
            tokens = torch.randint(vocabulary, (arguments.positions,), generator=torch.Generator().manual_seed(1))
        size = f"{model.n_parameters() / 1e6:.1f} M parameters, {next(model.parameters()).dtype}"
        print(f"{mixer}, {size}, {arguments.device}", flush=True)
        for found in drift(model, tokens.to(arguments.device)):
            rows.append({"model": mixer, "size": size, **dataclasses.asdict(found)})
            print(
                f"to {found.position:>7,}: logits {found.logits:.2e}, KL {found.kl:.2e} nats, "
                f"another token {found.other_token:.2%}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json_text({"device": arguments.device, "rows": rows}, indent=2) + "\n")
            if time.monotonic() > end:
                break


def _random(arguments: argparse.Namespace, mixer: str) -> SequenceModel:
    torch.manual_seed(0)
    return causal_lm(arguments.vocabulary, arguments.d_model, arguments.layers, mixer=mixer)


def _loaded(arguments: argparse.Namespace) -> tuple[SequenceModel, Tensor | None]:
    """A checkpoint's model, and the tokens of the text, if one is given."""
    loaded: Any = load_model(arguments.checkpoint)
    if arguments.text is None:
        return loaded.model, None
    ids = loaded.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))
    return loaded.model, torch.as_tensor(ids)[: arguments.positions]


if __name__ == "__main__":
    main()
