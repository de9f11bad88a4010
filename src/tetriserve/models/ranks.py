"""Which ranks of a pool hold a model, and which of its stages they run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from tetriserve.config import PoolConfig
from tetriserve.core.cluster import StageRanks
from tetriserve.core.stages import ENCODE
from tetriserve.models.card import ModelCard

logger = logging.getLogger(__name__)


def ranks_of(card: ModelCard, pool: PoolConfig) -> tuple[int, ...]:
    """Those that hold the model, ascending."""
    return card.ranks or tuple(range(pool.num_ranks))


def encoders_of(card: ModelCard, pool: PoolConfig) -> tuple[int, ...]:
    """Those that hold its text encoders, too: the first so many of them that hold it."""
    return ranks_of(card, pool)[: pool.encoder_ranks]


def stage_ranks(cards: Sequence[ModelCard], pool: PoolConfig) -> StageRanks:
    """Which ranks may run which stages of which models."""
    limits: dict[tuple[str, str], tuple[int, ...]] = {}
    for card in cards:
        ranks, encoders = ranks_of(card, pool), encoders_of(card, pool)
        if len(ranks) < pool.num_ranks:
            limits[card.key, ""] = ranks
        if len(encoders) < len(ranks):
            limits[card.key, ENCODE] = encoders
    return StageRanks.of(limits)


def pool_of(card: ModelCard, pool: PoolConfig) -> PoolConfig:
    """The part of `pool` that the model has: as many ranks as hold it, without degrees and batches that it cannot run.

    Degrees that are left out are named in a warning.
    """
    num_ranks = len(ranks_of(card, pool))
    if wide := [degree for degree in pool.degrees if degree > num_ranks]:
        logger.warning(
            "degrees %s are not used: a degree is at most the number of ranks that hold %s, %d",
            _listed(wide), card.name, num_ranks,
        )  # fmt: skip
    narrow = [degree for degree in pool.degrees if degree <= num_ranks]
    usable = card.valid_degrees(narrow)
    if dropped := [degree for degree in narrow if degree not in usable]:
        logger.warning(
            "degrees %s are not used: a degree must divide the %d attention heads of %s",
            _listed(dropped), card.num_heads, card.name,
        )  # fmt: skip
    return replace(
        pool,
        num_ranks=num_ranks,
        encoder_ranks=None if pool.encoder_ranks is None else min(pool.encoder_ranks, num_ranks),
        ranks_per_gpu=min(pool.ranks_per_gpu, num_ranks),
        degrees=usable,
        max_batch=pool.max_batch if card.can_batch else 1,
    )


def _listed(degrees: Sequence[int]) -> str:
    return ",".join(map(str, degrees))
