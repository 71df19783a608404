"""Log-likelihoods of clips by the model that made them, for rejection sampling as published (arXiv:2202.09729)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError
from mambaseq.generation.checks import continues
from mambaseq.runs.devices import memory_told
from mambaseq_audio.io import read_audio
from mambaseq_audio.mulaw import Codec


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """names: of the records. log_p: `(clips,)` float64, of whole clips, in nats. lengths: `(clips,)` samples."""

    names: list[str]
    log_p: np.ndarray
    lengths: np.ndarray


def log_likelihoods(generator: LoadedModel, clips: str | Path) -> Likelihoods:
    """For a folder of sound files, a pattern or a file, each clip read from its first sample on.

    Raises ConfigError for a model that does not generate sounds, or only on a condition: clips of different conditions
    are not ranked by one measure.
    """
    model, card = generator.model, generator.card
    if (
        card.reader != "audio/audio"
        or not isinstance(generator.tokenizer, Codec)
        or len(card.start_ids) != 1
        or not continues(model, "tokens")
    ):
        raise ConfigError(
            f"{generator.source} does not generate sounds sample by sample. --likelihoods needs the run that made the "
            "clips, such as one of audio/digits with --data.condition=[]."
        )
    if card.condition_names or card.conditions:
        raise ConfigError(
            f"{generator.source} generates on a condition, which clips do not tell, and likelihoods given different "
            "conditions are no ranking. Rejection sampling is for unconditional models: train with data.condition: []."
        )
    device = next(model.parameters()).device
    names, log_p, lengths = [], [], []
    with torch.no_grad(), memory_told("the length of the clips"):
        for record in read_audio(clips, generator.tokenizer, **{**card.reader_options, "generated": True}):
            assert record.ids is not None
            targets = torch.from_numpy(record.ids.astype(np.int64)).to(device)
            inputs = torch.cat([targets.new_tensor(card.start_ids), targets[:-1]])
            loss = model(inputs[None], targets[None]).loss
            assert loss is not None
            names.append(record.name)
            log_p.append(-float(loss) * len(targets))
            lengths.append(len(targets))
    return Likelihoods(names, np.array(log_p), np.array(lengths))
