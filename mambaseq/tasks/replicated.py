"""Data parallel training on several devices, each with all weights (DDP)."""

from collections.abc import MutableMapping

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup, ReduceOp, all_reduce, get_backend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from mambaseq.backbones.graphed_steps import StepGraphs


class Replicated(DDPStrategy):
    """`trainer.strategy: ddp`, `DDPStrategy`, and of several devices without a strategy: Lightning's, but

    - gradients are accumulated on the stream on which they are computed. Lightning wraps the model on a stream of its
      own, which PyTorch remembers for every gradient, for captures of whole steps. We have none (what is captured lies
      within the model), so streams would wait for each other at every parameter, of which PyTorch warns.
    - gradients lie where they are summed, unless `gradient_as_bucket_view` says otherwise: no sum is copied back. What
      is replayed from CUDA graphs writes its gradients there, all of a part at once, where DDP would multiply one after
      another into its buckets; unless `ddp_comm_hook` says how they are summed.
    """

    _places: MutableMapping[Tensor, Tensor] | None = None

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        options = {"gradient_as_bucket_view": True, **self._ddp_kwargs}
        wrapped = DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **options)
        if options["gradient_as_bucket_view"] and self._ddp_comm_hook is None:
            self._places = WeakIdKeyDictionary()
            for module in model.modules():
                if isinstance(graphs := getattr(module, "graphs", None), StepGraphs):
                    graphs.places = self._places  # one for all, since a place is for one gradient
            averages = "nccl" in get_backend(wrapped.process_group)
            wrapped.register_comm_hook(_Mean(wrapped.process_group, averages, self._places), _Mean.begin)
        return wrapped

    def teardown(self) -> None:
        if self._places is not None:
            self._places.clear()  # DDP's memory
        super().teardown()


class _Mean:
    """The mean of gradients over processes, bucket by bucket, as DDP has it.

    averages: whether the group has means, else there are sums of shares. places: told where each gradient lies.
    """

    def __init__(self, group: ProcessGroup, averages: bool, places: MutableMapping[Tensor, Tensor]) -> None:
        self._group, self._averages, self._places = group, averages, places
        self._is_first = True  # after the first backward pass DDP makes its buckets anew

    def begin(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if not self._is_first:
            self._places.update(zip(bucket.parameters(), bucket.gradients(), strict=True))
        elif bucket.is_last():
            self._is_first = False
        mean = bucket.buffer()
        if not self._averages:
            mean.mul_(1 / self._group.size())
        op = ReduceOp.AVG if self._averages else ReduceOp.SUM
        work = all_reduce(mean, op, group=self._group, async_op=True)
        assert work is not None

        def found(sums: torch.futures.Future[list[Tensor]]) -> Tensor:
            sums.value()  # raises what went wrong
            return mean  # complex if the bucket is, unlike what was summed

        return work.get_future().then(found)
