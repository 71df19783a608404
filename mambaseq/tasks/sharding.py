"""Models whose weights, gradients and optimizer are spread over all processes (FSDP2): Lightning's strategy, with what
it leaves to a task."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from mambaseq.atomic import write_failed
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.checkpoints.parts import PARTS, as_error, commit, new_folder, reader_of, remove_unnamed, take_apart
from mambaseq.errors import ConfigError, UserError, shown
from mambaseq.models import SequenceModel
from mambaseq.ops.cpu.flat import let_storages_be_freed
from mambaseq.tasks.record import KEY


class _Saving(FileSystemWriter):
    """Writes a checkpoint's parts, and then, in the first process, its file, which names them; all processes learn what
    comes of that.

    file: what the file at `path` will hold. Whoever holds `lock` decides whether it is written.
    """

    def __init__(self, path: Path, folder: Path, file: bytes) -> None:
        super().__init__(folder)
        self.file_path, self.folder, self._file = path, folder, file
        self.done: Future[None] = Future()
        self.lock, self.abandoned = threading.Lock(), False

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called by the first process once the parts of all are on disk; what it raises is raised in all."""
        super().finish(metadata, results)
        with self.lock:
            if self.abandoned:
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                commit(self._file, self.file_path, self.folder)

    def settle(self, written: Future[Any]) -> None:
        """Have `done` say what came of it."""
        try:
            with as_error():
                written.result()
            self.done.set_result(None)
        except BaseException as error:
            self.done.set_exception(error)


class FullySharded(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`. Every process has a part of each weight; those of neighbouring layers are gathered
    when they are run.

    checkpoints: `parts`, each process writes what it has (see `checkpoints.parts`), or `whole`, the first process
        gathers all and writes one file. Either goes on with another number of processes or with another strategy, and
        is exported as ever.
    asynchronous: write parts beside training, from a copy in memory. The next checkpoint waits for the one before.
    """

    def __init__(
        self,
        checkpoints: Literal["parts", "whole"] = "parts",
        asynchronous: bool = True,
        process_group_backend: str | None = None,
        **options: Any,
    ) -> None:
        if checkpoints not in ("parts", "whole"):
            raise ConfigError(f"trainer.strategy: checkpoints is {shown(checkpoints)}. Use parts or whole.")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=checkpoints == "parts",
            process_group_backend=process_group_backend,
            **options,
        )
        self.asynchronous = asynchronous and checkpoints == "parts"
        self._pending: _Saving | None = None
        self._group: Any = None

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Have all processes write a checkpoint. One that the run has ended with is on disk when this returns, and one
        that is written beside training when the next is saved or `finish_saving` returns.

        Raises UserError in all processes if one of them could not write.
        """
        if not self._save_distributed_checkpoint:
            failed: UserError | None = None
            try:
                super().save_checkpoint(checkpoint, filepath, storage_options)
            except UserError as error:
                failed = error
            if (failed := self.broadcast(failed)) is not None:  # the first process alone writes
                raise failed
            return
        self.finish_saving()
        path = Path(filepath)
        path, folder = self.broadcast((path, path.parent / new_folder(path)))
        rest, tensors = take_apart(checkpoint, folder.name)
        if self._group is None:  # of its own, on CPUs: messages of a thread are no part of those of training
            self._group = dist.new_group(timeout=self._timeout, backend="gloo")
        file = io.BytesIO()
        if self.global_rank == 0:
            torch.save(rest, file)  # now: a thread would see what training has made of it
        saving = self._pending = _Saving(path, folder, file.getvalue())
        if self.asynchronous and not checkpoint.get(KEY, {}).get("ended"):
            written: Any = dcp.async_save(tensors, storage_writer=saving, process_group=self._group)
            written.add_done_callback(saving.settle)
            return
        written = Future()
        try:
            written.set_result(dcp.save(tensors, storage_writer=saving, process_group=self._group))
        except BaseException as error:
            written.set_exception(error)
        saving.settle(written)
        self.finish_saving()

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is written beside training. Raises UserError in all processes if one of them
        could not write; the earlier one then stays."""
        if self._pending is None:
            return
        saving = self._pending
        error = saving.done.exception()  # where a signal ends the wait, it is still pending
        self._pending = None
        if error is None:
            return
        if self.global_rank == 0:
            remove_unnamed(saving.file_path)  # a signal may have come once the file named the new ones
        if (told := write_failed(saving.file_path, error)) is not None:
            raise told from error
        raise error

    def abandon_saving(self, seconds: float = 0.0) -> None:
        """Give up the checkpoint that is written beside training, if it is not done in so many seconds: from here on
        no thread of this process changes the checkpoint's file. What it has written so far is removed, by the thread
        or when the run is resumed."""
        if self._pending is None:
            return
        saving = self._pending
        wait([saving.done], timeout=seconds)
        with saving.lock:  # a file that is being replaced is waited for
            saving.abandoned = True
        self._pending = None

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint into the parts of weights and optimizers that this process has; returns the rest of it."""
        path = Path(self.broadcast(checkpoint_path))
        contents, model = read_checkpoint(path, tensors="none", mapped=True), self.model
        assert model is not None
        saved, reader = contents.pop("optimizer_states"), None
        if PARTS in contents:
            reader = reader_of(contents, path)
            weights = states.get_model_state_dict(model)
            wanted: dict[str, Any] = {f"weights/{name}": weight for name, weight in weights.items()}
            kinds: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
        else:
            states.set_model_state_dict(
                model, contents["state_dict"], options=states.StateDictOptions(full_state_dict=True)
            )
        found = []
        for number, (optimizer, former) in enumerate(zip(self.optimizers, saved, strict=True)):
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            named = [name for group in former["param_groups"] for name in group["params"]]
            state: dict[int, dict[str, Any]] = {}
            groups: list[dict[str, Any]] = []
            for at, (parameter, name) in enumerate(zip(own, named, strict=True)):
                values = dict(former["state"].get(name, {}))
                if reader is None:
                    values = {key: _as(parameter, value) for key, value in values.items()}
                else:
                    start = f"optimizer/{number}/{name}/"
                    for key in kinds:
                        if key.startswith(start):
                            values[key[len(start) :]] = wanted[key] = _like(parameter, kinds[key])
                if values:
                    state[at] = values
            for group in former["param_groups"]:
                first = sum(len(one["params"]) for one in groups)
                groups.append({**group, "params": list(range(first, first + len(group["params"])))})
            found.append({"state": state, "param_groups": groups})
        if reader is not None:
            with as_error():
                dcp.load(wanted, storage_reader=reader)
            model.load_state_dict(weights)
        for optimizer, read in zip(self.optimizers, found, strict=True):
            optimizer.load_state_dict(read)
        rest = {key: value for key, value in contents.items() if key not in (PARTS, "state_dict")}
        return tree_map_only(torch.Tensor, torch.clone, rest)  # no part of a file that the run will replace


def _as(parameter: Any, value: Any) -> Any:
    """A whole value of an optimizer as this process has it: its part of one that has the parameter's shape. A copy."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value.clone()
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    ).clone()


def _like(parameter: Any, kind: Any) -> torch.Tensor:
    """A place for a value of an optimizer, of a size and a dtype: a part where it has the parameter's shape."""
    dtype = kind.properties.dtype
    return (
        torch.empty_like(parameter, dtype=dtype)
        if kind.size == parameter.shape
        else torch.empty(kind.size, dtype=dtype)
    )


def check_shardable(model: SequenceModel, optimizer: str) -> None:
    """Raise ConfigError for a model, or an optimizer by its name, that needs whole weights."""
    if optimizer == "muon":
        raise ConfigError(
            "optimizer.name is 'muon', which needs whole matrices, but the strategy (fsdp2) gives every process a "
            "part of each. Set optimizer.name to adamw, or trainer.strategy to ddp."
        )
    if getattr(model.backbone, "chunk_length", None) is not None:
        raise ConfigError(
            "model.backbone.chunk_length needs whole weights, but the strategy (fsdp2) gives every process a part of "
            "each. Set chunk_length to null, or trainer.strategy to ddp."
        )


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


# parameters whose weights are gathered, and gradients summed, at once. Each time costs the host some 3 ms of a step, in
# which it could start the kernels of two layers; what is gathered takes 8 bytes a parameter, and the next as much
_TOGETHER = 2**27


def shard_over(model: SequenceModel, mesh: DeviceMesh) -> None:
    """Shard a model over a mesh of one dimension, by layers, as many together as have `_TOGETHER` parameters; as a
    whole if layers share weights."""
    if mesh.device_type == "cpu":
        let_storages_be_freed()
    backbone: Any = model.backbone
    layers = list(getattr(backbone, "layers", []))
    if len({id(p) for layer in layers for p in layer.parameters()}) == sum(
        len(list(layer.parameters())) for layer in layers
    ):
        for together in _units(layers):
            fully_shard(together, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _units(layers: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Neighbouring layers, of at most `_TOGETHER` parameters, or one."""
    unit: list[nn.Module] = []
    count = 0
    for layer in layers:
        own = sum(parameter.numel() for parameter in layer.parameters())
        if unit and count + own > _TOGETHER:
            yield unit
            unit, count = [], 0
        unit.append(layer)
        count += own
    if unit:
        yield unit
