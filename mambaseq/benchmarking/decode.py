"""`bench decode`: greedy generation by a Mamba of 1.4B parameters and by a Transformer of 1.3B with a key-value cache.

Random bf16 weights (fp32 on a CPU). The Transformer's cache is allocated for the whole sequence, and on a GPU each of
its steps is a CUDA graph captured beforehand, which its times exclude; our times of a whole call include the capture.
The peak is memory beyond the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.benchmarking.cases import training_dtype
from mambaseq.benchmarking.report import OURS, Column, Report, Row
from mambaseq.benchmarking.timing import attempt, measure, peak_bytes, release
from mambaseq.benchmarking.transformer import Transformer
from mambaseq.generation import generate
from mambaseq.models import causal_lm

OP = "generation"
COLUMNS = (
    Column("prefill_ms", "prefill ms", 1),
    Column("decode_tokens_per_s", "decode tok/s", 0, more_is_better=True),
    Column("tokens_per_s", "all tok/s", 0, more_is_better=True),
    Column("peak_gib", "peak GiB", 2),
)


class Sizes(NamedTuple):
    """Sizes of the models and of the generated sequences."""

    d_model: int
    n_layers: int
    vocab_size: int
    transformer_layers: int
    heads: int
    d_hidden: int
    prompt: int
    new_tokens: int
    batches: tuple[int, ...]


SIZES = {
    "full": Sizes(2048, 48, 50280, 24, 16, 5504, 2048, 128, (1, 2, 4, 8, 16, 32, 64, 128)),
    "small": Sizes(64, 2, 512, 1, 4, 192, 64, 16, (1, 4)),
    "tiny": Sizes(8, 1, 40, 1, 2, 16, 9, 4, (1, 2)),
}
# what the check generates: prompt, new tokens
CHECKED = (64, 20)
# how far below the greatest logit of a pass over the whole sequence a token may lie that was chosen step by step, in
# standard deviations of the logits: bf16 gives some hundredths, a token chosen from a wrong state some units
MARGIN = 0.5

# of random embeddings' usual size: with larger ones, tied, a token would be its own likeliest successor whatever the
# state is, and the check would see nothing
EMBEDDING_SCALE = 0.1

Generate = Callable[[Tensor, int], Tensor]


def run(device: torch.device, scale: str, repeats: int) -> Report:
    """Measure; prints as it goes."""
    sizes = SIZES[scale]
    report = Report("decode", device, scale, COLUMNS)
    report.head(f"generation, greedy: prompt of {sizes.prompt}, then {sizes.new_tokens} tokens")
    for contender, make in ((OURS, _mamba), ("Transformer", _transformer)):
        _contend(contender, make, sizes, report, repeats)
        release()
    return report


def _contend(contender: str, make: Callable[..., Any], sizes: Sizes, report: Report, repeats: int) -> None:
    """The rows of a contender: one model, with growing batches until one does not fit."""
    device = report.device

    def checked() -> tuple[Any, str]:
        model, generator_of = make(sizes, device)
        return generator_of, _wrong(model, generator_of(*_check_sizes(sizes)), sizes, device)

    status, note, found = attempt(checked)
    generator_of: Any = None
    wrong = ""
    if found is not None:
        generator_of, wrong = found
    if wrong:
        status, note = "wrong", wrong
    release()
    for batch in sizes.batches:
        shape = {"batch": batch, "prompt": sizes.prompt}
        if status != "ok":
            report.add(Row(OP, shape, contender, status=status, note=note))
            continue

        def run(batch: int = batch) -> Row:
            return _row(contender, generator_of, sizes, batch, device, repeats)

        if report.attempted(OP, shape, contender, run).status == "oom":
            status, note = "oom", "a smaller batch did not fit"
        release()


def _row(
    contender: str,
    generator_of: Callable[[int, int, int], Generate],
    sizes: Sizes,
    batch: int,
    device: torch.device,
    repeats: int,
) -> Row:
    """Times of a whole call, of the prompt alone, and of the tokens after it. Work done once in a call, such as
    capturing a graph, counts in the first but not in the last, which is a difference of two calls."""
    row = Row(OP, {"batch": batch, "prompt": sizes.prompt}, contender)
    few = sizes.new_tokens // 4
    generator = torch.Generator(device).manual_seed(1)
    prompt = torch.randint(sizes.vocab_size, (batch, sizes.prompt), generator=generator, device=device)

    def work() -> None:
        tokens = generator_of(batch, sizes.prompt, sizes.new_tokens)
        tokens(prompt, min(4, sizes.new_tokens))
        prefill, some, total = (
            measure(lambda n=n: tokens(prompt, n), device, repeats, budget_s=1.0, warm_up_s=None).ms  # type: ignore[misc]
            for n in (1, few, sizes.new_tokens)
        )
        row.values.update(prefill_ms=prefill, total_ms=total, tokens_per_s=batch * sizes.new_tokens / total * 1e3)
        if total > some:
            row.values["decode_tokens_per_s"] = batch * (sizes.new_tokens - few) / (total - some) * 1e3

    peak = peak_bytes(work, device)
    if peak is not None:
        row.values["peak_gib"] = peak / 2**30
    return row


def _check_sizes(sizes: Sizes) -> tuple[int, int, int]:
    prompt, new = CHECKED
    return 2, min(prompt, sizes.prompt), min(new, sizes.new_tokens)


def _wrong(model: Any, tokens: Generate, sizes: Sizes, device: torch.device) -> str:
    """What is wrong with tokens that were generated step by step, compared with one pass over all of them; "" if
    nothing."""
    batch, length, new = _check_sizes(sizes)
    generator = torch.Generator(device).manual_seed(2)
    prompt = torch.randint(sizes.vocab_size, (batch, length), generator=generator, device=device)
    with torch.no_grad():
        out = tokens(prompt, new)
        if tuple(out.shape) != (batch, length + new) or not torch.equal(out[:, :length], prompt):
            return f"{tuple(out.shape)} came of a prompt of {tuple(prompt.shape)}"
        output = model(out[:, :-1])
        logits = (output if isinstance(output, Tensor) else output.logits)[:, length - 1 :].float()
    chosen = logits.gather(-1, out[:, length:, None])[..., 0]
    margin = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
    return "" if margin <= MARGIN else f"a token's logit is {margin:.1f} deviations below the greatest"


def _mamba(sizes: Sizes, device: torch.device) -> tuple[Any, Callable[[int, int, int], Generate]]:
    torch.manual_seed(0)
    with device:
        model = causal_lm(sizes.vocab_size, sizes.d_model, sizes.n_layers).to(training_dtype(device)).eval()
    _shrink(model.get_parameter("encoder.embedding.weight"))
    return model, lambda batch, length, new: lambda prompt, n: generate(model, prompt, n, temperature=0)


def _transformer(sizes: Sizes, device: torch.device) -> tuple[Any, Callable[[int, int, int], Generate]]:
    torch.manual_seed(0)
    with device:
        model = Transformer(
            sizes.vocab_size,
            sizes.d_model,
            sizes.transformer_layers,
            sizes.heads,
            sizes.d_hidden,
            sizes.prompt + sizes.new_tokens,
        )
    model = model.to(training_dtype(device)).eval()
    _shrink(model.get_parameter("embedding.weight"))
    return model, lambda batch, length, new: CachedGeneration(model, batch, length, new, device)


def _shrink(embedding: Tensor) -> None:
    with torch.no_grad():
        embedding.mul_(EMBEDDING_SCALE)


class CachedGeneration:
    """Greedy generation by a Transformer in preallocated memory; on a GPU with a CUDA graph for each position."""

    def __init__(self, model: Transformer, batch: int, prompt: int, new_tokens: int, device: torch.device) -> None:
        self.model, self.prompt = model, prompt
        self.cache = model.init_cache(batch, prompt + new_tokens)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        if device.type == "cuda":
            self._capture(range(prompt, prompt + new_tokens - 1), device)

    def _capture(self, positions: range, device: torch.device) -> None:
        # not by `torch.cuda.graph`, which collects garbage and empties the cache before each of the many graphs
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            self._advance(positions.start)  # initialisations must not happen while capturing
            torch.cuda.synchronize(device)
            for position in positions:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    self._advance(position)
                finally:
                    graph.capture_end()
                self.graphs.append(graph)
        torch.cuda.synchronize(device)

    def _advance(self, position: int) -> None:
        self.token.copy_(self.model.extend_(self.token[:, None], self.cache, position).argmax(-1))

    @torch.no_grad()
    def __call__(self, prompt: Tensor, n: int) -> Tensor:
        self.token.copy_(self.model.extend_(prompt, self.cache, 0).argmax(-1))
        tokens = [self.token.clone()]
        for index in range(n - 1):
            if self.graphs:
                self.graphs[index].replay()
            else:
                self._advance(self.prompt + index)
            tokens.append(self.token.clone())
        return torch.cat([prompt, torch.stack(tokens, dim=1)], dim=1)
