"""CUDA C++ compiled at first use by NVRTC, through NVIDIA's `cuda-core`; no compiler has to be installed.

Compiled code is stored in the cache folder with a checksum, under a hash of source, macros, architecture and compiler.
It is read from there only if nobody but this user and root can write to that folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.atomic import atomic_file
from mambaseq.errors import UserError
from mambaseq.ops.gpu import compiling
from mambaseq.resources import cache_dir, make_private, why_unsafe

_LARGEST = 64 * 2**20  # bytes: ours have some hundred thousand


@functools.cache
def why_not() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    if torch.version.hip is not None:
        return "PyTorch is built for AMD GPUs"
    for name, package in (("cuda.bindings", "cuda-bindings"), ("cuda.core", "cuda-core")):
        try:
            missing = importlib.util.find_spec(name) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            return f"{package} is not installed"
    return None


def compile_to_cubin(source: str, macros: dict[str, int], architecture: str) -> bytes:
    """Machine code for an architecture ("90" is compute capability 9.0). Needs no GPU.

    Raises cuda.core's error, with the compiler's messages, for a source that does not compile.
    """
    core: Any = importlib.import_module("cuda.core")
    defined = [(name, str(value)) for name, value in macros.items()]
    options = core.ProgramOptions(std="c++17", arch=f"sm_{architecture}", define_macro=defined or None)
    with compiling.told:
        return bytes(core.Program(source, "c++", options).compile("cubin").code)


@functools.cache
def _told(reason: str) -> None:
    print(
        f"mambaseq: kernels are compiled anew in each process, because {reason}. Set MAMBASEQ_CACHE to a folder that "
        f"only you may write to.",
        file=sys.stderr,
    )


def kernel_folder() -> Path:
    """Where compiled kernels are kept."""
    return cache_dir() / "kernels"


def _seal(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + code).digest()


def _kept(path: Path, key: str) -> bytes | None:
    """The code in a file of the cache; None when there is none, or it is damaged or another kernel's."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError:
        return None
    seal, code = content[:32], content[32:]
    return code if code and seal == _seal(key, code) else None


def _cubin(source: str, macros: dict[str, int], architecture: str) -> bytes:
    """From the cache, or compiled and put there; a folder that cannot be written, or that others may write to, is done
    without."""
    compiler = f"{importlib.metadata.version('cuda-core')} {importlib.metadata.version('cuda-bindings')}"
    key = hashlib.sha256(repr((source, sorted(macros.items()), architecture, compiler)).encode()).hexdigest()
    path = kernel_folder() / f"{key[:32]}.cubin"
    with contextlib.suppress(OSError):
        make_private(path.parent)
    if (reason := why_unsafe(path.parent)) is not None:
        _told(reason)
        return compile_to_cubin(source, macros, architecture)
    if (code := _kept(path, key)) is not None:
        return code
    code = compile_to_cubin(source, macros, architecture)
    with contextlib.suppress(OSError, UserError), atomic_file(path) as file:
        file.write(_seal(key, code) + code)
    return code


class Kernel:
    """A kernel on one device; call it with a grid and its arguments.

    Tensors go as the addresses of their first elements, None as a null pointer, numbers as 64 bits (of which a kernel
    may read the lower half as an int). A cooperative one has all of its blocks at work at once, or is refused. An early
    one may begin before what is in front of it in the stream has ended, and waits for it by `griddepcontrol.wait`.
    """

    def __init__(
        self,
        code: bytes,
        name: str,
        threads: int,
        shared: int,
        device: int,
        cooperative: bool = False,
        early: bool = False,
    ) -> None:
        core: Any = importlib.import_module("cuda.core")
        driver: Any = importlib.import_module("cuda.bindings.driver")
        self._launch, self._device = core.launch, device
        core.Device(device).set_current()
        self._module = core.ObjectCode.from_cubin(code)
        self._kernel = self._module.get_kernel(name)
        options = {"is_cooperative": cooperative} | ({"programmatic_stream_serialization": True} if early else {})
        # Made once: a launch should cost microseconds.
        self._stream = functools.lru_cache(maxsize=64)(core.Stream.from_handle)
        self._config = functools.lru_cache(maxsize=64)(
            lambda grid: core.LaunchConfig(grid=grid, block=threads, shmem_size=shared, **options)
        )
        if shared > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (error,) = driver.cuKernelSetAttribute(attribute, shared, self._kernel.handle, device)
            if error != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"{name} cannot have {shared} bytes of shared memory on this GPU: {error}")

    def __call__(self, grid: int | tuple[int, int], *arguments: Any) -> None:
        # what torch.cuda.current_stream() looks up, without making objects of it: 5 microseconds less
        stream = self._stream(torch._C._cuda_getCurrentRawStream(self._device))
        numbers = [
            v if type(v) is int else 0 if v is None else v.data_ptr() if isinstance(v, Tensor) else int(v)
            for v in arguments
        ]
        self._launch(stream, self._config(grid), self._kernel, *numbers)


def kernel(
    source: tuple[Path, ...],
    name: str,
    macros: dict[str, int],
    threads: int,
    shared: int,
    device: int,
    cooperative: bool = False,
    early: bool = False,
) -> Kernel:
    """The kernel `name` of some files, one after the other, compiled for a device."""
    text = "".join(path.read_text(encoding="utf-8") for path in source)
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(_cubin(text, macros, f"{major}{minor}"), name, threads, shared, device, cooperative, early)
