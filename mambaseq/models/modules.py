"""A model's modules and the names of its tensors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from torch import nn


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


def shared_names(model: nn.Module) -> list[list[str]]:
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
    return {name: names[0] for names in shared_names(model) for name in names[1:]}
