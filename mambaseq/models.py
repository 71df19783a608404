"""Models: an encoder, a backbone and a head."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mambaseq.backbones.base import Backbone
from mambaseq.backbones.patterns import mixer_names
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, did_you_mean
from mambaseq.heads.lm import LMHead
from mambaseq.heads.reverse_complement import complement_table
from mambaseq.mixers.base import Mixer
from mambaseq.ops.embedding import Embedding


class TokenEncoder(nn.Module):
    """Token ids `(batch, length)` to embeddings, plus the embedding of a condition at every position.

    Args:
        d_model: width.
        vocab_size: number of token ids.
        n_conditions: number of conditions; 0 for none.
    """

    def __init__(self, d_model: int, vocab_size: int, n_conditions: int = 0) -> None:
        super().__init__()
        self.embedding = Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.condition = Embedding(n_conditions, d_model) if n_conditions else None

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.embedding(inputs)
        return x if condition is None else x + _condition(self.condition, condition, cu_seqlens)


class RCTokenEncoder(TokenEncoder):
    """Tokens of both strands of DNA: the embedding of each base beside that of the base paired with it, `(batch,
    length, 2 * d_model)` (see `backbones/reverse_complement.py`).

    Args:
        d_model: width of one strand.
        vocab_size: number of token ids.
        complement: the id paired with each id.
        n_conditions: number of conditions; 0 for none.
    """

    strands: ClassVar[int] = 2

    def __init__(self, d_model: int, vocab_size: int, complement: list[int], n_conditions: int = 0) -> None:
        super().__init__(d_model, vocab_size, n_conditions)
        self.complement: Tensor
        self.register_buffer("complement", complement_table(complement, vocab_size), persistent=False)

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        strands = (inputs, self.complement[inputs])
        return torch.cat([super(RCTokenEncoder, self).forward(s, condition, cu_seqlens) for s in strands], dim=-1)


class SignalEncoder(nn.Module):
    """A continuous signal `(batch, length, n_channels)` to embeddings, without quantising it.

    Args:
        d_model: width.
        n_channels: channels of the signal.
        n_conditions: number of conditions; 0 for none.
    """

    def __init__(self, d_model: int, n_channels: int, n_conditions: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(n_channels, d_model)
        self.condition = Embedding(n_conditions, d_model) if n_conditions else None

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.linear(inputs.to(self.linear.weight.dtype))
        return x if condition is None else x + _condition(self.condition, condition, cu_seqlens)


def _condition(table: Embedding | None, condition: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if table is None:
        raise ValueError("A condition was given to a model without conditions (encoder.n_conditions is 0).")
    if cu_seqlens is None:
        return table(condition)[:, None]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return table(torch.repeat_interleave(condition, lengths))[None]


@dataclasses.dataclass
class ModelOutput:
    """loss: scalar, when labels were given. logits: None where only the loss was needed. state: one a layer."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: list[Any] | None = None


class SequenceModel(nn.Module):
    """Encoder, backbone, head.

    An encoder may have a `stride`: its output then has a position for every `stride`-th input.
    spec: the plain description that `build_model` makes an equal model of; it is saved with the weights.
    """

    def __init__(self, encoder: nn.Module, backbone: Backbone, head: nn.Module, tie_embeddings: bool = False) -> None:
        super().__init__()
        self.encoder, self.backbone, self.head = encoder, backbone, head
        self.tie_embeddings = tie_embeddings
        self.spec: dict[str, Any] | None = None
        strands = [getattr(part, "strands", 1) for part in (encoder, backbone, head)]
        if len(set(strands)) > 1:
            raise ConfigError(
                f"Encoder, backbone and head have {strands[0]}, {strands[1]} and {strands[2]} strands. The backbone "
                f"reverse_complement goes with the encoder rc_tokens and a head rc_lm or rc_classification, and they "
                f"with it."
            )
        if tie_embeddings:
            if not isinstance(encoder, TokenEncoder) or not isinstance(head, LMHead):
                raise ConfigError("tie_embeddings needs a token encoder and an lm head.")
            head.linear.weight = encoder.embedding.weight

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        return_logits: bool | None = None,
    ) -> ModelOutput:
        """Run the model.

        inputs: `(batch, length)` int64 ids or `(batch, length, channels)` float; right padding only.
        labels: what the head learns: `(batch, length)` int64 (already shifted, -100 ignored) or `(sequences,)`.
        mask: `(batch, length)` bool of real positions. condition: `(sequences,)` int64.
        state: list of one state a layer, as returned. cu_seqlens: `(sequences + 1,)` int32, packs batch 1.
        return_logits: None returns them unless labels are given to a head that predicts every token.
        """
        stride = getattr(self.encoder, "stride", 1)
        if stride != 1:
            if cu_seqlens is not None:
                raise ValueError("An encoder that shortens its input cannot take packed sequences; pad them instead.")
            mask = None if mask is None else mask[:, ::stride]
        x = self.encoder(inputs, condition, cu_seqlens)
        more = {} if mask is None or not getattr(self.backbone, "takes_mask", False) else {"mask": mask}
        x = self.backbone(x, state=state, cu_seqlens=cu_seqlens, return_state=return_state, **more)
        x, new_state = x if return_state else (x, None)
        if return_logits is None:
            return_logits = labels is None or not self.head.per_token
        loss, logits = self.head(x, labels, mask, cu_seqlens, return_logits)
        return ModelOutput(loss, logits, new_state)

    def init_state(self, batch_size: int, max_length: int | None = None) -> list[Any]:
        """The state before the first position: one a layer; see `Mixer.init_state`."""
        return self.backbone.init_state(batch_size, max_length)

    @torch.no_grad()
    def step_(self, inputs: Tensor, state: list[Any], condition: Tensor | None = None) -> Tensor:
        """One position: inputs `(batch,)` ids or `(batch, channels)`; changes the state in place.

        Returns logits `(batch, vocab_size)` fp32.
        """
        x = self.encoder(inputs[:, None], condition)
        x = self.backbone.step_(x, state)
        _, logits = self.head(x)
        assert logits is not None
        return logits[:, -1]

    def n_parameters(self) -> int:
        """Number of parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.parameters())


def causal_lm(
    vocab_size: int,
    d_model: int,
    n_layers: int,
    mixer: str = "mamba",
    *,
    n_conditions: int = 0,
    tie_embeddings: bool = True,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    checkpoint: bool = False,
    chunk_length: int | None = None,
    cuda_graph: bool = False,
    pattern: list[str] | None = None,
    mlp: bool | None = None,
    mixers: dict[str, dict[str, Any]] | None = None,
    **mixer_options: Any,
) -> SequenceModel:
    """The usual language model over tokens: embedding, residual stack (see `ResidualStack`), tied head.

    mixer_options: of `mixer`; mixers: those of the other mixers in the pattern, and of the MLP.

    >>> model = causal_lm(vocab_size=256, d_model=64, n_layers=2)
    >>> model(torch.zeros(1, 8, dtype=torch.long)).logits.shape
    torch.Size([1, 8, 256])
    """
    return build_model(
        {
            "d_model": d_model,
            "tie_embeddings": tie_embeddings,
            "encoder": {"name": "tokens", "vocab_size": vocab_size, "n_conditions": n_conditions},
            "backbone": {
                "name": "residual",
                "n_layers": n_layers,
                "norm_eps": norm_eps,
                "dropout": dropout,
                "checkpoint": checkpoint,
                "chunk_length": chunk_length,
                "cuda_graph": cuda_graph,
                "pattern": pattern,
                "mlp": mlp,
            },
            "mixer": {"name": mixer, **mixer_options},
            "mixers": mixers or {},
            "head": {"name": "lm", "vocab_size": vocab_size},
        }
    )


def build_model(spec: dict[str, Any]) -> SequenceModel:
    """The model of a plain description: `d_model`, `tie_embeddings`, and `encoder`, `backbone`, `mixer`, `head`, each
    `{"name": ..., **options}` with names that `Registry.get` takes; where the backbone has more mixers than
    one, `mixers`, `{name: options}` of the others.

    Raises ConfigError for a name that does not exist, options that a part does not take, and options of mixers that
    the backbone does not have.
    """
    d_model = spec["d_model"]
    _check_mixers(spec)

    def make_mixer(layer: int, name: str | None = None, d_model: int = d_model) -> Mixer:
        own: str = spec["mixer"]["name"]
        name = own if name is None else name
        options = spec["mixer"] if name == own else spec.get("mixers", {}).get(name, {})
        return _make("mixer", {**options, "name": name}, d_model)

    backbone = _make("backbone", spec["backbone"], make_mixer)
    encoder, head = (_make(kind, spec[kind], d_model) for kind in ("encoder", "head"))
    model = SequenceModel(encoder, backbone, head, tie_embeddings=spec.get("tie_embeddings", False))
    model.spec = spec
    return model


def _make(kind: str, settings: dict[str, Any], *args: Any) -> Any:
    """A part of a model: settings are its name and options."""
    options = {key: value for key, value in settings.items() if key != "name"}
    part = catalog()[f"{kind}s"].get(settings["name"])
    parameters = inspect.signature(part).parameters
    takes = list(parameters)[len(args) :]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in () if open_ended else options.keys() - set(takes):
        raise ConfigError(
            f"The {kind} {settings['name']!r} has no option {key!r}.{did_you_mean(key, takes)} "
            f"It has: {', '.join(takes) or 'none'}."
        )
    try:
        return part(*args, **options)
    except TypeError as error:
        raise ConfigError(f"The {kind} {settings['name']!r} cannot be made of {options}: {error}.") from error


def _check_mixers(spec: dict[str, Any]) -> None:
    """Raise ConfigError for options of mixers that the backbone does not have, and for those of the model's own mixer
    in the wrong place."""
    given, backbone = spec.get("mixers") or {}, spec["backbone"]
    names = mixer_names(backbone.get("pattern"), spec["mixer"]["name"], backbone.get("mlp"), catalog()["mixers"].get)
    check_mixer_options(given, spec["mixer"]["name"], names)


def check_mixer_options(given: Iterable[str], mixer: str, names: list[str]) -> None:
    """Raise ConfigError for names in `model.mixers` that are not among those of the backbone's mixers, `names`, or are
    that of the model's own, `mixer`."""
    for name in given:
        if name == mixer:
            raise ConfigError(f"The options of {name!r} are under model.mixer and model.mixers. Keep model.mixer's.")
        if name not in names:
            raise ConfigError(
                f"model.mixers has options for {name!r}, which is no mixer of this backbone."
                f"{did_you_mean(name, names)} Its mixers: {', '.join(names)}; model.backbone.pattern names others."
            )
