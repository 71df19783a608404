"""Continuing signals: next values are drawn from the model's prediction, and read as if observed."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq import limits
from mambaseq.encoders import settled
from mambaseq.errors import ConfigError
from mambaseq.generation.checks import check_finite, continues
from mambaseq.generation.decoder import WORTH_A_GRAPH, Decoder
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import prefill
from mambaseq.generation.sampling import Draws, check_settings
from mambaseq.heads.distributions import Distribution, Point
from mambaseq.limits import check_whole
from mambaseq.models import SequenceModel
from mambaseq.models.modules import evaluating


@torch.no_grad()
def continue_values(
    model: SequenceModel,
    prompt: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    seed: int | None = None,
    condition: Tensor | None = None,
    progress: bool = False,
    cuda_graph: bool = True,
    samples: int = 1,
    numbers: Tensor | None = None,
) -> Tensor:
    """Continue signals by the distributions of a head `forecast`; see `generate`.

    Args:
        prompt: `(batch, prompt_length, channels)` float, at least one step each.
        steps: how many to add. temperature: scales the spread of draws around the mean or median; 0 takes the mean or
            median itself.
        seed, condition, progress, cuda_graph, samples, numbers: see `generate`.

    Returns:
        `(batch * samples, prompt_length + steps, channels)` fp32; a prompt's samples follow each other.

    Raises:
        ConfigError: an empty prompt, settings out of range, or a model that is not causal or does not predict next
            values.
            UserError: more steps or sequences than `limits` allows. NotFinite: values that are not finite numbers.
    """
    if prompt.dim() != 3 or prompt.numel() == 0:
        raise ConfigError("A signal to continue must be (batch, length, channels), with at least one step.")
    if not continues(model, "values"):
        raise ConfigError(
            "Only a causal model that predicts next values can continue a signal; this one cannot. Train one with the "
            "head forecast and a causal backbone, such as residual."
        )
    model.check_stateful()
    check_settings(temperature, 0, 1.0)
    check_whole("steps", steps, 0)
    check_whole("samples", samples, 1)
    limits.SEQUENCES.check(len(prompt) * samples, "Generation")
    limits.GENERATED.check(len(prompt) * samples * steps, "Generation")
    if numbers is not None and numbers.shape != (len(prompt), samples):
        raise ConfigError(f"numbers must be {(len(prompt), samples)}, one a sample, not {tuple(numbers.shape)}.")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    check_whole("seed", seed, 0, 2**63 - 1)
    prompt = prompt.float()
    draws = None if temperature == 0 else Draws(seed, Prompts.of(prompt), condition, samples, numbers, prompt.device)
    every = torch.arange(len(prompt), device=prompt.device).repeat_interleave(samples)
    out = [prompt[every]]
    with evaluating(model):
        condition = settled(model.encoder, condition)
        state, logits = prefill(model, Prompts.of(prompt), condition)
        if samples > 1:
            state, logits = [layer.select(every) for layer in state], logits[every]
            condition = None if condition is None else condition[every]
        decoder = Decoder(model, state, condition, cuda_graph=cuda_graph and steps >= WORTH_A_GRAPH)
        with tqdm(total=steps, unit="step", disable=not progress) as bar:
            for i in range(steps):
                told = distribution(model, logits)
                uniform = None if draws is None else draws.many(prompt.shape[2]).t()
                values = told.point() if uniform is None else told.sample(uniform, temperature)
                if values.shape != out[0][:, 0].shape:
                    raise ConfigError(
                        f"The model reads {prompt.shape[2]} channels but predicts {values.shape[-1]} values, so it "
                        "cannot read them again. Train a head that predicts all channels."
                    )
                out.append(values[:, None].to(torch.float32, copy=True))  # the next step may overwrite the logits
                bar.update()
                if i + 1 < steps:
                    logits = decoder.step(values)
                if i % 64 == 63:
                    check_finite(out[-1])  # what is not finite stays so in all later steps
        check_finite(out[-1])
    return torch.cat(out, dim=1)


def distribution(model: SequenceModel, logits: Tensor) -> Distribution:
    """The head's distribution of the next values `(..., n_channels)`, from what it tells; see its own `distribution`,
    without which logits are the values."""
    make = getattr(model.head, "distribution", None)
    return Point(logits) if make is None else make(logits)
