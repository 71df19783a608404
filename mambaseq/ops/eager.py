"""Whether an op may go past PyTorch's operators: to kernels of its own, or past their wrappers, which cost more than a
short kernel does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_only_reference = False


def constant_to_compilers(function: Any) -> Any:
    """What the function gives is a constant to `torch.compile`, which does not trace it. All that
    `torch.compiler.assume_constant_result` does, without the compiler, whose import takes as long as PyTorch's own."""
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def only_reference() -> Iterator[None]:
    """Every op, step and block is computed as it is defined (the backend "reference"), whatever a model asks for: in
    PyTorch's own operators, which is what an exported graph then holds. Slow, and for the whole process."""
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before


def wants_reference() -> bool:
    """Whether `only_reference` is in force."""
    return _only_reference


def has_kernels() -> bool:
    """Whether values are there for kernels of ours to be run on: nothing is compiled, and they are not put off."""
    return not (_only_reference or torch.compiler.is_compiling())


def is_exporting() -> bool:
    """Whether a graph is made that is to serve other inputs, by operators of ours (see `operators.exported`)."""
    return torch.compiler.is_exporting() and not _only_reference


def is_eager(*values: Any) -> bool:
    """Whether plain tensors are computed with, which nobody watches: no compiler, no tensors without numbers."""
    return has_kernels() and all(type(value) in (Tensor, Parameter) for value in values if isinstance(value, Tensor))
