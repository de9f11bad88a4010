"""Sequence parallelism of a diffusers transformer: the only file that touches diffusers' experimental API for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ContextParallel:
    """Splits a transformer's sequence over a mesh that may change between any two forwards (Ulysses).

    Hooks and attention processors share one config object, so a change of mesh only rewrites its fields.
    """

    def __init__(self, transformer: Any) -> None:
        """
        Args:
            transformer: a diffusers model whose class has a `_cp_plan`.
        """
        self._transformer = transformer
        self._processors = [
            module.processor
            for module in transformer.modules()
            if hasattr(getattr(module, "processor", None), "_parallel_config")
        ]
        self._context = ContextParallelConfig(ulysses_degree=2)
        self._config = ParallelConfig(context_parallel_config=self._context)
        self._is_applied = False

    def point(self, mesh: DeviceMesh | None) -> None:
        """Run the next forwards over `mesh` (one dimension); None, or a mesh of one rank, is the bare model.

        The mesh before is let go of: its process group can end, which releases peers that wait in it.
        """
        is_split = mesh is not None and mesh.size() > 1
        if mesh is not None and is_split:
            self._rewrite(mesh)
        if is_split == self._is_applied:
            return
        if is_split:
            apply_context_parallel(self._transformer, self._context, self._transformer._cp_plan)
        else:
            remove_context_parallel(self._transformer, self._transformer._cp_plan)
        for processor in self._processors:
            processor._parallel_config = self._config if is_split else None
        if not is_split:
            self._context._mesh = self._context._flattened_mesh = self._context._ulysses_mesh = None
            self._config._mesh = None
        self._is_applied = is_split

    def _rewrite(self, mesh: DeviceMesh) -> None:
        context = self._context
        context.ulysses_degree = mesh.size()
        context._mesh = context._flattened_mesh = context._ulysses_mesh = mesh
        context._rank = context._ulysses_local_rank = mesh.get_local_rank()
        context._world_size = mesh.size()
        context._device = torch.device(mesh.device_type)
        context._ring_local_rank = 0
        self._config._mesh, self._config._rank = mesh, context._rank
        self._config._world_size, self._config._device = context._world_size, context._device
