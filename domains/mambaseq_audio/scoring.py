"""`mambaseq audio/score`: generated clips against real ones, by a classifier of ours."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.conditions import composed, parts_of
from mambaseq.data.module import pad_collate
from mambaseq.data.refusals import Refused
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown, typed
from mambaseq.heads.classification import ClassificationHead
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq_audio.io import read_audio
from mambaseq_audio.labelled import item, middle
from mambaseq_audio.likelihoods import log_likelihoods
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.scores import PUBLISHED_BAND, Scores, best_band, kept, log_probabilities, scores

Band = Literal["published", "best"]

_TOKENS = 2**19  # samples that are read together


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What a classifier gives for clips. names: of the records. features: `(clips, features)` float32, what its last
    linear map reads. log_p: `(clips, classes)` float64. sources: the files; empty if they are not known."""

    names: list[str]
    features: np.ndarray
    log_p: np.ndarray
    sources: Sequence[str] = ()

    def only(self, chosen: np.ndarray) -> Recognised:
        """Those of some clips, by their indices."""
        return Recognised(
            [self.names[i] for i in chosen],
            self.features[chosen],
            self.log_p[chosen],
            [self.sources[i] for i in chosen if self.sources],
        )


def recognise(classifier: LoadedModel, clips: str | Path, generated: bool = False) -> Recognised:
    """Features and answers for a folder of sound files, a pattern or a file. Clips are brought to the classifier's rate
    and to mu-law levels; of clips longer than in its training the middle is read. generated: whether a model made them.

    Raises ConfigError for a model that is not a classifier of `audio/labelled`, DataError for files that cannot be
    read, all of them.
    """
    return _read(classifier, [(clips, generated)])[0].recognised(classifier)


class _Clips(NamedTuple):
    """Clips that were read: names of the records, levels `(length,)` of each, files."""

    names: list[str]
    levels: list[np.ndarray]
    sources: list[str]

    def recognised(self, classifier: LoadedModel) -> Recognised:
        return dataclasses.replace(recognise_levels(classifier, self.names, self.levels), sources=self.sources)


def _read(classifier: LoadedModel, sets: Sequence[tuple[str | Path, bool]]) -> list[_Clips]:
    """Sets of clips, each with whether a model made them; see `recognise`."""
    card = classifier.card
    if card.reader != "audio/audio" or not isinstance(classifier.model.head, ClassificationHead):
        raise ConfigError(
            f"{classifier.source} is not a classifier of sounds. Give a run of audio/digit_classifier, or another one "
            "whose dataset is audio/labelled."
        )
    assert isinstance(classifier.tokenizer, MuLaw)
    refused, found = Refused("recordings"), []
    for clips, generated in sets:
        options = {**card.reader_options, "generated": generated, "refuse": refused}
        found.append(_Clips([], [], []))
        for record in read_audio(clips, classifier.tokenizer, **options):
            assert record.ids is not None
            found[-1].names.append(record.name)
            found[-1].sources.append(str(record.source))
            found[-1].levels.append(record.ids)
    refused.check(sum(len(one.names) for one in found))
    return found


def recognise_levels(classifier: LoadedModel, names: list[str], clips: Sequence[np.ndarray]) -> Recognised:
    """The same for clips in mu-law levels at the classifier's rate, `(length,)` integers each; at least one."""
    model, head = classifier.model, classifier.model.head
    assert isinstance(head, ClassificationHead)
    levels = [middle(clip, classifier.card.length) for clip in clips]
    seen: list[Tensor] = []
    features, logits = {}, {}
    hook = head.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad(), memory_told("the number of clips in a call"):
            for members in _batches([len(each) for each in levels]):
                batch = pad_collate([item(levels[i], 0) for i in members]).to(head.linear.weight.device)
                seen.clear()
                found = model(batch.inputs, mask=batch.mask).logits
                for row, i in enumerate(members):
                    features[i], logits[i] = seen[0][row].float().cpu().numpy(), found[row].cpu().numpy()
    finally:
        hook.remove()
    order = range(len(levels))
    return Recognised(
        names, np.stack([features[i] for i in order]), log_probabilities(np.stack([logits[i] for i in order]))
    )


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Clips of similar length together, as many as are at most so many samples with their padding."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not found or (len(found[-1]) + 1) * lengths[i] > _TOKENS:
            found.append([])
        found[-1].append(i)
    return found


def accuracy(clips: Recognised, pattern: str, class_names: Sequence[str]) -> float:
    """The share of clips that are recognised as what their names say: the first named group of a pattern;
    where a name says none, as the condition in the JSON that `generate` writes beside each clip.

    Raises ConfigError for a pattern without one, and where that JSON has several conditions, none of which is called as
    the group; DataError for a name that says no class of the classifier.
    """
    compiled = _compiled(pattern)
    group, right = next(iter(compiled.groupindex)), 0
    for number, (name, answer) in enumerate(zip(clips.names, clips.log_p.argmax(1), strict=True)):
        match = compiled.search(composed(Path(name).name))
        said = match[group] if match else None
        if said not in class_names and clips.sources:
            said = asked_for(Path(clips.sources[number]).with_suffix(".json"), group) or said
        if said not in class_names:
            told = "nothing" if said is None else shown(said)
            raise DataError(
                f"The name of {shown(name)} says {told} by --pattern, which is no "
                f"class of the classifier: {cut_list(class_names)}. Correct the pattern, or rename the clip."
            )
        right += class_names[answer] == said
    return right / len(clips.names)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(composed(pattern))
    except re.error as error:
        raise ConfigError(f"--pattern is not a regular expression ({error}): {typed(pattern)}.") from error
    if not compiled.groupindex:
        raise ConfigError(
            f"--pattern {typed(pattern)} names no group. Write (?P<digit>...) around what is a clip's class."
        )
    return compiled


def asked_for(settings: Path, group: str) -> str | None:
    """What a generated clip was to be, by the settings beside it: the value of a condition of this name, or of the only
    one. None if they do not say. Raises ConfigError where they name others only."""
    try:
        condition = json.loads(settings.read_text(encoding="utf-8"))["condition"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(condition, str):
        return None
    names = re.findall(r"(?:^|\s)([^\s=]+)=", condition)
    _, given = parts_of(condition, names)
    if given and composed(group) not in given:
        raise ConfigError(
            f"{settings} says of its clip {shown(condition)}, and nothing there is called {shown(group)}, the group of "
            f"--pattern.{did_you_mean(group, given)} Call the group as one of these: {cut_list(given)}."
        )
    return composed(given[group] if given else condition)


def score(
    generated: Sequence[str | Path],
    real: str | Path,
    classifier: str | Path,
    *,
    pattern: str | None = None,
    device: str | None = None,
    likelihoods: str | Path | None = None,
    band: Band = "published",
) -> dict[str, dict[str, Any]]:
    """Scores of folders of clips against a folder of real ones: for each name in `generated`, the fields of
    `mambaseq_audio.scores.Scores`, and with a pattern `accuracy` (see there).

    likelihoods: the unconditional run that made the clips. Then there are also the scores of what rejection sampling
        keeps, as "NAME, kept", with the band: see `rejected`.
    """
    if pattern is not None:
        _compiled(pattern)  # before any clip is read
    where = choose_device(device)
    loaded, maker = load_model(classifier, where), None if likelihoods is None else load_model(likelihoods, where)
    read, *made_clips = _read(loaded, [(real, False), *((name, True) for name in generated)])
    truth = read.recognised(loaded)
    found: dict[str, dict[str, Any]] = {}

    def scored(clips: Recognised) -> dict[str, Any]:
        made: Scores = scores(truth.features, truth.log_p, clips.features, clips.log_p)
        values = dataclasses.asdict(made)
        if pattern is not None:
            values["accuracy"] = accuracy(clips, pattern, loaded.card.class_names)
        if min(len(clips.names), len(truth.names)) <= truth.features.shape[1]:
            values["note"] = f"FID is too high: no more clips than features ({truth.features.shape[1]})"
        return values

    for name, these in zip(generated, made_clips, strict=True):
        clips = these.recognised(loaded)
        found[str(name)] = scored(clips)
        if maker is not None:
            chosen, told = rejected(clips, maker, name, band)
            found[f"{name}, kept"] = {**scored(clips.only(chosen)), **told}
    return found


def rejected(clips: Recognised, maker: LoadedModel, name: str | Path, band: Band) -> tuple[np.ndarray, dict[str, Any]]:
    """Rejection sampling as published: the indices of the clips whose likelihood by their own model is in a band of the
    ranking, and what there is to say of it.

    band: "published" keeps what SaShiMi's code does; "best" takes the band with the best inception score on every
        second clip, and keeps what is in it of the others, so that nothing is chosen and scored on the same clips.
    """
    found = log_likelihoods(maker, name)
    if found.names != clips.names:
        raise ConfigError(
            f"The classifier and {maker.source} read {name} as different clips ({len(clips.names)} and "
            f"{len(found.names)}): their data.channels differ. Use clips of one channel."
        )
    told: dict[str, Any] = {}
    if found.lengths.min() != found.lengths.max():
        told["ranked"] = "of different lengths, where short clips are likelier"
    every = np.arange(len(clips.names))
    if band == "published":
        return kept(found.log_p), {"band": list(PUBLISHED_BAND), **told}
    first, second = every[::2], every[1::2]
    best = best_band(found.log_p[first], clips.log_p[first])
    return second[kept(found.log_p[second], best.lower, best.upper)], {"band": [best.lower, best.upper], **told}
