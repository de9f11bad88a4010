"""What a worker process is told at birth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tetriserve.config import PoolConfig
from tetriserve.core.stages import ENCODE
from tetriserve.models.card import ModelCard
from tetriserve.models.ranks import encoders_of, ranks_of
from tetriserve.worker.team.region import Region


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything a rank needs; plain values, so that it survives a spawn.

    cards: of the pool's models, whether or not this rank holds them.
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

    @property
    def held(self) -> dict[int, ModelCard]:
        """Of the models that this rank holds, by their places among `cards`."""
        return {place: card for place, card in enumerate(self.cards) if self.rank in ranks_of(card, self.pool)}

    def has_text_encoders(self, card: ModelCard) -> bool:
        """Whether this rank loads what reads the model's prompts."""
        return self.rank in encoders_of(card, self.pool)

    def lacks(self, card: ModelCard) -> frozenset[str]:
        """The kinds of stage of a model that it holds that this rank does not run."""
        return frozenset() if self.has_text_encoders(card) else frozenset((ENCODE,))

    def gives(self, card: ModelCard) -> frozenset[str]:
        """The kinds of stage that it runs, and other ranks that hold the model do not."""
        is_alone = len(encoders_of(card, self.pool)) == len(ranks_of(card, self.pool))
        return frozenset() if is_alone or not self.has_text_encoders(card) else frozenset((ENCODE,))

    def shows(self, card: ModelCard) -> bool:
        """Whether it is this rank that leaves what previews of the model are made with."""
        return card.has_previews and self.rank == ranks_of(card, self.pool)[0]
