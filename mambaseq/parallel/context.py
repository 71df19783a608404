"""The ranks that share a sequence, and what they say to each other."""

from __future__ import annotations

import collections
import datetime
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.errors import ConfigError, check_positive
from mambaseq.ops import sequences
from mambaseq.parallel.parts import Part
from mambaseq.parallel.pieces import cut

# bytes of gradients that are summed in one message; tensors in a message begin at multiples of bytes
_BUCKET, _ALIGNED = 2**26, 128


class Like(NamedTuple):
    """What a tensor is that another rank sends."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Gathering:
    """Tensors of all ranks that are on their way."""

    def __init__(self, work: Any, sent: Tensor, found: Tensor, kinds: Sequence[Like]) -> None:
        self._work, self._sent, self._found, self._kinds = work, sent, found, kinds

    def wait(self) -> list[list[Tensor]]:
        """Those of each rank. A GPU waits in its stream, a CPU here."""
        self._work.wait()
        return [_parted(message, self._kinds) for message in self._found]


class Context:
    """The ranks among which every sequence is split along time, in the order of time.

    group: a process group, or a DeviceMesh of one dimension (`mesh["context"]`), of gloo or NCCL.
    timeout: how long a message is waited for before an error is raised, if not as long as the group's own.

    Messages go round a ring, states from each rank to the next and their gradients back. With NCCL the two directions,
    and neighbouring links of the ring, have communicators of their own, so that messages that wait for each other never
    stand in one queue, and what all gather has another one. All ranks of the group must make their Context together.
    """

    def __init__(self, group: Any, timeout: datetime.timedelta | None = None) -> None:
        self.group: Any = group.get_group() if hasattr(group, "get_group") else group
        self.rank: int = self.group.rank()
        self.size: int = self.group.size()
        self._sent: collections.deque[tuple[Any, Tensor]] = collections.deque()
        self._links: dict[tuple[bool, int], Any] = {}
        registered = isinstance(self.group, dist.ProcessGroup)
        if timeout is not None:
            for device in self.group._device_types:
                self.group._get_backend(device)._set_default_timeout(timeout)
        self._makes_links = "nccl" in (dist.get_backend(self.group) if registered else self.group.name())
        self._gathers = self.group
        if self._makes_links and self.size > 1:
            for back in (False, True):
                for colour in range(2 + self.size % 2):
                    # few bytes: what waits for the other rank holds as many processors
                    self._links[back, colour] = self._new_group(timeout, processors=2)
            self._gathers = self._new_group(timeout)
            self._connect(torch.device("cuda", torch.cuda.current_device()))

    def _new_group(self, timeout: datetime.timedelta | None, processors: int | None = None) -> Any:
        """Another communicator of the same ranks. Its kernels come first where others fill the GPU, for a state is
        waited for, and they stand in no queue with sums of gradients, which may wait for another rank meanwhile.
        processors: how many of a GPU's its kernels take at most."""
        # each communicator has messages of one kind, so that it does not matter that they keep their order
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if processors is not None and hasattr(options, "config"):  # which only NVIDIA's library has
            options.config.min_ctas, options.config.max_ctas = 1, processors
        if timeout is not None:
            options._timeout = timeout
        ranks = dist.get_process_group_ranks(self.group)
        return dist.new_group(ranks, timeout, pg_options=options, use_local_synchronization=True)

    def _connect(self, device: torch.device) -> None:
        """Use each link once. NCCL connects two ranks where both first come to a link, and until then the one that
        comes first does nothing else: two that sent to each other would wait for ever. Links of one colour have no rank
        in common, so that here none waits for another link."""
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        message = torch.zeros(_ALIGNED, dtype=torch.uint8, device=device)
        for (back, colour), link in self._links.items():
            for first, other in ((before, before), (self.rank, after)):
                if self._colour(first) == colour:
                    sends = (first == self.rank) != back
                    (link.send if sends else link.recv)([message], other, 0).wait()

    def split(
        self,
        length: int,
        batch: int = 1,
        cu_seqlens: Tensor | None = None,
        *,
        chunk_length: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Part:
        """How sequences of this length are split, and what this rank has of them.

        cu_seqlens: `(sequences + 1,)` int32 of the whole packed row, on every rank; sequences may lie across ranks. Its
            values are read on the host.
        chunk_length: pieces of at most so many positions (of 2, where pieces of 1 cannot be dealt), dealt to the ranks
            in turn, for a backbone that runs in chunks. So every rank has work while the states of a piece go through
            the layers.
        lengths: how many positions each rank has, if not as many as the others.

        Raises ConfigError for fewer positions than ranks, a chunk_length below 1, and lengths that do not add up;
        ValueError for a `cu_seqlens` that does not pack them.
        """
        if length < self.size:
            raise ConfigError(
                f"A sequence of {length} positions cannot be split over {self.size} ranks: each needs one at least. "
                "Use fewer ranks (model.backbone.context_parallel), or longer sequences (data.length, where a dataset "
                "has it)."
            )
        if chunk_length is not None:
            check_positive("The split", chunk_length=chunk_length)
        if lengths is not None:
            if chunk_length is not None:
                raise ConfigError("Give a chunk_length or the lengths of the ranks' parts, not both.")
            if len(lengths) != self.size or min(lengths) < 1 or sum(lengths) != length:
                raise ConfigError(
                    f"The lengths of the parts must be one for each of {self.size} ranks, at least 1 each and {length} "
                    f"together, not {list(lengths)[:16]}."
                )
            cuts = [sum(lengths[:n]) for n in range(self.size + 1)]
        else:
            turns = 1 if chunk_length is None or self.size == 1 else -(-length // (self.size * chunk_length))
            turns = min(turns, length // self.size)  # every rank has a piece in every turn
            cuts = [n * length // (turns * self.size) for n in range(turns * self.size + 1)]
        bounds = None
        if cu_seqlens is not None:
            sequences.check(cu_seqlens, batch, length)
            bounds = sequences.offsets(cu_seqlens, length)
        return Part(self, cut(cuts, batch, bounds), batch, bounds)

    def send(self, tensors: Sequence[Tensor], to: int, back: bool = False) -> None:
        """Send tensors to a neighbour, the one before with `back`. Does not wait for it."""
        message = _joined(tensors)
        self._forget_done()
        self._sent.append((self._link(self.rank, to, back).send([message], to, 0), message))

    def receive(self, kinds: Sequence[Like], source: int, device: torch.device, back: bool = False) -> list[Tensor]:
        """The tensors that a neighbour sends, `back` to the one before it. A GPU waits in its stream, a CPU here."""
        message = torch.empty(_places(kinds)[-1], dtype=torch.uint8, device=device)
        self._link(source, self.rank, back).recv([message], source, 0).wait()
        return _parted(message, kinds)

    def _link(self, source: int, to: int, back: bool) -> Any:
        if not self._makes_links:
            return self.group
        return self._links[back, self._colour(to if back else source)]

    def _colour(self, first: int) -> int:
        """Of the links between a rank and its next, whichever way."""
        return 2 if self.size % 2 and first == self.size - 1 else first % 2

    def _forget_done(self) -> None:
        if self._makes_links:  # gloo's do not know of their end before somebody waits for it
            while self._sent and self._sent[0][0].is_completed():
                self._sent.popleft()

    def finish(self) -> None:
        """Wait until what was sent has arrived: after a backward pass, before another call with the context."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each, of a tensor of one shape; without gradients."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest of all ranks' numbers, on each, as `sum`."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        options = dist.AllreduceOptions()
        options.reduceOp = how
        self.group.allreduce([total], options).wait()
        return total

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each, with gradients: that of a rank's tensor is the sum of those of all ranks'
        results."""
        total: Tensor = _Add.apply(self, tensor)
        return total

    def mean(self, loss: Tensor, n: Tensor) -> Tensor:
        """The mean over all ranks' targets, of each rank's mean loss over its n `()`. It is the same on every rank; its
        gradient on a rank is that of the rank's share, so that gradients are to be summed over the ranks."""
        count = n.to(torch.float64)
        local = loss.detach().to(torch.float64)
        total, everyone = self.sum(torch.stack([local * count, count]))
        everyone = everyone.clamp(min=1)
        mean: Tensor = _Share.apply(loss, (total / everyone).to(loss.dtype), (count / everyone).to(loss.dtype))
        return mean

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank; they may have different first dimensions. Without gradients."""
        rows = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        rows[self.rank] = tensor.shape[0]
        counts: list[int] = self.sum(rows).tolist()
        padded = tensor.detach().new_zeros(max(counts), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor.detach()
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self.group.allgather([found], [padded]).wait()
        return [one[:count] for one, count in zip(found, counts, strict=True)]

    def begin_gather(self, tensors: Sequence[Tensor]) -> Gathering:
        """Send every rank these tensors, of the same shapes and dtypes on all; without gradients. Does not wait."""
        message = _joined(tensors)
        found = message.new_empty(self.size, message.numel())
        work = self._gathers._allgather_base(found.view(-1), message)
        return Gathering(work, message, found, [Like.of(tensor) for tensor in tensors])

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make every parameter's gradient the sum over all ranks; after `backward` on each, with the same parameters.

        One that is None counts as zeros where another rank has it, and stays None where none does.
        """
        self.finish()
        told = list(parameters)
        if not told:
            return
        # what a rank does not know of would put others' gradients beside the wrong ones of its own
        has = self.largest(torch.tensor([p.grad is not None for p in told], dtype=torch.int32, device=told[0].device))
        bucket: list[Tensor] = []
        for parameter, found in zip(told, has.tolist(), strict=True):
            if not found:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            if bucket and (gradient.dtype != bucket[0].dtype or sum(g.nbytes for g in bucket) > _BUCKET):
                self._sum_(bucket)
                bucket = []
            bucket.append(gradient)
        if bucket:
            self._sum_(bucket)

    def _sum_(self, tensors: list[Tensor]) -> None:
        """Sum tensors of one dtype in place, in one message."""
        total = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Context, tensor: Tensor) -> Tensor:
        ctx.context = context
        return context.sum(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor]:
        return None, ctx.context.sum(d)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, mean: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return d * share, None, None


def _places(kinds: Sequence[Like]) -> list[int]:
    """Where each tensor begins in a message, and the message's bytes: where kernels that read several numbers at once
    expect tensors to begin. Also a message of empty tensors has some bytes, since rows of none do not begin there."""
    *places, end = itertools.accumulate((-(-kind.bytes // _ALIGNED) * _ALIGNED for kind in kinds), initial=0)
    return [*places, max(end, _ALIGNED)]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One message of bytes."""
    kinds = [Like.of(tensor) for tensor in tensors]
    message = torch.empty(_places(kinds)[-1], dtype=torch.uint8, device=tensors[0].device)
    # all at once: on a GPU a kernel for many tensors
    torch._foreach_copy_(_parted(message, kinds), [tensor.detach() for tensor in tensors])
    return message


def _parted(message: Tensor, kinds: Sequence[Like]) -> list[Tensor]:
    """The tensors of a message, as views."""
    places = zip(_places(kinds), kinds, strict=False)
    return [message[at : at + kind.bytes].view(kind.dtype).view(kind.shape) for at, kind in places]
