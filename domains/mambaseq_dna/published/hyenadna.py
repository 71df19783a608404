"""HyenaDNA (Nguyen et al., arXiv:2306.15794) as a model of ours, from the folders for transformers (`-hf`).

What its filters are made of at each lag is a table beside the weights. It may have been trained, and even where it was
not, how it was rounded shows in the fifth digit of the outputs. So it is kept (`positions: learned`), and filters end
with it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.errors import UserError, shown
from mambaseq_dna.published.settings import REMEDY, Imported, Settings, Tensors, built, order_of_ids

_EPS = 1e-5  # of the norms in the layers, whatever the configuration says of the last one
_FAST, _SLOW, _DECAYED = 0.3, 1.5, 1e-2  # of the windows, which have no settings there


def read_hyenadna(config: dict[str, Any], path: Path, tensors: dict[str, Tensor], source: Path) -> Imported:
    """A HyenaDNA for next-token prediction. path: of the configuration. source: of the tensors.

    Raises UserError for settings and tensors that are not those of such a model.
    """
    settings, given = Settings(config, path), Tensors(tensors, source)
    layers, width = settings.layers("n_layer"), settings.whole("d_model")
    hidden = 4 * width if settings.values.get("d_inner") is None else settings.whole("d_inner")
    size = settings.vocabulary()
    for key, known, why in (
        ("hyena_order", 2, "the published code runs that alone"),
        ("short_filter_order", 3, "the published code sees the future with more, and only that is loaded"),
        ("num_inner_mlps", 2, "only that can be loaded"),
        ("layer_norm_epsilon", _EPS, "the norms in its layers have that, and ours have one for all"),
    ):
        settings.only(key, known, why)
    rows = order_of_ids(size, masked=False)
    stem = "hyena.backbone."
    embedding = f"{stem}embeddings.word_embeddings.weight"
    tied = settings.flag("tie_word_embeddings", True)
    if tied:
        ours = {"encoder.embedding.weight": given.one_of([embedding, "lm_head.weight"], (size, width))[rows]}
    else:
        names = {"encoder.embedding.weight": embedding, "head.linear.weight": "lm_head.weight"}
        ours = {name: given.take(theirs, (size, width))[rows] for name, theirs in names.items()}
    filters = _Filters(settings, given, width)
    for number in range(layers):
        theirs = f"{stem}layers.{number}."
        mixer, mlp = (f"backbone.layers.{2 * number + offset}." for offset in (0, 1))
        for name, there, shape in (
            (f"{mixer}norm", "norm1", (width,)),
            (f"{mixer}mixer.in_proj", "mixer.in_proj", (3 * width, width)),
            (f"{mixer}mixer.conv1d", "mixer.short_filter", (3 * width, 1, 3)),
            (f"{mixer}mixer.out_proj", "mixer.out_proj", (width, width)),
            (f"{mlp}norm", "norm2", (width,)),
            (f"{mlp}mixer.in_proj", "mlp.fc1", (hidden, width)),
            (f"{mlp}mixer.out_proj", "mlp.fc2", (width, hidden)),
        ):
            ours[f"{name}.weight"] = given.take(f"{theirs}{there}.weight", shape)
            ours[f"{name}.bias"] = given.take(f"{theirs}{there}.bias", shape[:1])
        found = filters.read(f"{theirs}mixer.filter_fn.")
        ours |= {f"{mixer}mixer.{name}": tensor for name, tensor in found.items()}
    for name in ("weight", "bias"):
        ours[f"backbone.norm_f.{name}"] = given.take(f"{stem}ln_f.{name}", (width,))
    given.finish()
    spec = {
        "d_model": width,
        "tie_embeddings": tied,
        "encoder": {"name": "tokens", "vocab_size": size},
        "backbone": {"name": "residual", "n_layers": layers, "norm": "layer", "norm_eps": _EPS},
        "mixer": {
            "name": "hyena",
            "l_max": filters.length,
            "filter_order": filters.width,
            "emb_dim": filters.emb_dim,
            "sine_frequency": filters.frequency,
            "fast_decay": _FAST,
            "slow_decay": _SLOW,
            "positions": "learned",
        },
        "mixers": {"mlp": {"hidden": hidden, "activation": "gelu_tanh", "bias": True}},
        "head": {"name": "lm", "vocab_size": size},
    }
    note = f"its filters end at {filters.length:,} positions"
    return Imported("HyenaDNA", built(spec, ours, path, source), "next_token", filters.length, [note])


class _Filters:
    """The implicit filters: their settings and tensors."""

    def __init__(self, settings: Settings, given: Tensors, d_model: int) -> None:
        self.given, self.d_model = given, d_model
        self.length = settings.whole("max_seq_len", 1024, least=2)
        self.width, self.emb_dim = settings.whole("filter_order", 64), settings.whole("emb_dim", 3)
        if self.emb_dim < 3 or self.emb_dim % 2 == 0:
            raise settings.wrong("emb_dim", f"must be odd and at least 3, not {self.emb_dim}")
        self.frequency = settings.number("activation_freq", 1.0)
        self.trained = settings.flag("train_freq", True)

    def read(self, stem: str) -> dict[str, Tensor]:
        """A layer's tensors by our names in its mixer."""
        width, given = self.width, self.given
        found = {"D": given.take(f"{stem}bias", (self.d_model,))[None]}
        network = f"{stem}implicit_filter."
        for place, name, inputs in ((0, "layers.0", self.emb_dim), (2, "layers.1", width), (4, "layers.2", width)):
            found[f"filter.{name}.weight"] = given.take(f"{network}{place}.weight", (width, inputs))
            found[f"filter.{name}.bias"] = given.take(f"{network}{place}.bias", (width,))
        found["filter.last.weight"] = given.take(f"{network}6.weight", (self.d_model, width))
        found["filter.frequency"] = self._frequency(network)
        # taken before tables of this length are made: weights of it are there
        found["filter.positions"] = given.take(f"{stem}pos_emb.z", (1, self.length, self.emb_dim))[0]
        self._same(f"{stem}pos_emb.t", (1, self.length, 1), torch.linspace(0, 1, self.length)[None, :, None])
        rates = torch.linspace(math.log(_DECAYED) / _SLOW, math.log(_DECAYED) / _FAST, self.d_model)
        self._same(f"{stem}modulation.deltas", (1, 1, self.d_model), rates[None, None])
        return found

    def _frequency(self, network: str) -> Tensor:
        """`(width,)`; the layers of a network share one, which is saved under one or all of their names."""
        if not self.trained:
            return torch.full((self.width,), self.frequency)
        return self.given.one_of([f"{network}{place}.freq" for place in (1, 3, 5)], (1, self.width))[0]

    def _same(self, name: str, shape: tuple[int, ...], expected: Tensor) -> None:
        """Refuse a table of other numbers than those that the published code begins with, and our model has."""
        tensor = self.given.optional(name, shape)
        if tensor is not None and not torch.allclose(tensor.float(), expected, rtol=1e-5, atol=1e-6):
            raise UserError(
                f"{self.given.source}: {shown(name)} is not what the published code makes of its settings, and no "
                f"model of ours has it as a weight. {REMEDY}"
            )
