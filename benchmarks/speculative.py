"""What drafts win: tokens a second of one sequence, plain, by n-grams and by a smaller model.

`python benchmarks/speculative.py [--device cuda] [--tokens 512] [--sizes 130m 1.4b] [--tiny] [--json FILE]`: random
weights. The draft is the model itself (every guess is right: what checking costs at best, were drafting as slow as the
model), and a smaller model whose guesses are never right (what it costs at worst). N-grams have a prompt that the model
has begun to repeat. `--checkpoint RUN --draft RUN --prompt FILE`: a trained pair on the beginning of a text instead, by
`--temperature`.

A speed is told only where the tokens are those of plain decoding (in fp32; the share of equal tokens is told, since in
bf16 either of two likely tokens may come). Reading the prompt, captures and compiling are left out: every number is the
best of `--repeats` calls after one that prepares.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.checkpoints import load_model
from mambaseq.generation.decode import stream
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import prefill
from mambaseq.generation.speculation import Speculation
from mambaseq.models import SequenceModel, causal_lm

SIZES: dict[str, tuple[int, int]] = {"tiny": (64, 2), "35m": (512, 8), "130m": (768, 24), "1.4b": (2048, 48)}
VOCABULARY = 50_280


def made(size: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    width, layers = SIZES[size]
    model = causal_lm(vocab_size=1024 if size == "tiny" else VOCABULARY, d_model=width, n_layers=layers)
    return model.to(device, dtype).eval()


def timed(
    model: SequenceModel, prompt: Tensor, tokens: int, draft: Any, most: int, repeats: int, **options: Any
) -> tuple[float, Tensor, Speculation | None]:
    """Tokens a second, what was added, and what came of the drafts."""
    best, added = 0.0, prompt
    told = None if draft is None else Speculation(draft, most)  # which keeps its graphs and what it has measured
    prompts = Prompts.of(prompt)
    read = prefill(model, prompts, None)
    for repeat in range(repeats + 1):
        waits = torch.cuda.synchronize if prompt.is_cuda else lambda: None
        waits()
        begun = time.perf_counter()
        # the first tokens of a call capture its graphs, so they are no part of the time
        pieces, first, first_at = [], 0, begun
        for piece in stream(model, prompts, tokens, read=read, draft=told, patience=0.0, seed=0, **options):
            pieces.append(piece)
            first += piece.shape[1]
            if first_at == begun and first >= tokens // 4:
                waits()
                first_at, counted = time.perf_counter(), first
        waits()
        added = torch.cat(pieces, 1)
        if repeat:
            best = max(best, (tokens - counted) / (time.perf_counter() - first_at))
    return best, added, told


def rows(name: str, model: SequenceModel, prompt: Tensor, drafts: dict[str, Any], args: Any) -> list[dict[str, Any]]:
    options = {"temperature": args.temperature}
    plain, expected, _ = timed(model, prompt, args.tokens, None, args.draft_tokens, args.repeats, **options)
    found: list[dict[str, Any]] = [{"model": name, "way": "plain", "tokens_per_s": round(plain, 1)}]
    for way, draft in drafts.items():
        speed, added, told = timed(model, prompt, args.tokens, draft, args.draft_tokens, args.repeats, **options)
        assert told is not None
        same = float((added == expected).float().mean())
        row = {"model": name, "way": way, "same_tokens": round(same, 4)}
        if same == 1 or next(model.parameters()).dtype != torch.float32:
            row |= {
                "tokens_per_s": round(speed, 1),
                "over_plain": round(speed / plain, 3),
                "tokens_a_round": round(told.of_rounds / told.rounds, 2) if told.rounds else None,
                "right": round(told.right / told.guessed, 3) if told.guessed else None,
                "of_drafts": round(told.of_rounds / told.added, 3),
            }
        found.append(row)
    for row in found:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", default=["130m"], choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--draft-tokens", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--checkpoint", metavar="RUN")
    parser.add_argument("--draft", metavar="RUN")
    parser.add_argument("--prompt", metavar="FILE", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.tiny:
        args.sizes, args.tokens, args.repeats = ["tiny"], 64, 1
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        if args.checkpoint is not None:
            loaded = load_model(args.checkpoint, device)
            assert loaded.tokenizer is not None
            text = args.prompt.read_text(encoding="utf-8") if args.prompt is not None else "\n"
            ids = torch.from_numpy(loaded.tokenizer.encode(text).astype("int64"))[None, : args.prompt_tokens].to(device)
            drafts: dict[str, Any] = {"ngram": "ngram"}
            if args.draft is not None:
                drafts["smaller model"] = load_model(args.draft, device).model.to(dtype)
            found += rows(str(args.checkpoint), loaded.model.to(dtype), ids, drafts, args)
        for size in args.sizes if args.checkpoint is None else []:
            model = made(size, device, dtype)
            prompt = torch.randint(0, model.head.linear.out_features, (1, 256), device=device)
            # greedy decoding of random weights soon repeats itself
            begun = torch.cat(list(stream(model, Prompts.of(prompt), args.tokens, temperature=0.0)), 1)
            smaller = made("tiny" if args.tiny else "35m", device, dtype, seed=1)
            head: Any = smaller.head
            head.linear.weight = torch.nn.Parameter(head.linear.weight.roll(1, 0))  # another token than it means
            drafts = {"the model itself": model, "ngram": "ngram", "never right": smaller}
            found += rows(size, model, torch.cat([prompt, begun], 1), drafts, args)
    if args.json is not None:
        args.json.write_text(json_text(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
