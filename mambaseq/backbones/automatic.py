"""When training steps are captured automatically: `cuda_graph: auto`.

Only if a replay cannot differ from a call, is faster, and there is memory for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambaseq.ops.gpu import capture

EAGER_CALLS = 4  # calls with a shape before its capture; doubled each time that another shape replaces it
MOST_POSITIONS = 32_768  # of a batch: in longer ones, kernels take longer than their launches
# of a chunk's input: at 2^24.6, the share of one of two H200s of a chunk of a 130M Mamba, a step took as long by graphs
# (2.25 s at 2^20 positions; 2.26 without), in more memory (20.4 GiB; 18.5), for graphs keep theirs while others are run
MOST_NUMBERS_OF_CHUNKS = 2**24
_KNOWN = ("mambaseq", "torch")  # packages whose modules do nothing on the host that a replay would skip


class Automatic:
    """Decides when to capture; one shape at a time, since each holds the activations of a step."""

    def __init__(self) -> None:
        self.eager_calls = EAGER_CALLS

    def is_of_use(self, x: Tensor) -> bool:
        """Whether replays of this call would be faster, and a capture is possible now. x `(batch, length, d_model)`.

        Not with several processes: they reduce gradients while others are still computed, but a replay gives those of
            many layers at its end.
        """
        return x.shape[0] * x.shape[1] <= MOST_POSITIONS and not capture.capturing.locked() and not has_others()

    def is_of_use_in_chunks(self, shape: torch.Size) -> bool:
        """Whether replays of chunks `(batch, length, d_model)` would be faster: with several processes, too, for their
        gradients come at the end of all anyway."""
        return shape.numel() <= MOST_NUMBERS_OF_CHUNKS


def has_others() -> bool:
    """Whether this process is one of several, which sum their gradients."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_safe(module: nn.Module) -> bool:
    """Whether a replay gives what a call does, bit for bit.

    False with modules of other packages than ours and torch's, and with a replaced `forward`: they may do something on
    the host. False with dropout, whose random numbers differ in a replay: an interrupted and resumed run would end
    differently.
    """
    return all(
        type(one).__module__.partition(".")[0] in _KNOWN
        and "forward" not in vars(one)
        and not (isinstance(one, nn.Dropout) and one.p > 0 and one.training)
        for one in module.modules()
    )


@contextlib.contextmanager
def leaving_room() -> Iterator[None]:
    """Wraps a capture: raises RuntimeError if less memory is left than it took."""
    torch.cuda.empty_cache()  # cached memory for activations, for which graphs have their own
    before = torch.cuda.memory_reserved()
    yield
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved() - before:
        raise RuntimeError("CUDA graphs leave too little memory")
