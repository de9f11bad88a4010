"""What a worker process is told at birth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tetriserve.models.card import ModelCard
from tetriserve.worker.team.region import Region


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything a rank needs; plain values, so that it survives a spawn.

    device: torch's name of this rank's device, such as `cpu` or `cuda:3`.
    collectives: how tensors are exchanged; one of `config.COLLECTIVES`.
    region: the memory that all ranks share.
    backend: of torch's process groups, `gloo` or `nccl`.
    store: directory of the tensor store, shared by all ranks and the server on this host.
    heartbeat_s: seconds between signs of life.
    group_timeout_s: a collective of torch that waits longer for a peer fails.
    max_groups: process groups of torch that the rank keeps.
    log_format: text or json.
    resident_bytes: of requests' states that the rank keeps beside their copies in the store.
    """

    rank: int
    card: ModelCard
    device: str
    collectives: str
    region: Region
    backend: str
    store: Path
    num_threads: int
    heartbeat_s: float
    group_timeout_s: float
    max_groups: int
    resident_bytes: int
    log_format: str = "text"
    adapter: str | None = None
    """`module:Class` to load in place of the card's own adapter (tests inject faults with it)."""
