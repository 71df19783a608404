"""Processes of a trainer that share training sequences (see `mambaseq.parallel`)."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.device_mesh import init_device_mesh

from mambaseq.errors import ConfigError
from mambaseq.parallel import Context


def make_context(shared: int, strategy: Strategy) -> Context:
    """The context of this process: each `shared` processes in a row share their sequences, and there are as many groups
    as that leaves, with sequences of their own. All processes call it.

    Raises ConfigError unless they are a multiple of it, with whole weights each.
    """
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes % shared:
        raise ConfigError(
            f"model.backbone.context_parallel splits each sequence over {shared} processes, but there are {processes}. "
            f"Set trainer.devices (times trainer.num_nodes) to a multiple of {shared}, or context_parallel to 1."
        )
    if not isinstance(strategy, DDPStrategy):
        raise ConfigError(
            f"model.backbone.context_parallel needs whole weights in every process, but trainer.strategy is "
            f"{type(strategy).__name__}. Set trainer.strategy to ddp, or context_parallel to 1."
        )
    mesh = init_device_mesh(
        strategy.root_device.type, (processes // shared, shared), mesh_dim_names=("data", "context")
    )
    return Context(mesh["context"], strategy._timeout)
