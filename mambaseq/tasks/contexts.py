"""Processes of a trainer that share training sequences (see `mambaseq.parallel`)."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import init_device_mesh

from mambaseq.errors import ConfigError
from mambaseq.parallel import Context


def make_context(shared: int, strategy: Strategy) -> Context:
    """The context of this process: each `shared` processes in a row share their sequences, and there are as many groups
    as that leaves, with sequences of their own. All processes call it.

    Raises ConfigError unless they are a multiple of it, and have whole weights or gather them layer by layer.
    """
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes % shared:
        raise ConfigError(
            f"model.backbone.context_parallel splits each sequence over {shared} processes, but there are {processes}. "
            f"Set trainer.devices (times trainer.num_nodes) to a multiple of {shared}, or context_parallel to 1."
        )
    if not isinstance(strategy, DDPStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"model.backbone.context_parallel goes with the strategies ddp and fsdp2, but trainer.strategy is "
            f"{type(strategy).__name__}. Set it to one of them, or context_parallel to 1."
        )
    mesh = init_device_mesh(
        strategy.root_device.type, (processes // shared, shared), mesh_dim_names=("data", "context")
    )
    return Context(mesh["context"], strategy._timeout)
