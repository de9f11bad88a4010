"""What a worker process is told at birth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tetriserve.config import PoolConfig
from tetriserve.core.stages import ENCODE
from tetriserve.models.card import ModelCard
from tetriserve.worker.team.region import Region


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything a rank needs; plain values, so that it survives a spawn.

    cards: of the models that it serves, the pool's first model first.
    region: the memory that all ranks share.
    store: directory of the tensor store, shared by all ranks and the server on this host.
    adapter: `module:Class` to load in place of the cards' own adapters (tests inject faults with it).
    """

    rank: int
    cards: tuple[ModelCard, ...]
    pool: PoolConfig
    region: Region
    store: Path
    adapter: str | None

    @property
    def device(self) -> str:
        """Torch's name of this rank's device, such as `cpu` or `cuda:3`."""
        return self.pool.device_of(self.rank)

    def lacks(self, model: str) -> frozenset[str]:
        """The kinds of stage of this model that this rank does not run, of those that only some ranks run."""
        ranks = self.pool.stage_ranks
        return frozenset(kind for kind in ranks.kinds if not ranks.allows(model, kind, (self.rank,)))

    def has_text_encoders(self, model: str) -> bool:
        """Whether this rank loads what reads this model's prompts."""
        return self.pool.stage_ranks.allows(model, ENCODE, (self.rank,))
