"""SequenceModel: an encoder, a backbone and a head."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq import parallel
from mambaseq.backbones.base import Backbone
from mambaseq.batch import Batch
from mambaseq.encoders import TokenEncoder, output_bounds
from mambaseq.errors import ConfigError
from mambaseq.heads.lm import LMHead
from mambaseq.models.modules import further_names, shared_names
from mambaseq.models.output import ModelOutput

_PADDING = (
    "The mask must be one of right padding: True up to each row's end, then False. Pad sequences at their ends "
    "(transformers tokenizers: padding_side='right')."
)


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

    @property
    def takes_padding(self) -> bool:
        """Whether sequences of different lengths may be padded: encoder and backbone see nothing after a position, or
        take a mask."""
        return all(
            getattr(part, "causal", False) or getattr(part, "takes_mask", False)
            for part in (self.encoder, self.backbone)
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See `nn.Module.state_dict`; a tensor's further names are left out."""
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in further_names(self):
            found.pop(prefix + name, None)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # submodules look for their tensors later, in the same dict, and would report missing names
        for names in shared_names(self):
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
                "sequences cannot be split over ranks (context parallel). Use another, such as the encoder 'tokens' "
                "and the head 'lm', or one rank (model.backbone.context_parallel 1)."
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


def _check_right_padding(mask: Tensor) -> None:
    right = ~(mask[:, 1:] & ~mask[:, :-1]).any()
    if torch.compiler.is_compiling():
        torch._assert_async(right, _PADDING)  # checked in the graph, since there are no values yet
    elif not bool(right):
        raise ValueError(_PADDING)


def _hub() -> Any:
    # an upward import: files of models are a layer above, loaded only when used
    return importlib.import_module("mambaseq.checkpoints.hub")
