"""Models: an encoder, a backbone and a head."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq import parallel
from mambaseq.backbones.base import Backbone
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.patterns import mixer_names
from mambaseq.batch import Batch
from mambaseq.domain import catalog
from mambaseq.encoders import TokenEncoder, output_bounds
from mambaseq.errors import ConfigError, cut_list, did_you_mean, shown
from mambaseq.heads.distributions import Distribution
from mambaseq.heads.lm import LMHead
from mambaseq.mixers.base import Mixer
from mambaseq.specs import check_layers, check_options, check_size, check_spec, largest_setting, registered
from mambaseq.trees import register_tree


@dataclasses.dataclass
class ModelOutput:
    """loss: scalar, if labels were given. logits: None if only the loss was needed. state: one for each layer.
    distribution: of the next values, by the logits of a head such as `forecast`.

    Names and numbers index it, as in outputs of transformers. What is None is left out, so `output[0]` is the loss, or
    the logits if no labels were given. Iterating gives the names. `values` is not a method here.

    >>> output = ModelOutput(logits=torch.zeros(1, 2, 3))
    >>> list(output), output["logits"].shape, len(output[1:])
    (['logits'], torch.Size([1, 2, 3]), 0)
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: list[Any] | None = None
    distribution: Distribution | None = None

    def keys(self) -> list[str]:
        """The names of what is not None."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of what is not None."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None."""
        return tuple(value for _, value in self.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        """Raises KeyError or IndexError for a name or number of what is missing."""
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    @property
    def values(self) -> Tensor | None:
        """The predicted values of a head that learns values, one for each target, in the targets' shape."""
        return self.logits if self.distribution is None else self.distribution.point()


register_tree(ModelOutput)


class SequenceModel(nn.Module):
    """Encoder, backbone, head.

    An encoder may have a `stride`: its output then has a position for every `stride`-th input, and the head must be one
    of whole sequences. A head of positions may have one: see `Batch.stride`. What parts declare of themselves is relied
    on (see `Encoder`, `Backbone`, `Head`).
    spec: the plain description from which `build_model` makes an equal model; it is saved with the weights.

    A tensor with several names (a tied head's, a shared mixer's) is in a state dict once, under its first name, as
    safetensors requires. A state dict to load may have it under any or all of them.
    """

    main_input_name: ClassVar[str] = "inputs"  # transformers' Trainer asks for it

    def __init__(self, encoder: nn.Module, backbone: Backbone, head: nn.Module, tie_embeddings: bool = False) -> None:
        super().__init__()
        self.encoder, self.backbone, self.head = encoder, backbone, head
        self.tie_embeddings = tie_embeddings
        self.spec: dict[str, Any] | None = None
        strands = [getattr(part, "strands", 1) for part in (encoder, backbone, head)]
        if len(set(strands)) > 1:
            raise ConfigError(
                f"Encoder, backbone and head have {strands[0]}, {strands[1]} and {strands[2]} strands. The backbone "
                "reverse_complement needs the encoder rc_tokens and the head rc_lm or rc_classification, and they "
                "need it."
            )
        if self.stride != 1 and getattr(head, "per_token", False):
            raise ConfigError(
                f"The encoder {type(encoder).__name__} gives one position for {self.stride} inputs (stride), but the "
                f"head {type(head).__name__} answers for each input. Set model.encoder.stride to 1, or choose a head "
                "of whole sequences, such as 'classification'."
            )
        if tie_embeddings:
            if not isinstance(encoder, TokenEncoder) or not isinstance(head, LMHead):
                raise ConfigError("tie_embeddings needs a token encoder and an lm head.")
            if encoder.embedding.weight.shape != head.linear.weight.shape:
                raise ConfigError(
                    f"tie_embeddings needs a table with a row for each token that the head predicts, but the encoder "
                    f"{type(encoder).__name__} has others. Set model.tie_embeddings to false."
                )
            head.linear.weight = encoder.embedding.weight

    @property
    def stride(self) -> int:
        """Inputs to a position of the backbone."""
        return getattr(self.encoder, "stride", 1)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See `nn.Module.state_dict`; a tensor's further names are left out."""
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in further_names(self):
            found.pop(prefix + name, None)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # submodules look for their tensors later, in the same dict, and would report missing names
        for names in _shared(self):
            given = [prefix + name for name in names if prefix + name in state_dict]
            for name in names if given else ():
                state_dict.setdefault(prefix + name, state_dict[given[0]])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_stateful(self) -> None:
        """Raise ConfigError for an encoder or a head that cannot be run in parts."""
        if getattr(self.head, "stride", 1) != 1:
            raise ConfigError(
                f"The head {type(self.head).__name__} gives one answer for {self.head.stride} positions "
                "(model.head.stride), so no sequence can be continued: it can neither return nor take a state. Run it "
                "over whole sequences."
            )
        if not getattr(self.encoder, "position_wise", False):
            raise ConfigError(
                f"The encoder {type(self.encoder).__name__} does not declare that a position sees only its own input "
                "(position_wise), so no sequence can be continued: it can neither generate nor return or take a "
                "state. Declare position_wise = True if it holds, or use another encoder."
            )

    def check_splits_time(self, padded_states: bool = False) -> None:
        """Raise ConfigError for a part that needs whole sequences, so that these cannot be split over ranks along time
        (see `mambaseq.parallel`)."""
        check = getattr(self.backbone, "check_splits_time", None)
        if check is not None:
            check()
        encoder, head = self.encoder, self.head
        needing = []
        if not getattr(encoder, "position_wise", False) or self.stride != 1:
            needing.append(f"The encoder {type(encoder).__name__}")
        if not getattr(head, "position_wise", False) and not getattr(head, "splits_time", False):
            needing.append(f"The head {type(head).__name__}")
        for one in needing:
            raise ConfigError(
                f"{one} does not declare that what it makes of a position depends on nothing else (position_wise), so "
                "sequences cannot be split over ranks (context parallel). Use another one, such as 'tokens' and 'lm', "
                "or one rank."
            )
        if padded_states:
            raise ConfigError(
                "States of padded sequences are those at each row's own end, for which sequences that are split over "
                "ranks (context parallel) must be packed (cu_seqlens) instead."
            )

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        condition: Tensor | None = None,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        return_logits: bool | None = None,
    ) -> ModelOutput:
        """Run the model.

        inputs: `(batch, length)` int64 ids or `(batch, length, channels)` float; right padding only.
        labels: what the head learns (see `Batch.targets`). Next tokens are already shifted; those of transformers
            models are not.
        mask: `(batch, length)` bool of real positions. condition: `(sequences,)` int64 (see `Batch`).
        attention_mask: the mask of a transformers tokenizer, `(batch, length)` of ones and zeros. Its values are always
            checked, because these tokenizers may pad on the left.
        state: list of one state a layer, as returned. cu_seqlens: `(sequences + 1,)` int32, packs batch 1.
        return_state: also return the states; with a mask those at each row's own end, for which the host reads the
            mask.
        return_logits: None returns them unless labels are given to a head that predicts every token.

        Raises ConfigError if encoder or backbone cannot do what is asked, ValueError for an invalid mask: of another
        shape, together with cu_seqlens, or not right padding (its values are checked where that is free, or the states
        depend on them).
        """
        untrusted = attention_mask is not None
        if attention_mask is not None:
            if mask is not None:
                raise ValueError("mask and attention_mask are the same; give one of them.")
            mask = attention_mask != 0
        if mask is not None:
            if cu_seqlens is not None or mask.shape != inputs.shape[:2]:
                raise ValueError(
                    "A mask must have the inputs' shape (batch, length), and the inputs must not be packed."
                )
            if untrusted or return_state or (mask.device.type == "cpu" and not torch.compiler.is_compiling()):
                _check_right_padding(mask)
        if state is not None or return_state:
            self.check_stateful()
        part = parallel.current()
        if part is not None:
            self.check_splits_time(mask is not None and return_state)
        x = self.encoder(inputs, condition, cu_seqlens, **self.given_mask(self.encoder, "encoder", mask))
        if self.stride != 1:
            mask = None if mask is None else mask[:, :: self.stride]
            cu_seqlens = None if cu_seqlens is None else output_bounds(cu_seqlens, self.stride)
        new_state = None
        if mask is not None and return_state:
            x, new_state = self._run_rows(x, mask, state)
        else:
            more = self.given_mask(self.backbone, "backbone", mask)
            x = self.backbone(x, state=state, cu_seqlens=cu_seqlens, return_state=return_state, **more)
            x, new_state = x if return_state else (x, None)
        if return_logits is None:
            return_logits = labels is None or not self.head.per_token
        loss, logits = self.head(x, labels, mask, cu_seqlens, return_logits)
        if part is not None and loss is not None:
            loss = part.context.mean(loss, Batch(inputs, labels).n_targets)
        distribution = getattr(self.head, "distribution", None)
        told = None if logits is None or distribution is None else distribution(logits)
        return ModelOutput(loss, logits, new_state, told)

    @staticmethod
    def given_mask(part: nn.Module, kind: str, mask: Tensor | None) -> dict[str, Tensor]:
        """Arguments for encoder or backbone: the mask if it takes one, none if it is causal. Raises ConfigError
        otherwise."""
        if mask is None:
            return {}
        if getattr(part, "takes_mask", False):
            return {"mask": mask}
        if not getattr(part, "causal", False):
            raise ConfigError(
                f"The {kind} {type(part).__name__} does not declare that it is causal and takes no mask, so it would "
                "see the padding after a sequence. Declare causal = True if a position sees nothing after it, or let "
                "it take the mask (takes_mask = True)."
            )
        return {}

    def _run_rows(self, x: Tensor, mask: Tensor, state: list[Any] | None) -> tuple[Tensor, list[Any]]:
        """Run the backbone over the real positions of each row, as packed sequences, so that states are those at each
        row's own end. Padding gives zeros."""
        bounds = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        y, new_state = self.backbone(x[mask][None], state=state, cu_seqlens=bounds, return_state=True)
        return y.new_zeros(*mask.shape, y.shape[-1]).masked_scatter(mask[..., None], y), new_state

    def init_state(self, batch_size: int, max_length: int | None = None) -> list[Any]:
        """The state before the first position, one for each layer; see `Mixer.init_state`."""
        return self.backbone.init_state(batch_size, max_length)

    @torch.no_grad()
    def step_(
        self, inputs: Tensor, state: list[Any], condition: Tensor | None = None, whole: int | None = None
    ) -> Tensor:
        """One position: inputs `(batch,)` ids, `(batch, codes)` or `(batch, channels)`; changes the state in place.
        whole: for a `unet`, see there.

        Returns logits `(batch, vocab_size)` fp32, or what else the head tells (see `Head.told`).
        """
        return self.told(self._hidden_step_(inputs, state, condition, whole))[:, -1]

    @torch.no_grad()
    def greedy_step_(
        self, inputs: Tensor, state: list[Any], condition: Tensor | None = None, whole: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`step_` for what picks the likeliest token, of heads of one pick a position: the tokens `(batch,)` int64, and
        their logits `(batch,)` fp32, not finite where one of a row is NaN."""
        own = "step_" in vars(self) or type(self).step_ is not SequenceModel.step_
        choose = getattr(self.head, "likeliest", None)  # which a plugin's may not have
        if own or choose is None:
            peak, token = self.step_(inputs, state, condition, *(() if whole is None else (whole,))).max(-1)
            return token, peak
        chosen: tuple[Tensor, Tensor] = choose(self._hidden_step_(inputs, state, condition, whole)[:, -1])
        return chosen

    def _hidden_step_(self, inputs: Tensor, state: list[Any], condition: Tensor | None, whole: int | None) -> Tensor:
        self.check_stateful()
        x = self.encoder(inputs[:, None], condition)
        step: Any = self.backbone.step_
        hidden: Tensor = step(x, state) if whole is None else step(x, state, whole=whole)
        return hidden

    def told(self, hidden: Tensor) -> Tensor:
        """See `Head.told`; the logits of a plugin's head that has no such method."""
        tell = getattr(self.head, "told", None)
        if tell is not None:
            told: Tensor = tell(hidden)
            return told
        _, logits = self.head(hidden)
        assert logits is not None
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model's folder; see `mambaseq.checkpoints.hub.save_pretrained`."""
        _hub().save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> SequenceModel:
        """The model in a folder or on the Hugging Face Hub, in eval mode. `mambaseq.checkpoints.hub.from_pretrained`
        also gives its description and tokenizer."""
        model: SequenceModel = _hub().from_pretrained(source, **options).model
        return model

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model's folder, without a tokenizer; see `mambaseq.checkpoints.hub.push_to_hub`."""
        address: str = _hub().push_to_hub(self, repository, **options)
        return address

    def n_parameters(self) -> int:
        """Number of parameters; a tied weight counts once."""
        return sum(p.numel() for p in self.parameters())


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once, in any order: a few times faster than `modules`, which makes names."""
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            left.extend(module._modules.values())
    return list(found.values())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the block with the model in eval mode, and restores each module's own. A model that is in it already is only
    asked: setting that in every module takes as long as half a prompt."""
    trained = [module for module in modules_of(model) if module.training]
    if trained:
        model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


_PADDING = (
    "The mask must be one of right padding: True up to each row's end, then False. Pad sequences at their ends "
    "(transformers tokenizers: padding_side='right')."
)


def _check_right_padding(mask: Tensor) -> None:
    right = ~(mask[:, 1:] & ~mask[:, :-1]).any()
    if torch.compiler.is_compiling():
        torch._assert_async(right, _PADDING)  # checked in the graph, since there are no values yet
    elif not bool(right):
        raise ValueError(_PADDING)


def _shared(model: nn.Module) -> list[list[str]]:
    """The names of each tensor with several names, in the model's order."""
    names: dict[int, list[str]] = {}
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    return [some for some in names.values() if len(some) > 1]


def further_names(model: nn.Module) -> dict[str, str]:
    """Further names of tensors (a tied head's, those of a shared mixer), each with the tensor's first name."""
    return {name: names[0] for names in _shared(model) for name in names[1:]}


def _hub() -> Any:
    # an upward import: files of models are a layer above, loaded only when used
    return importlib.import_module("mambaseq.checkpoints.hub")


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
    cuda_graph: CudaGraph = "auto",
    pattern: list[str] | None = None,
    mlp: bool | None = None,
    mixers: dict[str, dict[str, Any]] | None = None,
    **mixer_options: Any,
) -> SequenceModel:
    """The usual language model over tokens: embedding, residual stack (see `ResidualStack`), tied head.

    mixer_options: options of `mixer`. mixers: options of the other mixers in the pattern, and of the MLP.

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
    """The model for a plain description: `d_model`, `tie_embeddings`, and `encoder`, `backbone`, `mixer`, `head`, each
    `{"name": ..., **options}` with names that `Registry.get` takes; if the backbone has several mixers, also `mixers`,
    `{name: options}` of the others. A `name` among these options is that of the registered mixer, where the backbone's
    pattern calls it something else.

    It is first made on the meta device, without memory, so that one that is too large is refused before it takes any.
    Raises ConfigError for an incomplete description, a name that does not exist, options that a part does not take or
    of the wrong type, and options of mixers that the backbone does not have; UserError for more layers or parameters
    than `mambaseq.limits` allows.
    """
    check_spec(spec)
    _check_mixers(spec)
    if torch.get_default_device().type != "meta":  # where tensors take no memory
        check_size(*_sized(spec), _largest(spec))
    model = _build(spec)
    model.spec = spec
    return model


def count_parameters(spec: dict[str, Any]) -> int:
    """The number of parameters of a description's model, without making it; a tied weight counts once.

    Raises what `build_model` raises for a model that cannot be made, or with more layers than `mambaseq.limits` allows.
    """
    check_spec(spec)
    _check_mixers(spec)
    return _sized(spec)[0]


def _sized(spec: dict[str, Any]) -> tuple[int, int]:
    """The parameters of a description's model, and the bytes of all its tensors. Equal mixers are made once."""
    made: dict[tuple[str, int], list[Mixer]] = {}
    try:
        with torch.device("meta"):
            parts = [_build(spec, made), *(mixer for alike in made.values() for mixer in alike[1:])]
    except ConfigError as error:
        if isinstance(error.__cause__, RuntimeError | OverflowError | TypeError) and "overflow" in str(error).lower():
            raise ConfigError(
                f"The model ({_largest(spec)}) has more numbers than 64 bits can count. {error}"
            ) from error
        raise
    sizes: dict[int, tuple[int, int]] = {}
    for part in parts:
        if id(part) not in sizes:
            bytes_ = {id(tensor): tensor.nbytes for tensor in (*part.parameters(), *part.buffers())}
            sizes[id(part)] = sum(tensor.numel() for tensor in part.parameters()), sum(bytes_.values())
    found = [sizes[id(part)] for part in parts]
    return sum(count for count, _ in found), sum(size for _, size in found)


def _largest(spec: dict[str, Any]) -> str:
    return largest_setting(spec, lambda kind, name: catalog()[f"{kind}s"].get(name))


def _build(spec: dict[str, Any], made: dict[tuple[str, int], list[Mixer]] | None = None) -> SequenceModel:
    """made: mixers by name and width; one that exists is used again."""
    own: str = spec["mixer"]["name"]
    count = 0

    def make_mixer(layer: int, name: str | None = None, d_model: int = spec["d_model"]) -> Mixer:
        nonlocal count
        count += 1
        check_layers(count)
        name = own if name is None else name
        options = spec["mixer"] if name == own else (spec.get("mixers") or {}).get(name, {})
        alike = [] if made is None else made.setdefault((name, d_model), [])
        alike.append(alike[0] if alike else _make("mixer", {"name": name, **options}, d_model))
        return alike[-1]

    backbone = _make("backbone", spec["backbone"], make_mixer)
    encoder, head = (_make(kind, spec[kind], spec["d_model"]) for kind in ("encoder", "head"))
    return SequenceModel(encoder, backbone, head, tie_embeddings=spec.get("tie_embeddings", False))


def _make(kind: str, settings: dict[str, Any], *args: Any) -> Any:
    """A part of a model: settings are its name and options."""
    options, name = {key: value for key, value in settings.items() if key != "name"}, settings["name"]
    part = catalog()[f"{kind}s"].get(name, f"model.{kind}.name")
    check_options(kind, name, part, options, len(args))
    try:
        return part(*args, **options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # including too deep and too large models
        reason = " ".join(str(error).split()).partition(" Exception raised from")[0][:300]
        width = {"d_model": args[0]} if args and isinstance(args[0], int) else {}
        raise ConfigError(
            f"The {kind} {shown(name)} cannot be made from {shown(width | options)}: {reason}."
        ) from error


def _check_mixers(spec: dict[str, Any]) -> None:
    """Raise ConfigError for options of mixers that the backbone does not have, and for options of the model's own mixer
    in the wrong place."""
    given, backbone = spec.get("mixers") or {}, spec["backbone"]
    mlp, tiers = backbone.get("mlp"), backbone.get("tiers")
    names = mixer_names(
        backbone.get("pattern"),
        spec["mixer"]["name"],
        mlp if isinstance(mlp, bool) else None,
        lambda name: catalog()["mixers"].get(registered(name, given)),
        tiers if isinstance(tiers, list) else None,  # another's may mean something else
    )
    check_mixer_options(given, spec["mixer"]["name"], names)


def check_mixer_options(given: Iterable[str], mixer: str, names: list[str]) -> None:
    """Raise ConfigError for names in `model.mixers` that are not those of the backbone's mixers (`names`), or that are
    the model's own mixer (`mixer`)."""
    for name in given:
        if name == mixer:
            raise ConfigError(
                f"The options of {shown(name)} are under model.mixer and model.mixers. Keep model.mixer's."
            )
        if name not in names:
            raise ConfigError(
                f"model.mixers has options for {shown(name)}, which is not a mixer of this "
                f"backbone.{did_you_mean(name[:80], names)} Its mixers: {cut_list(names)}; model.backbone.pattern "
                "(or a unet's tiers) names others."
            )
