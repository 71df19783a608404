"""Models whose weights, gradients and optimizer are spread over all processes (FSDP2): Lightning's strategy, with what
it leaves to a task."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel
from mambaseq.ops.cpu.flat import let_storages_be_freed


class FullySharded(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`. Every process has a part of each weight; a layer's are gathered when it is run.

    Checkpoints hold whole weights, so that a run may go on with another number of processes, or with another strategy,
    and is exported as ever.
    """

    def __init__(self, process_group_backend: str | None = None, **options: Any) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            **options,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(model: SequenceModel, strategy: ModelParallelStrategy) -> None:
    """Shard a model over the processes of a strategy, once.

    Raises ConfigError for a strategy that splits weights in another way (tensor parallel).
    """
    if getattr(model, "is_sharded", False):
        return
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "trainer.strategy splits single products of matrices over processes (tensor_parallel_size), which these "
            "models cannot. Use trainer.strategy fsdp2."
        )
    shard_over(model, strategy.device_mesh["data_parallel"])
    model.is_sharded = True  # type: ignore[assignment]


def shard_over(model: SequenceModel, mesh: DeviceMesh) -> None:
    """Shard a model over a mesh of one dimension, layer by layer, unless layers share weights."""
    if mesh.device_type == "cpu":
        let_storages_be_freed()
    backbone: Any = model.backbone
    layers = list(getattr(backbone, "layers", []))
    if len({id(p) for layer in layers for p in layer.parameters()}) == sum(
        len(list(layer.parameters())) for layer in layers
    ):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
