"""Which `Answer` a model has, by its head and by what it was trained for."""

from __future__ import annotations

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError, shown
from mambaseq.heads.classification import ClassificationHead
from mambaseq.heads.lm import LMHead
from mambaseq.heads.regression import RegressionHead
from mambaseq.runs.answers import Answer, Positions, Sequences
from mambaseq.runs.likelihoods import Likelihood, PseudoLikelihood, PseudoTokens, Tokens


def answer_of(loaded: LoadedModel, window: int | None, each_token: bool = False) -> Answer:
    """The `Answer` of a model. window: tokens read at once, if the user wants another number.
    each_token: the likelihood of each token instead of each record.

    Raises ConfigError, naming model and head, where it is unclear what the head's numbers mean.
    """
    found = _answer_of(loaded, window)
    if not each_token:
        return found
    if not isinstance(found, Likelihood):
        raise ConfigError(
            f"Only a language model gives the likelihood of each token, and the model at {loaded.source} is not one. "
            "Leave --what out."
        )
    return PseudoTokens(loaded, window) if isinstance(found, PseudoLikelihood) else Tokens(loaded, window)


def _answer_of(loaded: LoadedModel, window: int | None) -> Answer:
    card, model = loaded.card, loaded.model
    head, task, names = model.head, card.task, list(card.class_names)
    here = f"The model at {loaded.source} (head {shown(card.spec['head']['name'])})"
    if not head.per_token:
        if task in ("next_token", "masked", "labels"):
            raise ConfigError(
                f"{here} gives one answer a sequence but was trained on one a position ({task}), so its numbers mean "
                "nothing. Train it with a head that fits (`mambaseq list heads`)."
            )
        span = window or card.length or None
        if task == "multilabels":
            return Sequences(loaded, span, names, several=True)
        values = isinstance(head, RegressionHead) or task == "values"
        classes = not values and (task == "classes" or bool(names) or isinstance(head, ClassificationHead))
        return Sequences(loaded, span, names if classes else None)
    if task is None:  # saved by an older version
        next_token = not names and isinstance(head, LMHead) and model.backbone.causal
        task = "labels" if names else "next_token" if next_token else None
    if task in ("labels", "multilabels"):
        return Positions(loaded, window, names, several=task == "multilabels")
    if task == "masked" and loaded.tokenizer is not None:
        return PseudoLikelihood(loaded, window)
    if task == "masked":
        raise ConfigError(
            f"{here} was trained on masked tokens, but its model.json names no tokenizer, so the id of the mask token "
            "is unknown. Embed records with it instead (--what embeddings), or start another run from it "
            "(--init-from)."
        )
    if task in ("values", "next_values"):
        return Positions(loaded, window, None)
    if task == "next_token" and model.backbone.causal and getattr(model.encoder, "causal", False):
        if window == 1:
            raise ConfigError(
                "--window must be at least 2 for a language model, not 1: it predicts from what precedes."
            )
        return Likelihood(loaded, window)
    if task == "next_token":
        raise ConfigError(
            f"{here} was trained for the next token, which its encoder {shown(card.spec['encoder']['name'])} or its "
            f"backbone {shown(card.spec['backbone']['name'])} lets it see, so its bits mean nothing. Train one with "
            "the encoder tokens and a causal backbone, such as residual."
        )
    raise ConfigError(
        f"{here} gives numbers for each position, but its description does not say what they are: it has no class "
        'names and no task. If they are labels, add "task": "labels" to model.json; otherwise train it again.'
    )
