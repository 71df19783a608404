"""Caduceus (Schiff et al., arXiv:2403.03234) as a model of ours: -Ph, which reads both ways, and -PS, which also treats
both strands alike.

Its halves for the two strands are ours, except that the second one's channels run backwards there. With fused norms
(`fused_add_norm`) the published code of -PS gives each layer the halves of the one before in exchanged places: the
strands then pass through every other layer turned, that is, with time and channels reversed. A turned layer is one with
its directions exchanged and its channels reversed, so weights alone make up for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.errors import shown
from mambaseq_dna.published.settings import Imported, Settings, Tensors, built, order_of_ids

# on a trained model's outputs; `layer` is checked by itself
_WITHOUT_EFFECT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "layer"}
_PAIRS = {7: 10, 8: 9, 9: 8, 10: 7}  # A and T, C and G


def read_caduceus(config: dict[str, Any], path: Path, tensors: dict[str, Tensor], source: Path) -> Imported:
    """A Caduceus for masked language modelling. path: of the configuration. source: of the tensors.

    Raises UserError for settings and tensors that are not those of such a model.
    """
    settings, given = Settings(config, path), Tensors(tensors, source)
    strands = settings.flag("rcps", False)
    both_ways = settings.flag("bidirectional", True)
    fused = settings.flag("fused_add_norm", True)
    layers, width = settings.layers("n_layer"), settings.whole("d_model")
    size = settings.vocabulary()
    if strands and fused and not both_ways:
        raise settings.wrong(
            "fused_add_norm",
            "is true of a model with rcps that reads one way: its published code then turns time around in every other "
            "layer, which no model of ours does",
        )
    reader = _Reader(settings, given, width, layers, strands, both_ways, fused)
    rows = order_of_ids(size, masked=True)
    ours = reader.layers_()
    stem = "caduceus.backbone.embeddings.word_embeddings"
    embedding = f"{stem}.embedding.weight" if strands else f"{stem}.weight"
    output = "lm_head.lm_head.weight" if strands else "lm_head.weight"
    tied = strands or settings.flag("tie_word_embeddings", True)
    if tied:
        table = head = given.one_of([embedding, output], (size, width))
    else:
        table, head = (given.take(name, (size, width)) for name in (embedding, output))
    ids: dict[str, Any] = {"vocab_size": size}
    if strands:
        theirs = _complement(settings, given, size)
        ids["complement"] = [rows.index(theirs[number]) for number in rows]
        if fused and layers % 2:  # the halves end in exchanged places
            table, tied = table[theirs].flip(1), False
    given.finish()
    ours["encoder.embedding.weight"] = table[rows]
    if not tied:
        ours["head.linear.weight"] = head[rows]
    backbone: dict[str, Any] = {"n_layers": layers, **reader.norm}
    if both_ways:
        backbone |= reader.ways
    name = "reverse_complement" if strands else "bidirectional" if both_ways else "residual"
    if strands and not both_ways:
        backbone["bidirectional"] = False
    spec = {
        "d_model": width,
        "tie_embeddings": tied,
        "encoder": {"name": "rc_tokens" if strands else "tokens", **ids},
        "backbone": {"name": name, **backbone},
        "mixer": {"name": "mamba", **reader.mixer},
        "head": {"name": "rc_lm" if strands else "lm", **ids},
    }
    notes = []
    if strands and fused:
        notes.append(
            "fused_add_norm is true: as in the published code on a GPU, every other layer sees its strands turned; the "
            "imported weights make up for that"
        )
    kind = f"Caduceus-{'PS' if strands else 'Ph'}"
    return Imported(kind, built(spec, ours, path, source), "masked", notes=notes)


class _Reader:
    """The layers' settings and tensors."""

    def __init__(
        self, settings: Settings, given: Tensors, width: int, layers: int, strands: bool, both_ways: bool, fused: bool
    ) -> None:
        self.given, self.width, self.layers = given, width, layers
        self.strands, self.both_ways, self.fused = strands, both_ways, fused
        ssm = settings.under("ssm_cfg")
        self.mixer: dict[str, Any] = {
            "d_state": ssm.whole("d_state", 16),
            "d_conv": ssm.whole("d_conv", 4),
            "expand": ssm.whole("expand", 2),
            "dt_rank": "auto" if ssm.values.get("dt_rank", "auto") == "auto" else ssm.whole("dt_rank"),
            "conv_bias": ssm.flag("conv_bias", True),
            "bias": ssm.flag("bias", False),
        }
        if others := sorted(ssm.values.keys() - self.mixer.keys() - _WITHOUT_EFFECT):
            raise ssm.wrong(others[0], "is no setting of a Mamba that can be loaded")
        ssm.only("layer", "Mamba1")
        self.layer_norm = not settings.flag("rms_norm", True)
        self.norm = {
            "norm": "layer" if self.layer_norm else "rms",
            "norm_eps": settings.number("norm_epsilon", 1e-5),
        }
        strategy = settings.values.get("bidirectional_strategy") or "add"
        if strategy not in ("add", "ew_multiply"):
            raise settings.wrong("bidirectional_strategy", f"must be add or ew_multiply, not {shown(strategy)}")
        self.tied = settings.flag("bidirectional_weight_tie", True)
        self.ways = {"tie_projections": self.tied, "combine": "add" if strategy == "add" else "multiply"}

    def layers_(self) -> dict[str, Tensor]:
        """Tensors of the backbone by our names."""
        found: dict[str, Tensor] = {}
        theirs = "caduceus.backbone."
        ours = "backbone.stack." if self.strands else "backbone."
        within = "submodule." if self.strands and not self.fused else ""
        for number in range(self.layers):
            layer = f"{theirs}layers.{number}."
            norm = self._norm(f"{layer}norm.{within}")
            mixer = f"{layer}mixer.{'submodule.' if self.strands else ''}"
            stems = [f"{mixer}mamba_fwd.", f"{mixer}mamba_rev."][: 1 + self.both_ways]
            ahead, *others = [self._mamba(stem, stems) for stem in stems]
            back = others[0] if others else None
            if self.strands and self.fused and number % 2 == self.layers % 2:
                norm = {name: tensor.flip(0) for name, tensor in norm.items()}
                assert back is not None
                ahead, back = _turned(back), _turned(ahead)
            own = f"{ours}layers.{number}."
            found |= {f"{own}norm.{name}": tensor for name, tensor in norm.items()}
            found |= {f"{own}{'mixer' if back is None else 'ahead'}.{name}": tensor for name, tensor in ahead.items()}
            for name, tensor in (back or {}).items():
                if not (self.tied and name.startswith(("in_proj.", "out_proj."))):
                    found[f"{own}back.{name}"] = tensor
        last = self._norm(f"{theirs}norm_f.{within}")
        return found | {f"{ours}norm_f.{name}": tensor for name, tensor in last.items()}

    def _norm(self, stem: str) -> dict[str, Tensor]:
        names = ("weight", "bias") if self.layer_norm else ("weight",)
        return {name: self.given.take(f"{stem}{name}", (self.width,)) for name in names}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        width, inner, states = self.width, self.mixer["expand"] * self.width, self.mixer["d_state"]
        rank = self.mixer["dt_rank"]
        rank = -(-width // 16) if rank == "auto" else rank
        shapes: dict[str, tuple[int, ...]] = {
            "A_log": (inner, states),
            "D": (inner,),
            "in_proj.weight": (2 * inner, width),
            "conv1d.weight": (inner, 1, self.mixer["d_conv"]),
            "x_proj.weight": (rank + 2 * states, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "out_proj.weight": (width, inner),
        }
        if self.mixer["conv_bias"]:
            shapes["conv1d.bias"] = (inner,)
        if self.mixer["bias"]:
            shapes |= {"in_proj.bias": (2 * inner,), "out_proj.bias": (width,)}
        return shapes

    def _mamba(self, stem: str, stems: list[str]) -> dict[str, Tensor]:
        """One direction's mixer. stems: of both; safetensors have once what these share."""
        found = {}
        for name, shape in self._shapes().items():
            shared = self.tied and name.startswith(("in_proj.", "out_proj."))
            found[name] = self.given.one_of([f"{one}{name}" for one in (stems if shared else [stem])], shape)
        return found


def _turned(mamba: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block that reads and writes its channels backwards."""
    dims = {"in_proj.weight": 1, "out_proj.weight": 0, "out_proj.bias": 0}
    return {name: tensor.flip(dims[name]) if name in dims else tensor for name, tensor in mamba.items()}


def _complement(settings: Settings, given: Tensors, size: int) -> list[int]:
    """The partner of each of their ids. The buffers beside the weights count, as in the published code, which orders
    the configuration's by place; without buffers the configuration's ids do."""
    names = ["caduceus.backbone.embeddings.word_embeddings.complement_map", "lm_head.complement_map"]
    buffers = [given.optional(name, (size,)) for name in names]
    if buffers[0] is not None:
        given.one_of([name for name, buffer in zip(names, buffers, strict=True) if buffer is not None], (size,))
        found = [int(number) for number in buffers[0]] if buffers[0].dtype == torch.int64 else []
        where = f"{given.source}: {names[0]}"
    else:
        told = settings.under("complement_map").values
        found = [told.get(str(number), number) for number in range(size)]
        where = f"{settings.path}: complement_map"
    wanted = [_PAIRS.get(number, number) for number in range(size)]
    if found != wanted:
        raise settings.wrong(
            "complement_map",
            f"does not pair the ids of A (7) and T (10), and C (8) and G (9), all others with themselves (in {where})",
        )
    return found
