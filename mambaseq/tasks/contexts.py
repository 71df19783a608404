"""Processes of a trainer that share training sequences (see `mambaseq.parallel`)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import init_device_mesh

from mambaseq.backbones.residual import ResidualStack
from mambaseq.errors import ConfigError
from mambaseq.parallel import Context


def check_processes(shared: int, processes: int) -> None:
    """Raise ConfigError unless `processes` are groups of `shared` that share their sequences."""
    if processes % shared:
        raise ConfigError(
            f"model.backbone.context_parallel splits each sequence over {shared} processes, but there are {processes}. "
            f"Set trainer.devices (times trainer.num_nodes) to a multiple of {shared}, or context_parallel to 1."
        )


def make_context(shared: int, strategy: Strategy) -> Context:
    """The context of this process: each `shared` processes in a row share their sequences, and there are as many groups
    as that leaves, with sequences of their own. All processes call it.

    Raises ConfigError unless they are a multiple of it, and have whole weights or gather them layer by layer.
    """
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    check_processes(shared, processes)
    if not isinstance(strategy, DDPStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"model.backbone.context_parallel goes with the strategies ddp and fsdp2, but trainer.strategy is "
            f"{type(strategy).__name__}. Set it to one of them, or context_parallel to 1."
        )
    mesh = init_device_mesh(
        strategy.root_device.type, (processes // shared, shared), mesh_dim_names=("data", "context")
    )
    return Context(mesh["context"], strategy._timeout)


def check_gathers(backbone: Any) -> None:
    """Raise ConfigError for a backbone or mixers that cannot gather states."""
    able = isinstance(backbone, ResidualStack) and backbone.chunk_length is None
    if (
        not able
        or backbone.context_states == "relayed"
        or not all(m.sums_up or m.position_wise for m in backbone.mixers())
    ):
        raise ConfigError(
            "trainer.strategy fsdp2 goes with model.backbone.context_parallel where processes gather states: for the "
            "backbone residual without chunk_length, of the mixers mamba, mamba2, gla and s4d. Set trainer.strategy to "
            "ddp, or context_parallel to 1."
        )


def gather_states(backbone: Any) -> None:
    """Have the processes of a sharded model gather the states between their parts: if states were handed on, one would
    wait for a state from another that waits for it to gather a layer's weights.

    Raises what `check_gathers` does.
    """
    check_gathers(backbone)
    backbone.context_states = "gathered"
