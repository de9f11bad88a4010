"""Runs tasks on ranks. The engine knows the protocol alone; `local` supervises processes on this machine,
`cluster` has ranks on several."""

from tetriserve.executor.protocol import Executor, OnEvent

__all__ = ["Executor", "OnEvent"]
