"""Numbers that a GPU has still to compute."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A number on its way from a device to the host, which may go on meanwhile.

    number: of one element. On a GPU it is copied on the stream of now.
    """

    def __init__(self, number: Tensor) -> None:
        self._number, self._there = number.detach(), None
        if number.is_cuda:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number.detach(), non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> float:
        """Waits until the device has computed it."""
        if self._there is not None:
            self._there.synchronize()
        return float(self._number)
