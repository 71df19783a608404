"""Every sequence mixer as a language model of the same size over the same bytes: loss, speed, memory, state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq.benchmarking.block import autocast
from mambaseq.benchmarking.timing import on, peak_bytes, release
from mambaseq.models import SequenceModel
from mambaseq.reproduction import Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import of_text
from mambaseq_text.recipes.shakespeare import PRECISION, Sizes, Text, make_model, optimizer, precision, trained, width

# Mixer and options: those of the registry's core that mix along the sequence, as they are by default.
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba, lti": ("mamba", {"lti": True}),
    "mamba2": ("mamba2", {}),
    "mamba3": ("mamba3", {}),
    "gated_delta": ("gated_delta", {}),
    "kda": ("kda", {}),
    "gla": ("gla", {}),
    "s4d": ("s4d", {}),
    "s4": ("s4", {}),
    "s5": ("s5", {}),
    "lmu": ("lmu", {}),
    "lssl": ("lssl", {}),
    "h3": ("h3", {}),
    "hyena": ("hyena", {}),
    "retention": ("retention", {}),
    "linear_attention": ("linear_attention", {}),
    "rwkv4": ("rwkv4", {}),
    "attention": ("attention", {}),
}
PARAMETERS = 1_000_000
N_LAYERS = 4


class Contender(NamedTuple):
    """A model of one mixer."""

    name: str
    mixer: str
    options: dict[str, Any]
    d_model: int
    n_layers: int

    @classmethod
    def of(cls, name: str, n_layers: int, parameters: int) -> Contender:
        """Of the width that comes to so many parameters."""
        mixer, options = MIXERS[name]
        return cls(name, mixer, options, width(mixer, n_layers, parameters, tuple(options.items())), n_layers)

    def make(self, length: int, device: torch.device, seed: int = 0) -> SequenceModel:
        """For sequences of about this length."""
        torch.manual_seed(seed)
        return make_model(self.mixer, self.d_model, self.n_layers, length, self.options).to(device)


def run(context: Context) -> list[Table]:
    names = context.wanted(MIXERS)
    text = Text.load(context.device)
    parameters = context.at(full=PARAMETERS, small=50_000, tiny=20_000)
    n_layers = context.at(full=N_LAYERS, small=2, tiny=1)
    sizes = Sizes(
        length=context.at(full=1024, small=128, tiny=16),
        batch_size=context.at(full=16, small=8, tiny=2),
        steps=context.at(full=400, small=200, tiny=2),
        tested=context.at(full=len(text.test), small=16_384, tiny=256),
    )
    lengths = context.at(full=(2048, 16384), small=(256, 1024), tiny=(16, 32))
    contenders = [Contender.of(name, n_layers, parameters) for name in names]
    losses = [_losses(context, contender, text, sizes) for contender in contenders]
    costs = [_costs(context, contender, text, lengths) for contender in contenders]
    same = f"{n_layers} layers and about {parameters:,} parameters each, by the choice of d_model; {PRECISION}"
    about_losses = (
        f"Tinyshakespeare byte by byte, the last tenth held out. Mixers with their default options, an MLP behind "
        f"those whose published block has one, {same}. {sizes.steps:,} steps of {sizes.batch_size} windows of "
        f"{sizes.length:,} bytes for each, {sizes.epochs(text):.1f} times the training text: what the loss on held-out "
        "text is above that in training, the mean of the last hundred steps, is overfitting. AdamW, learning rate 2e-3 "
        "with warm-up and cosine for all, none tuned. Held-out bytes are predicted in pieces of the same length."
    )
    about_costs = (
        f"The same models: {same}. Training steps of {lengths[-1]:,} tokens, as sequences of {lengths[0]:,} and as one "
        f"of {lengths[-1]:,}: tokens a second of whole steps with AdamW, replayed from a CUDA graph on a GPU, and the "
        "most that such a step, not captured, allocates together with the model and its optimizer. The state is that "
        f"of one sequence after {lengths[0]:,} tokens, all layers together: what generation carries on."
    )
    return [
        Table("Mixers: loss at equal size and tokens", about_losses, _LOSS_COLUMNS, losses),
        Table("Mixers: speed, memory and state", about_costs, _cost_columns(lengths), costs),
    ]


_LOSS_COLUMNS = [
    Column("bits", "bits a byte, held out", 3),
    Column("train_bits", "bits a byte, last training steps", 3),
    Column("d_model", "d_model", 0),
    Column("parameters", "parameters", 0),
]


def _cost_columns(lengths: tuple[int, ...]) -> list[Column]:
    columns = []
    for length in lengths:
        columns += [
            Column(f"tokens_per_s at {length}", f"tokens/s at {length:,}", 0),
            Column(f"peak_gib at {length}", f"peak GiB at {length:,}", 2),
        ]
    return [*columns, Column("state_bytes", "state, bytes", 0)]


def _losses(context: Context, contender: Contender, text: Text, sizes: Sizes) -> Line:
    """What each seed's training came to."""

    def learned(seed: int, checkpoint: Path) -> dict[str, float]:
        model = contender.make(sizes.length, context.device, seed)
        return trained(model, text, sizes, seed, checkpoint, contender.name)

    label = f"{contender.name} steps={sizes.steps}"
    found, note = _tried(label, lambda: context.over_seeds(label, learned))
    return Line(contender.name, {**found, "d_model": [contender.d_model]}, note=note)


def _costs(context: Context, contender: Contender, text: Text, lengths: tuple[int, ...]) -> Line:
    """Speed and memory at these lengths, with the tokens of the longest a step, and the state after the shortest."""
    values: dict[str, list[float]] = {}
    notes = []
    steps = context.at(full=50, small=3, tiny=2)

    def trial(what: str, function: Callable[[], dict[str, float]]) -> Mapping[str, float]:
        label = f"{contender.name} {what}"
        found, note = _tried(label, lambda: context.trial(label, lambda _: function()))
        if note:
            notes.append(f"{what}: {note}")
        return found

    for length in lengths:
        batch_size = lengths[-1] // length
        found = trial(f"at {length}", lambda n=length, b=batch_size: cost(contender, text, n, b, steps))  # type: ignore[misc]
        values |= {f"{key} at {length}": [found[key]] for key in ("tokens_per_s", "peak_gib") if key in found}
        if found.get("captured") == 0 and "peak_gib" in found:  # which GPUs alone tell
            notes.append(f"at {length}: not captured")
    found = trial(f"state after {lengths[0]}", lambda: state_size(contender, text.test[: lengths[0]]))
    if found:
        values["state_bytes"] = [found["bytes"]]
        if found["bytes_per_token"]:
            notes.append(f"the state grows by {found['bytes_per_token']:,.0f} bytes a token")
    return Line(contender.name, values, note="; ".join(notes))


def _tried(label: str, function: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What it found; or nothing, and a note, where there is not enough memory: the others go on."""
    try:
        return function(), ""
    except torch.OutOfMemoryError:
        tqdm.write(f"{label}: out of memory")
        return {}, "out of memory"
    finally:
        release()


def cost(contender: Contender, text: Text, length: int, batch_size: int, steps: int) -> dict[str, float]:
    """Tokens a second and the peak memory of training steps."""
    device = text.train.device
    batches = of_text(text.train, length, batch_size, seed=0)

    def some(steps: int, cuda_graph: bool) -> Any:
        model = contender.make(length, device)
        config, dtype = optimizer(steps), precision(device)
        return train(model, batches, steps, config, autocast=dtype, cuda_graph=cuda_graph, label=contender.name)

    with on(device):
        if device.type == "cuda":
            some(2, cuda_graph=False)  # compiles, and takes the libraries' own memory
            release()
        peak = peak_bytes(lambda: some(2, cuda_graph=False), device)
        release()
        timed = some(steps, cuda_graph=True)
    found = {"tokens_per_s": timed.steps_per_second * batch_size * length, "captured": float(timed.captured)}
    return found if peak is None else {**found, "peak_gib": peak / 2**30}


@torch.no_grad()
def state_size(contender: Contender, text: Tensor) -> dict[str, float]:
    """Bytes of the state of one sequence `(length,)`, and how many a token more adds to them."""
    model = contender.make(len(text), text.device).eval()

    def size(tokens: Tensor) -> int:
        with autocast(text.device):
            states = model(tokens[None].long(), return_state=True, return_logits=False).state
        assert states is not None
        return sum(M.numel() * M.element_size() for state in states for M in state.tensors().values())

    half = len(text) // 2
    whole, before = size(text), size(text[:half])
    return {"bytes": whole, "bytes_per_token": (whole - before) / (len(text) - half)}


recipe = Recipe(run, seeds=3)
