"""Devices and processes that a trainer asks for, and those that there are: of the machine, and of what a launcher
(torchrun, SLURM) has started."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from mambaseq.errors import ConfigError, shown
from mambaseq.limits import DEVICES
from mambaseq.reporting.runs import rank

_FIRST_SPEAKS = 5.0  # seconds before another process ends, at which a launcher ends the first one too


class Launched(NamedTuple):
    """What has started this process and others like it. here: how many of them are on this machine; machines: on how
    many they are; None if unknown."""

    by: str
    processes: int
    here: int | None
    machines: int | None = None


def launched() -> Launched | None:
    """Who has started this process, alone or as one of several; None where it will start the others itself."""
    environ = os.environ
    here = _number(environ.get("LOCAL_WORLD_SIZE")) or None
    if TorchElasticEnvironment.detect():
        machines = _number(environ.get("GROUP_WORLD_SIZE")) or None
        found = Launched("torchrun", _number(environ.get("WORLD_SIZE")), here, machines)
    elif SLURMEnvironment.detect():  # of a job's steps: its script, too, sees how many tasks the job may have
        processes = _number(environ.get("SLURM_STEP_NUM_TASKS"))
        machines = _number(environ.get("SLURM_STEP_NUM_NODES")) or None  # a job may have more than this step is on
        nodes = machines or _number(environ.get("SLURM_NNODES")) or 1
        found = Launched("SLURM", processes, processes // nodes, machines)
    elif "LOCAL_RANK" in environ and _number(environ.get("WORLD_SIZE")):
        found = Launched("a launcher (WORLD_SIZE in the environment)", _number(environ["WORLD_SIZE"]), here)
    elif dist.is_available() and dist.is_initialized():
        found = Launched("an earlier training of this script", dist.get_world_size(), None)
    else:
        return None
    return found if found.processes else None


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def check_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Check the devices that a trainer's settings ask for, before anything is read or written.

    Returns devices and num_nodes where a launcher says what they are and the settings do not; {} otherwise.
    Raises ConfigError for devices that are none or are not there, for machines of which nothing says which this is,
    and, in the first process, for other processes than a launcher has started; the others end with code 2.
    """
    devices, nodes, plugins = trainer.get("devices", "auto"), trainer.get("num_nodes", 1), trainer.get("plugins")
    count = _count(devices)
    _check_there(trainer.get("accelerator"), devices, count)
    given = plugins if isinstance(plugins, list) else [plugins]
    if any(isinstance(plugin, ClusterEnvironment) for plugin in given) or not isinstance(nodes, int):
        return {}
    _check_nodes(nodes)
    if (started := launched()) is None:
        return {}
    by, processes, here, machines = started
    if machines is not None and here is not None and here * machines != processes:
        _refuse(
            f"{by} started {processes} process{'es' if processes > 1 else ''} on {machines} machines; each machine has "
            "to have as many. Start the same number on each (srun --ntasks-per-node, torchrun --nproc-per-node)."
        )
    if devices in (None, "auto"):
        here = here or processes // max(nodes, 1)
        nodes = nodes if nodes != 1 else processes // here
        if here * nodes != processes:
            told = "each machine has to have as many" if trainer.get("num_nodes", 1) == 1 else f"not {here} * {nodes}"
            _refuse(
                f"{by} started {processes} processes, {here} of them on this machine; {told}. Set trainer.num_nodes to "
                "the machines and --trainer.devices to the processes on each."
            )
        _check_there(trainer.get("accelerator"), here, here)
        return {"devices": here, "num_nodes": nodes}
    if count is not None and count * nodes != processes:
        remedy = f"--trainer.devices {processes // nodes}"
        if processes % nodes:
            remedy = "trainer.num_nodes to the machines and trainer.devices to the processes on each"
        _refuse(
            f"trainer.devices times trainer.num_nodes is {count} * {nodes} = {count * nodes}, but {by} started "
            f"{processes} process{'es' if processes > 1 else ''}, and each is one device. Give {remedy}, or start "
            f"{count * nodes}."
        )
    return {}


def _refuse(why: str) -> NoReturn:
    """All processes find the same, so the first one says it; what started them may end it when another one ends."""
    if rank():
        time.sleep(_FIRST_SPEAKS)
        sys.exit(2)
    raise ConfigError(why)


def _count(devices: Any) -> int | None:
    """How many devices are asked for; None for as many as there are, or what only Lightning knows.

    Raises ConfigError for what is no number of devices; UserError for more than `limits.DEVICES`, since on CPUs
    Lightning would start that many processes."""
    asked = devices
    if isinstance(devices, str) and devices != "auto":
        try:
            numbers = [int(part) for part in devices.split(",") if part.strip()]
        except ValueError:
            numbers = []
        if not numbers:
            _no_devices(asked)
        devices = numbers if "," in devices else numbers[0]
    if isinstance(devices, list | tuple):
        devices = len(devices)
    if devices == -1:
        return torch.cuda.device_count() or None
    if isinstance(devices, int):
        if devices < 1:
            _no_devices(asked)
        DEVICES.check(devices, "trainer.devices")
        return devices
    return None


def _no_devices(asked: Any) -> NoReturn:
    raise ConfigError(
        f"trainer.devices is {shown(asked)}, but is how many to use (--trainer.devices 2), the numbers of GPUs "
        "(--trainer.devices '[0, 1]'), or auto."
    )


def _check_there(accelerator: Any, devices: Any, count: int | None) -> None:
    """Raise ConfigError for GPUs that this machine does not have."""
    asks = accelerator in ("gpu", "cuda")
    if asks and not torch.cuda.is_available() and not (accelerator == "gpu" and MPSAccelerator.is_available()):
        also = "" if count in (None, 1) else f" (trainer.devices {count})"
        raise ConfigError(
            f"trainer.accelerator is {accelerator}{also}, but PyTorch finds no GPU here. Add --trainer.devices 1 "
            "--trainer.accelerator cpu (or auto, which takes a GPU where there is one)."
        )
    if (asks or accelerator in (None, "auto")) and (have := torch.cuda.device_count()) and count and count > have:
        remedy = (
            "Let it see all (SLURM: no --gpus-per-task)"
            if (started := launched()) is not None and started.processes > 1
            else f"Give --trainer.devices {have}"
        )
        raise ConfigError(
            f"trainer.devices is {shown(devices)}, but this process sees {have} GPU{'s' if have > 1 else ''}. "
            f"{remedy}, or --trainer.accelerator cpu."
        )


def _check_nodes(count: int) -> None:
    """Raise ConfigError for several machines if nothing says which one this is: it would wait for the others."""
    if count <= 1:
        return
    launchers = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    by_hand = {"NODE_RANK", "GROUP_RANK"} & os.environ.keys() and "MASTER_ADDR" in os.environ
    if not by_hand and not any(launcher.detect() for launcher in launchers):
        raise ConfigError(
            f"trainer.num_nodes is {count}, but nothing says which of them this machine is, so it would wait for the "
            "others forever. Start the run with torchrun or SLURM on each, or set NODE_RANK and MASTER_ADDR; on one "
            "machine leave trainer.num_nodes out."
        )
