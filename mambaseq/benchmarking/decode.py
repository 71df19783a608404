"""`bench decode`: greedy generation by Mamba and Mamba-2, by mamba-ssm and transformers with the same weights, and by a
Transformer of equal size whose heads share keys and values.

Random bf16 weights (fp32 on a CPU). The Transformer's cache is allocated for the whole sequence, and on a GPU each of
its steps is a CUDA graph captured beforehand, which its times exclude; our times of a whole call include the capture.
Prompts are read in the same way each time, so ours are read by graphs from the third time on. The peak is memory beyond
the weights.

Beside every speed stands its share of the floor: a step reads all weights, reads and writes the states (or reads the
keys and values) once, a prompt takes the operations of its matrix products (attention's included, the scans' not).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.benchmarking import floors, peers
from mambaseq.benchmarking.cases import training_dtype
from mambaseq.benchmarking.report import OURS, Column, Report, Row
from mambaseq.benchmarking.timing import attempt, measure, peak_bytes, release
from mambaseq.benchmarking.transformer import Transformer
from mambaseq.checkpoints.upstream import described, to_upstream
from mambaseq.errors import ConfigError, shown
from mambaseq.generation import generate
from mambaseq.models import SequenceModel, causal_lm

OP = "generation"
COLUMNS = (
    Column("prefill_ms", "prefill ms", 1),
    Column("prefill_of_floor_percent", "% of floor", 0, compared=False),
    Column("decode_tokens_per_s", "decode tok/s", 0, more_is_better=True),
    Column("decode_of_floor_percent", "% of floor", 0, compared=False),
    Column("tokens_per_s", "all tok/s", 0, more_is_better=True),
    Column("peak_gib", "peak GiB", 2),
)
PEERS = ("mamba-ssm", "transformers")
HALF_STATES, HALF = f"{OURS}, bf16 states", f"{OURS}, bf16"


class Sizes(NamedTuple):
    """Sizes of the models and of the generated sequences. transformer: layers, heads, heads of keys and values, width
    of the feed-forward layers; of about as many parameters."""

    name: str
    mixer: str
    d_model: int
    n_layers: int
    vocab_size: int
    transformer: tuple[int, int, int, int]
    prompt: int
    new_tokens: int
    batches: tuple[int, ...]
    contenders: tuple[str, ...]


_ALL = (OURS, "Transformer", *PEERS)  # the slowest last: time may be up before
SIZES = {
    "full": (
        Sizes("130M", "mamba", 768, 24, 50280, (12, 12, 4, 2592), 2048, 128, (1, 8, 64, 256), _ALL),
        Sizes("1.4B", "mamba", 2048, 48, 50280, (24, 16, 8, 6560), 2048, 128, (1, 4, 64, 128), _ALL),
        Sizes("Mamba-2 1.3B", "mamba2", 2048, 48, 50280, (24, 16, 8, 6560), 2048, 128, (128,), (OURS, HALF_STATES)),
    ),
    "small": (
        Sizes(
            "130M",
            "mamba",
            768,
            24,
            50280,
            (12, 12, 4, 2592),
            64,
            64,
            (1,),
            (OURS, HALF, "transformers", "transformers, bf16"),
        ),
    ),
    "tiny": (Sizes("tiny", "mamba", 8, 1, 40, (1, 2, 1, 16), 9, 4, (1, 2), (OURS, "mamba-ssm", "Transformer")),),
}
# what the check generates: prompt, new tokens
CHECKED = (64, 20)
# how far below the greatest logit of a pass over the whole sequence a token may lie that was chosen step by step, in
# standard deviations of the logits: bf16 gives some hundredths, a token chosen from a wrong state some units
MARGIN = {torch.float32: 1e-2, torch.bfloat16: 0.5}
# seconds that reading a prompt may take by a peer without kernels, judged by a short one; a peer that would take longer
# is left out
LONGEST_PROMPT_S = 5.0

# of random embeddings' usual size: with larger ones, tied, a token would be its own likeliest successor whatever the
# state is, and the check would see nothing
EMBEDDING_SCALE = 0.1

Generate = Callable[[Tensor, int], Tensor]


@dataclasses.dataclass
class Options:
    """only: parts of names of sizes, and contenders that are run ("1.4B", "mamba-ssm"), in all their precisions; none
    is all. kv_heads: of the Transformer; None for that of its size. seconds: after which no further row is begun. path:
    where rows are written as they come."""

    only: Sequence[str] = ()
    kv_heads: int | None = None
    seconds: float | None = None
    path: Path | None = None


@dataclasses.dataclass
class Contestant:
    """generate: `(batch, prompt, new tokens)` to what generates. reference: ids to logits `(batch, length,
    vocabulary)`, by one pass of the same weights. step_bytes, prompt_flops: of a batch. dtype: of the weights."""

    generate: Callable[[int, int, int], Generate]
    reference: Callable[[Tensor], Tensor]
    step_bytes: Callable[[int], float]
    prompt_flops: Callable[[int], float]
    dtype: torch.dtype
    note: str = ""
    may_be_slow: bool = False


def run(device: torch.device, scale: str, repeats: int, options: Options | None = None) -> Report:
    """Measure; prints as it goes."""
    options = Options() if options is None else options
    report = Report("decode", device, scale, COLUMNS, options.path)
    print(f"floors: {floors.peak(device)}")
    until = None if options.seconds is None else time.monotonic() + options.seconds
    plan = _plan(scale, options)
    for sizes, contenders in plan:
        if options.kv_heads is not None:
            layers, heads, _, hidden = sizes.transformer
            sizes = sizes._replace(transformer=(layers, heads, options.kv_heads, hidden))
        report.head(
            f"{sizes.name}, greedy: {sizes.n_layers} layers of {sizes.d_model}, prompt of {sizes.prompt}, then "
            f"{sizes.new_tokens} tokens"
        )
        for contender in contenders:
            _contend(contender, sizes, report, repeats, until)
            release()
    return report


def _plan(scale: str, options: Options) -> list[tuple[Sizes, list[str]]]:
    """What is run. Raises ConfigError for names that are none, and for heads that cannot share."""
    found, used = [], set()
    for sizes in SIZES[scale]:
        heads = sizes.transformer[1]
        if options.kv_heads is not None and (options.kv_heads < 1 or heads % options.kv_heads):
            raise ConfigError(
                f"--kv-heads must divide the Transformer's {heads} heads ({sizes.name}), not {options.kv_heads}."
            )
        names = [one for one in options.only if one.lower() in sizes.name.lower()]
        people = {one for one in options.only if one in map(_family, sizes.contenders)}
        used |= {*names, *people}
        sizes_named = any(one.lower() in other.name.lower() for one in options.only for other in SIZES[scale])
        people_named = any(one in map(_family, other.contenders) for one in options.only for other in SIZES[scale])
        contenders = [one for one in sizes.contenders if _family(one) in people or not people_named]
        if (names or not sizes_named) and contenders:
            found.append((sizes, contenders))
    if unknown := [one for one in options.only if one not in used]:
        known = [sizes.name for sizes in SIZES[scale]]
        known += dict.fromkeys(_family(contender) for s in SIZES[scale] for contender in s.contenders)
        raise ConfigError(f"--only: nothing is called {shown(unknown[0])}. Known: {', '.join(known)}.")
    return found


def _family(contender: str) -> str:
    """A contender, whatever its precision: names on the command line hold no comma."""
    return contender.partition(",")[0]


def _contend(contender: str, sizes: Sizes, report: Report, repeats: int, until: float | None) -> None:
    """The rows of a contender: one model, with growing batches until one does not fit."""
    device, op = report.device, f"{OP}, {sizes.name}"

    def late() -> bool:
        return until is not None and time.monotonic() > until

    def checked() -> tuple[Any, str, float]:
        made = _make(contender, sizes, device)
        wrong = _wrong(made, sizes, device)
        took = 0.0
        if made.may_be_slow:
            batch, length, _ = _check_sizes(sizes)
            tokens = made.generate(batch, length, 1)
            prompt = torch.zeros(batch, length, dtype=torch.int64, device=device)
            took = measure(lambda: tokens(prompt, 1), device, 1, warm_up_s=None).ms / 1e3 * sizes.prompt / length
        return made, wrong, took

    absent = _absent(contender, device)
    made: Any = None
    if absent:
        status, note = "absent", absent
    elif late():
        status, note = "skipped", "the time is up"
    else:
        status, note, found = attempt(checked)
        if found is not None:
            made, wrong, took = found
            if wrong:
                status, note = "wrong", wrong
            elif took > LONGEST_PROMPT_S:
                status, note = "skipped", f"without kernels a prompt of {sizes.prompt} would take about {took:.0f} s"
    release()
    for batch in sizes.batches:
        shape = {"batch": batch, "prompt": sizes.prompt}
        if status == "ok" and late():
            status, note = "skipped", "the time is up"
        if status != "ok":
            report.add(Row(op, shape, contender, status=status, note=note))
            continue

        def run(batch: int = batch) -> Row:
            return _row(op, contender, made, sizes, batch, device, repeats)

        if report.attempted(op, shape, contender, run).status == "oom":
            status, note = "oom", "a smaller batch did not fit"
        release()


def _row(
    op: str, contender: str, made: Contestant, sizes: Sizes, batch: int, device: torch.device, repeats: int
) -> Row:
    """Times of a whole call, of the prompt alone, and of the tokens after it. Work done once in a call, such as
    capturing a graph, counts in the first but not in the last, which is a difference of two calls."""
    row = Row(op, {"batch": batch, "prompt": sizes.prompt}, contender, note=made.note)
    few = sizes.new_tokens // 4
    generator = torch.Generator(device).manual_seed(1)
    prompt = torch.randint(sizes.vocab_size, (batch, sizes.prompt), generator=generator, device=device)
    budget = 0.5 if device.type == "cuda" else 12.0
    repeats = repeats if device.type == "cuda" else min(repeats, 3)

    def work() -> None:
        tokens = made.generate(batch, sizes.prompt, sizes.new_tokens)
        tokens(prompt, min(4, sizes.new_tokens))
        began = time.monotonic()
        for _ in range(3):
            if time.monotonic() - began < 0.3:
                tokens(prompt, 1)
        prefill, some, total = (
            measure(lambda n=n: tokens(prompt, n), device, repeats, budget_s=budget, warm_up_s=None).ms  # type: ignore[misc]
            for n in (1, few, sizes.new_tokens)
        )
        row.values.update(prefill_ms=prefill, total_ms=total, tokens_per_s=batch * sizes.new_tokens / total * 1e3)
        if total > some:
            row.values["decode_tokens_per_s"] = batch * (sizes.new_tokens - few) / (total - some) * 1e3

    peak = peak_bytes(work, device)
    if peak is not None:
        row.values["peak_gib"] = peak / 2**30
    best = floors.peak(device)
    row.values["floor_prefill_ms"] = made.prompt_flops(batch) / best.flops * 1e3
    row.values["floor_decode_tokens_per_s"] = batch * best.bytes_per_s / made.step_bytes(batch)
    row.values["prefill_of_floor_percent"] = 100 * row.values["floor_prefill_ms"] / row.values["prefill_ms"]
    if (rate := row.values.get("decode_tokens_per_s")) is not None:
        row.values["decode_of_floor_percent"] = 100 * rate / row.values["floor_decode_tokens_per_s"]
    return row


def _check_sizes(sizes: Sizes) -> tuple[int, int, int]:
    prompt, new = CHECKED
    return 2, min(prompt, sizes.prompt), min(new, sizes.new_tokens)


def _wrong(made: Contestant, sizes: Sizes, device: torch.device) -> str:
    """What is wrong with tokens that were generated step by step, compared with one pass of the same weights over all
    of them; "" if nothing."""
    batch, length, new = _check_sizes(sizes)
    generator = torch.Generator(device).manual_seed(2)
    prompt = torch.randint(sizes.vocab_size, (batch, length), generator=generator, device=device)
    with torch.no_grad():
        out = made.generate(batch, length, new)(prompt, new)
        if tuple(out.shape) != (batch, length + new) or not torch.equal(out[:, :length], prompt):
            return f"{tuple(out.shape)} came of a prompt of {tuple(prompt.shape)}"
        output = made.reference(out[:, :-1])
        logits = output[:, length - 1 :]
    logits = logits.float()
    chosen = logits.gather(-1, out[:, length:, None])[..., 0]
    found = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
    return "" if found <= MARGIN[made.dtype] else f"a token's logit is {found:.2f} deviations below the greatest"


def _absent(contender: str, device: torch.device) -> str:
    if contender == "mamba-ssm":
        return peers.find("mamba_ssm", device)[1]
    if contender.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return ""


def _make(contender: str, sizes: Sizes, device: torch.device) -> Contestant:
    dtype = torch.bfloat16 if contender.endswith(", bf16") else training_dtype(device)
    if contender == "Transformer":
        return _transformer(sizes, device)
    if contender.startswith(OURS):
        return _mamba(sizes, device, dtype, torch.bfloat16 if contender == HALF_STATES else None)
    return _peer(_family(contender), sizes, device, dtype)


def _model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> SequenceModel:
    torch.manual_seed(0)
    with device:
        model = causal_lm(sizes.vocab_size, sizes.d_model, sizes.n_layers, mixer=sizes.mixer).to(dtype).eval()
    _shrink(model.get_parameter("encoder.embedding.weight"))
    return model


def _mamba(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype | None = None
) -> Contestant:
    model = _model(sizes, device, dtype)

    def generator(batch: int, length: int, new: int) -> Generate:
        return lambda prompt, n: generate(model, prompt, n, temperature=0, state_dtype=state_dtype)

    return Contestant(generator, lambda ids: model(ids).logits, *_costs(model, sizes, state_dtype), dtype)


def _costs(
    model: SequenceModel, sizes: Sizes, state_dtype: torch.dtype | None
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Bytes of a step, the states read and written, and operations of a prompt, of a batch."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = 0
    for layer in model.init_state(1):
        for name, tensor in layer.tensors().items():
            narrow = state_dtype is not None and name in layer.accumulated
            states += tensor.numel() * (state_dtype.itemsize if narrow and state_dtype else tensor.element_size())
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name)
    head = sizes.d_model * sizes.vocab_size
    return (
        lambda batch: weights + 2.0 * states * batch,
        lambda batch: 2.0 * batch * (products * sizes.prompt + head),
    )


def _transformer(sizes: Sizes, device: torch.device) -> Contestant:
    torch.manual_seed(0)
    layers, heads, kv_heads, hidden = sizes.transformer
    longest = sizes.prompt + sizes.new_tokens
    with device:
        model = Transformer(sizes.vocab_size, sizes.d_model, layers, heads, hidden, longest, kv_heads)
    model = model.to(training_dtype(device)).eval()
    _shrink(model.get_parameter("embedding.weight"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name)
    # what is read of keys and values on average
    kept = layers * 2 * kv_heads * model.head * model.embedding.weight.element_size()
    seen = sizes.prompt + sizes.new_tokens / 2
    attention = layers * 2.0 * sizes.d_model * sizes.prompt**2  # two products, of half a square each
    head = sizes.d_model * sizes.vocab_size
    return Contestant(
        lambda batch, length, new: CachedGeneration(model, batch, length, new, device),
        model,
        lambda batch: weights + batch * kept * seen,
        lambda batch: batch * (2.0 * products * sizes.prompt + attention + 2.0 * head),
        training_dtype(device),
        note=f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M, {kv_heads} of {heads} heads kept",
    )


def _peer(name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Contestant:
    """mamba-ssm or transformers with our weights."""
    model = _model(sizes, device, dtype)
    # the peers keep states in the weights' dtype
    costs = _costs(model, sizes, dtype)
    note = "states in bf16" if dtype == torch.bfloat16 else ""
    make = _mamba_ssm if name == "mamba-ssm" else _transformers
    return Contestant(make(model, sizes, device, dtype), lambda ids: model(ids).logits, *costs, dtype, note, True)


def _mamba_ssm(
    model: SequenceModel, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Callable[[int, int, int], Generate]:
    package: Any = peers.find("mamba_ssm", device)[0]
    config_module, absent = peers.find("mamba_ssm.models.config_mamba", device)
    if config_module is None:
        raise ImportError(absent)
    config = config_module.MambaConfig(d_model=sizes.d_model, n_layer=sizes.n_layers, vocab_size=sizes.vocab_size)
    theirs = package.MambaLMHeadModel(config, device=device)
    theirs.load_state_dict(to_upstream(model))
    theirs = theirs.to(dtype).eval()

    def generator(batch: int, length: int, new: int) -> Generate:
        theirs._decoding_cache = None  # the graph of another batch

        def tokens(prompt: Tensor, n: int) -> Tensor:
            if n > 1 and theirs._decoding_cache is None:  # captured for the longest, or again for each longer one
                theirs.generate(prompt, max_length=prompt.shape[1] + new, cg=True, top_k=1)
            found: Tensor = theirs.generate(prompt, max_length=prompt.shape[1] + n, cg=n > 1, top_k=1)
            return found

        return tokens

    return generator


def _transformers(
    model: SequenceModel, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Callable[[int, int, int], Generate]:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(**{**described(model), "eos_token_id": None, "bos_token_id": None})
    with device:
        theirs: Any = transformers.MambaForCausalLM(config)
    theirs.load_state_dict(to_upstream(model, transformers=True))
    theirs = theirs.to(dtype).eval()

    def tokens(prompt: Tensor, n: int) -> Tensor:
        found: Tensor = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n, do_sample=False
        )
        return found

    return lambda batch, length, new: torch.no_grad()(tokens)


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
