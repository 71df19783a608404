"""The decode loop: one prefill over the prompt, then one step a token in constant memory."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq.errors import ConfigError
from mambaseq.generation.decoder import Decoder
from mambaseq.generation.sampling import sample
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel

# New tokens from which a CUDA graph is worth its capture.
_WORTH_A_GRAPH = 16
# Tokens after which it is looked whether all sequences have ended: on a GPU looking means waiting for it.
_TOKENS_A_LOOK = {"cuda": 8}


@torch.no_grad()
def generate(
    model: SequenceModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    condition: Tensor | None = None,
    stop_ids: Collection[int] = (),
    progress: bool = False,
    cuda_graph: bool = True,
) -> Tensor:
    """Continue prompts.

    Args:
        prompt: `(batch, prompt_length)` int64, at least one token each.
        max_new_tokens: tokens to add. temperature: 0 is greedy. top_k: 0 is all. top_p: 1 is all.
        seed: makes the result a function of model, prompt and settings.
        condition: `(batch,)` int64 for conditional models.
        stop_ids: ids after which a sequence ends; ended sequences are filled with the stop id.
        progress: show a bar.
        cuda_graph: on a CUDA device, replay the steps from a CUDA graph where there can be one (see `Decoder`).

    Returns:
        `(batch, prompt_length + n)` int64, n at most max_new_tokens.

    Raises:
        ConfigError: an empty prompt, settings out of range, or a model that is not causal or has no lm head.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ConfigError("Generation needs a prompt of at least one token for each sequence.")
    if not model.backbone.causal or not model.head.per_token:
        raise ConfigError(
            "Only a causal model with an lm head can generate; this one cannot. Train one with the head lm and a "
            "causal backbone, such as residual or unet."
        )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0, not {max_new_tokens}.")
    generator = None if seed is None else torch.Generator(device=prompt.device).manual_seed(seed)
    out = [prompt]
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    all_ended: list[Tensor] = []  # after each token since the last look
    tokens_a_look = _TOKENS_A_LOOK.get(prompt.device.type, 1)
    was_training = model.training
    model.eval()
    try:
        state, logits = _prefill(model, prompt, condition)
        decoder = Decoder(model, state, condition, cuda_graph=cuda_graph and max_new_tokens >= _WORTH_A_GRAPH)
        with tqdm(total=max_new_tokens, unit="token", disable=not progress) as bar:
            for i in range(max_new_tokens):
                token = sample(logits, temperature, top_k, top_p, generator)
                if stop_ids:
                    token = torch.where(ended, out[-1][:, -1], token)
                out.append(token[:, None])
                bar.update()
                if stop_ids:
                    for stop in stop_ids:
                        ended |= token == stop
                    all_ended.append(ended.all())
                    if len(all_ended) == tokens_a_look or i + 1 == max_new_tokens:
                        flags = torch.stack(all_ended).tolist()
                        if True in flags:
                            del out[len(out) - len(flags) + flags.index(True) + 1 :]
                            break
                        all_ended.clear()
                if i + 1 < max_new_tokens:
                    logits = decoder.step(token)
    finally:
        model.train(was_training)
    return torch.cat(out, dim=1)


def _prefill(model: SequenceModel, prompt: Tensor, condition: Tensor | None) -> tuple[list, Tensor]:
    """State after the prompt and the logits of its last position (only those: a long prompt's would not fit)."""
    x = model.encoder(prompt, condition)
    hidden, state = model.backbone(x, return_state=True)
    state = [layer.map(Tensor.contiguous) if isinstance(layer, State) else layer for layer in state]
    _, logits = model.head(hidden[:, -1:])
    return state, logits[:, -1]
