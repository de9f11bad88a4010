"""Memory that other processes map by a file descriptor: of a GPU by CUDA's virtual memory management, else of the host.

The memory is there for as long as a process maps it, also when its owner has been killed; whether a GPU keeps to that,
`collectives.py` finds out.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Region:
    """bytes: the memory, uint8. fd: what it is shared by; the owner may close it once all have mapped it."""

    bytes: torch.Tensor
    fd: int
    mapping: Any

    def unmap(self) -> None:
        """`bytes` must not be used after this."""
        if isinstance(self.mapping, _Mapping):
            self.mapping.close()


def make_region(num_bytes: int, device: torch.device) -> Region:
    """On a GPU, in the context of this process, which must have been made."""
    if device.type == "cpu":
        fd = os.memfd_create("region")
        os.ftruncate(fd, num_bytes)
        return map_region(fd, num_bytes, device)
    driver = _driver()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device.index
    properties.requestedHandleTypes = _fd_type()
    least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    granularity = checked(driver.cuMemGetAllocationGranularity(properties, least))
    if num_bytes % granularity:
        raise ValueError(f"a region has {num_bytes} bytes; a multiple of {granularity} is needed")
    handle = checked(driver.cuMemCreate(num_bytes, properties, 0))
    fd = int(checked(driver.cuMemExportToShareableHandle(handle, _fd_type(), 0)))
    mapping = _Mapping(handle, num_bytes, device.index)
    return Region(mapping.tensor(), fd, mapping)


def map_region(fd: int, num_bytes: int, device: torch.device) -> Region:
    """Another process's region."""
    if device.type == "cpu":
        mapped = mmap.mmap(fd, num_bytes)
        return Region(torch.frombuffer(mapped, dtype=torch.uint8), fd, mapped)
    mapping = _Mapping(checked(_driver().cuMemImportFromShareableHandle(fd, _fd_type())), num_bytes, device.index)
    return Region(mapping.tensor(), fd, mapping)


class _Mapping:
    """Device memory behind a handle, at an address of this process."""

    def __init__(self, handle: Any, num_bytes: int, device: int) -> None:
        driver = _driver()
        self._num_bytes = num_bytes
        self._address = checked(driver.cuMemAddressReserve(num_bytes, 0, 0, 0))
        checked(driver.cuMemMap(self._address, num_bytes, 0, handle, 0))
        checked(driver.cuMemRelease(handle))  # the mapping keeps the memory
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        checked(driver.cuMemSetAccess(self._address, num_bytes, [access], 1))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._num_bytes,), "typestr": "|u1", "data": (int(self._address), False), "version": 3}

    def tensor(self) -> torch.Tensor:
        return torch.as_tensor(self, device="cuda")

    def close(self) -> None:
        checked(_driver().cuMemUnmap(self._address, self._num_bytes))
        checked(_driver().cuMemAddressFree(self._address, self._num_bytes))


def share_with_device(words: torch.Tensor) -> None:
    """Let kernels read host memory `words` where it is."""
    driver = _driver()
    checked(driver.cuMemHostRegister(words.data_ptr(), words.nbytes, driver.CU_MEMHOSTREGISTER_DEVICEMAP))


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of CUDA gave, less its error code, which must be 0."""
    code, *values = answer
    if int(code) != 0:
        raise RuntimeError(f"CUDA error {int(code)} ({getattr(code, 'name', code)})")
    return values[0] if values else None


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _fd_type() -> Any:
    return _driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
