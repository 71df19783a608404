"""Data parallel training on several devices, each with all weights (DDP)."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Replicated(DDPStrategy):
    """`trainer.strategy: ddp`, and `DDPStrategy`: Lightning's, but

    - gradients are accumulated on the stream on which they are computed. Lightning wraps the model on a stream of its
      own, which PyTorch remembers for every gradient, for captures of whole steps. We have none (what is captured lies
      within the model), so streams would wait for each other at every parameter, of which PyTorch warns.
    - gradients lie where they are summed, unless `gradient_as_bucket_view` says otherwise: no sum is copied back.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        options = {"gradient_as_bucket_view": True, **self._ddp_kwargs}
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **options)
