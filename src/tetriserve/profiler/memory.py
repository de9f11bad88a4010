"""Whether ranks have room for the weights of their models, before any worker loads them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tetriserve.config import PoolConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import TEXT_ENCODERS
from tetriserve.core.memory import shown_bytes
from tetriserve.models.card import ModelCard
from tetriserve.models.ranks import encoders_of, ranks_of
from tetriserve.models.sizes import TEXT_ENCODER, weight_bytes
from tetriserve.profiler.hardware import gpu_bytes, host_bytes

logger = logging.getLogger(__name__)


def check_memory(cards: Sequence[ModelCard], pool: PoolConfig) -> None:
    """Refuse models that a GPU cannot hold together, and warn where this machine has less memory than their weights.

    Activations come on top, so that what passes may still be too much.

    Raises:
        ConfigError: weights of the ranks of a GPU exceed its memory; one line says by how much.
    """
    sizes = {card.key: weight_bytes(card) for card in cards}
    if pool.device == "cpu":
        _check_host(cards, sizes)
        return
    gpus = gpu_bytes()
    for gpu, available in enumerate(gpus[: pool.num_gpus]):
        ranks = [rank for rank in range(pool.num_ranks) if rank // pool.ranks_per_gpu == gpu]
        held: dict[str, int] = {}
        for rank in ranks:
            for name, num_bytes in _on_gpu(cards, pool, sizes, rank).items():
                held[name] = held.get(name, 0) + num_bytes
        if sum(held.values()) > available:
            whose = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} together"
            remedy = (
                "give models ranks of their own with --model-ranks"
                if len(cards) > 1
                else "serve it without text encoders on some ranks (--encoder-ranks), or on larger GPUs"
            )
            raise ConfigError(f"{whose} would hold {_listed(held)} on a GPU of {shown_bytes(available)}; {remedy}")


def _check_host(cards: Sequence[ModelCard], sizes: Mapping[str, Mapping[str, int]]) -> None:
    """On the CPU all ranks share one copy of a model's weights (`worker.weights`)."""
    needed = {card.name: sum(sizes[card.key].values()) for card in cards}
    if sum(needed.values()) > host_bytes():
        logger.warning(
            "the weights are %s, and this machine has %s of memory; serve fewer models, or smaller ones",
            _listed(needed), shown_bytes(host_bytes()),
        )  # fmt: skip


def _on_gpu(
    cards: Sequence[ModelCard], pool: PoolConfig, sizes: Mapping[str, Mapping[str, int]], rank: int
) -> dict[str, int]:
    """Bytes of weights that the rank holds on its GPU, by the model's name."""
    held = {}
    for card in cards:
        if rank not in ranks_of(card, pool):
            continue
        encodes = rank in encoders_of(card, pool) and card.execution.offload != TEXT_ENCODERS
        held[card.name] = sum(
            num_bytes for name, num_bytes in sizes[card.key].items() if encodes or not name.startswith(TEXT_ENCODER)
        )
    return held


def _listed(held: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {shown_bytes(num_bytes)}" for name, num_bytes in held.items())
    return f"{shown_bytes(sum(held.values()))} of weights ({parts})"
