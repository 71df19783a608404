"""When training steps are captured without being asked for: `cuda_graph: auto`.

Only where a replay cannot differ from a call, where it is of use, and where there is memory for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambaseq.ops.gpu import capture

EAGER_CALLS = 4  # with a shape before its capture; twice as many each time that another shape takes its place
MOST_POSITIONS = 32_768  # of a batch: the kernels of a longer one take longer than their launches
_KNOWN = ("mambaseq", "torch")  # packages whose modules do nothing on the host that a replay would leave out


class Automatic:
    """When to capture; one shape at a time, since each holds the activations of a step."""

    def __init__(self) -> None:
        self.eager_calls = EAGER_CALLS

    def is_of_use(self, x: Tensor) -> bool:
        """Whether replays of this call would be faster, and one may be made now. x `(batch, length, d_model)`.

        Not with several processes: they reduce gradients while others are still computed, and a replay gives all at its
        end.
        """
        if x.shape[0] * x.shape[1] > MOST_POSITIONS or capture.capturing.locked():
            return False
        distributed = torch.distributed
        return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def is_safe(module: nn.Module) -> bool:
    """Whether a replay gives what a call does, bit for bit.

    False with modules of other packages than ours and torch's, and with a `forward` put into one: they may do something
    on the host. False with dropout, whose random numbers are others in a replay: a run that was interrupted and resumed
    would not end as one that was not.
    """
    return all(
        type(one).__module__.partition(".")[0] in _KNOWN
        and "forward" not in vars(one)
        and not (isinstance(one, nn.Dropout) and one.p > 0 and one.training)
        for one in module.modules()
    )


@contextlib.contextmanager
def leaving_room() -> Iterator[None]:
    """Around a capture: raises RuntimeError where less memory is left than it took."""
    torch.cuda.empty_cache()  # what was kept for activations, for which the graphs have memory of their own
    before = torch.cuda.memory_reserved()
    yield
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved() - before:
        raise RuntimeError("CUDA graphs leave too little memory")
