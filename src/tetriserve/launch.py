"""Puts an engine together from a configuration: the one place where the parts meet."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tetriserve.config import EngineConfig, ExecutionConfig, LoraConfig, ModelConfig, PoolConfig
from tetriserve.control.controller import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import DEFAULT
from tetriserve.core.plan import CostModel
from tetriserve.core.probes import probe
from tetriserve.core.request import Shape
from tetriserve.engine.intake import Intake
from tetriserve.engine.jobs import Jobs
from tetriserve.engine.journalled import JournalledJobs
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.observers import Observer
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.protocol import Executor
from tetriserve.journal import Journal, Model
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.lora import with_loras
from tetriserve.models.ranks import pool_of, stage_ranks
from tetriserve.models.registry import family_of
from tetriserve.models.video_file import check_encoder
from tetriserve.policies.fixed import FixedDegree
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import find_policy, make_policy, warn_of_long_rounds
from tetriserve.profile.by_model import CostByModel
from tetriserve.profile.corrections import Corrections
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.estimate import with_largest
from tetriserve.profile.table import Profile
from tetriserve.profiler.hardware import hardware_name, visible_gpus
from tetriserve.profiler.measure import measure, measure_lora
from tetriserve.profiler.memory import check_memory
from tetriserve.profiler.warmup import warm_up
from tetriserve.profiles import BUSY, find_corrections, find_profile, keep_corrections, measure_and_keep
from tetriserve.workload.slo import MultipleRule, slack_s

logger = logging.getLogger(__name__)

BUNDLED_MODEL = Path(__file__).parent / "models" / "tiny"


@dataclass(frozen=True)
class StartProgress:
    """Who hears how the start goes: `step` names what happens now, `counted` counts what is measured or warmed."""

    step: Callable[[str], None] = lambda text: logger.info("%s", text)
    counted: Callable[[int, int, str], None] = lambda done, total, text: None


@dataclass(frozen=True)
class _Model:
    """One of the pool's models. pool: its part. cost: what its stages take here."""

    card: ModelCard
    pool: PoolConfig
    cost: ProfileCost

    @classmethod
    def of(
        cls, card: ModelCard, pool: PoolConfig, profile: Profile, corrections: Corrections, lora_s: float = 0.0
    ) -> _Model:
        cost = ProfileCost(
            profile,
            lambda shape: card.valid_degrees(pool.degrees),
            corrections,
            pool.max_batch,
            with_largest(profile, card.size_multiple),
            lora_s,
            lambda kind, shape: card.short_degrees(kind, shape, pool.degrees),
        )
        return cls(card, pool, cost)


async def launch(
    config: EngineConfig, progress: StartProgress, *, observer: Observer | None = None, profile: Profile | None = None
) -> Jobs:
    """A started engine, and the jobs above it. Whatever can be checked before workers start is checked before.

    Args:
        profile: one that an earlier engine of the same model, the only one, and pool was launched with; None finds or
            measures one.

    Raises:
        ConfigError: model, profile, degrees or policy cannot be served; one line says why and how to mend it.
    """
    spec = config.scheduling.policy
    find_policy(spec)
    _check_interpreter()
    _check_device(config.pool)
    cards = find_cards(config)
    for card in cards:
        card.execution.check_device(config.pool.device)
    check_memory(cards, config.pool)
    pools = [pool_of(card, config.pool) for card in cards]
    models: list[_Model | None] = []
    for named, card, pool in zip(config.models, cards, pools, strict=True):
        found = profile or find_profile(card, pool, named.profile, remeasure=config.remeasure)
        is_named = named.profile is not None  # then it is taken as it is written
        models.append(
            None
            if found is None
            else _Model.of(card, pool, found, Corrections() if is_named else find_corrections(found, card, pool))
        )
    if None not in models:
        _policies_of([model for model in models if model is not None], config)[0]()  # what is wrong with it shows now
    journal = _open_journal(config, cards)
    try:
        executor = LocalExecutor(cards, pools[0] if len(cards) == 1 else config.pool)
        await executor.start(progress.step)
        try:
            ready = [
                await _made_ready(executor, model, card, pool, config, progress)
                for model, card, pool in zip(models, cards, pools, strict=True)
            ]
            new_policy, cost, can_wait_s = _policies_of(ready, config)
            policy = new_policy()
            warn_of_long_rounds(spec, policy, can_wait_s)
            intakes = [
                Intake(
                    card=model.card,
                    cost=model.cost,
                    default_slo_scale=config.scheduling.default_slo_scale,
                    max_degree=policy.degree if isinstance(policy, FixedDegree) else None,
                )
                for model in ready
            ]
            for model, intake in zip(ready, intakes, strict=True):
                if model.pool.device == "cuda" or model.card.execution.compile != DEFAULT:
                    progress.step("running every size once" + (f" of {model.card.name}" if len(ready) > 1 else ""))
                    await warm_up(executor, model.card, model.pool, model.cost, intake.sizes, progress.counted)
        except BaseException:
            await executor.stop()
            raise
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    scheduling = config.scheduling
    engine = LiveEngine(
        Controller(
            policy,
            cost,
            max_losses=scheduling.max_losses,
            late_share=scheduling.late_share,
            stage_ranks=stage_ranks(cards, config.pool),
        ),
        executor,
        intakes,
        Foresight(new_policy),
        max_queue=scheduling.max_queue,
        policy_name=spec,
        observer=observer,
    )
    keep_corrections(
        engine,
        [(card, pool) for named, card, pool in zip(config.models, cards, pools, strict=True) if named.profile is None],
    )
    engine.start()
    if config.journal is None or journal is None:
        return Jobs(engine)
    jobs = JournalledJobs(engine, executor, journal, result_ttl_s=config.journal.result_ttl_s)
    try:
        await jobs.recover()
    except BaseException:
        await jobs.stop()
        raise
    return jobs


async def _made_ready(
    executor: Executor,
    model: _Model | None,
    card: ModelCard,
    pool: PoolConfig,
    config: EngineConfig,
    progress: StartProgress,
) -> _Model:
    """The model with what only its workers can tell: a profile if there is none, and what a change of LoRAs takes."""
    if model is None:
        profile = find_profile(card, pool, remeasure=config.remeasure)  # that of another model of its kind, meanwhile
        if profile is None:
            progress.step(f"measuring {card.name} on {hardware_name(pool)} (once)")
            profile = await measure_and_keep(executor, card, pool, progress.counted)
        model = _Model.of(card, pool, profile, Corrections())
    if card.loras and not model.cost.lora_s:
        progress.step("measuring a change of LoRAs")
        lora_s = await measure_lora(executor, card, pool, model.cost.profile.shapes[0])
        logger.info("a change of LoRAs takes %.4f s", lora_s)
        model = _Model.of(card, pool, model.cost.profile, model.cost.corrections, lora_s)
    return model


def _policies_of(models: Sequence[_Model], config: EngineConfig) -> tuple[Callable[[], Policy], CostModel, float]:
    """What makes policies for `models`; their cost model; how long the smallest requests can wait, in seconds.

    Making one raises ConfigError where the policy's argument is not allowed.
    """
    spec, scale = config.scheduling.policy, config.scheduling.default_slo_scale
    costs = {model.card.key: model.cost for model in models}
    cost: CostModel = models[0].cost if len(models) == 1 else CostByModel(costs)
    can_wait_s = min(
        slack_s(model.cost.profile.shapes, model.cost, MultipleRule(scale, model.cost), model.card.default_num_steps)
        for model in models
    )
    new_policy = partial(
        make_policy,
        spec,
        cost,
        num_ranks=config.pool.num_ranks,
        probes=[probe(shape, model=key) for key, each in costs.items() for shape in each.profile.shapes],
        slack_s=can_wait_s,
    )
    return new_policy, cost, can_wait_s


def _open_journal(config: EngineConfig, cards: Sequence[ModelCard]) -> Journal | None:
    if config.journal is None:
        return None
    served = [Model(card.name, card.fingerprint, card.key) for card in cards]
    return Journal(Path(config.journal.directory), *served)


def find_cards(config: EngineConfig) -> list[ModelCard]:
    """The cards of all models, each with its key, names, adapters and ranks.

    Raises:
        ConfigError: a model cannot be served, or clients could not tell two of them apart.
    """
    cards = [_find_card(model, has_key=len(config.models) > 1) for model in config.models]
    if len(cards) > 1:
        names = [name for card in cards for name in (card.name, *card.aliases, *(lora.name for lora in card.loras))]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{twice!r} is the name of two models or LoRAs; give each a name of its own")
    return cards


def _find_card(model: ModelConfig, *, has_key: bool) -> ModelCard:
    card = find_model(model.path, model.max_sequence_length, model.execution, model.adapter)
    names = (model.name, *model.served_model_names) if model.name else model.served_model_names
    if names:
        name, *aliases = names
        card = replace(card, name=name, aliases=tuple(aliases))
    return replace(with_loras(card, model.loras), key=model.name if has_key else "", ranks=model.ranks)


def find_model(
    model: str | None,
    max_sequence_length: int | None = None,
    execution: ExecutionConfig | None = None,
    adapter: str | None = None,
) -> ModelCard:
    """The card of a checkpoint directory; None is the bundled model.

    max_sequence_length: replaces the model's own; step times change with it, so that a profile belongs to one.
    execution: None is as its directory says.
    adapter: the family to serve it; None is the one that serves its pipeline class.

    Raises:
        CheckpointError: missing, incomplete or of an unsupported class.
        ConfigError: `max_sequence_length` is out of range, the execution does not go with the model's dtype, or what
            encodes videos is not installed.
    """
    card = read_card(BUNDLED_MODEL if model is None else Path(model), adapter)
    if card.makes_videos:
        check_encoder()
    if execution is not None:
        card = replace(card, execution=execution.of(card.execution.dtype))
    if max_sequence_length in (None, card.num_text_tokens):
        return card
    if card.num_text_tokens == 0:
        raise ConfigError(f"max-sequence-length is {max_sequence_length}, but {card.pipeline_class} takes none")
    longest = family_of(card).max_text_tokens
    if not 1 <= max_sequence_length <= longest:
        raise ConfigError(f"max-sequence-length is {max_sequence_length}; allowed: 1 to {longest}")
    fingerprint = f"{card.fingerprint}-text{max_sequence_length}"
    return replace(card, num_text_tokens=max_sequence_length, fingerprint=fingerprint)


async def measure_profile(
    model: str | None,
    pool: PoolConfig,
    shapes: tuple[Shape, ...],
    progress: StartProgress,
    max_sequence_length: int | None = None,
    execution: ExecutionConfig | None = None,
    adapter: str | None = None,
    loras: tuple[LoraConfig, ...] = (),
) -> tuple[ModelCard, Profile]:
    """Start workers, measure `shapes` (empty: the model's own sizes), stop them again.

    Raises:
        ConfigError: as `launch`.
    """
    _check_interpreter()
    _check_device(pool)
    card = with_loras(find_model(model, max_sequence_length, execution, adapter), loras)
    card.execution.check_device(pool.device)
    pool = pool_of(card, pool)
    for shape in shapes:
        if shape.height % card.size_multiple or shape.width % card.size_multiple:
            raise ConfigError(f"size {shape}: width and height must be multiples of {card.size_multiple}")
    executor = LocalExecutor([card], pool)
    await executor.start(progress.step)
    try:
        profile = await measure(executor, card, pool, shapes or card.sizes, progress.counted)
    finally:
        await executor.stop()
    if profile.doubt:
        logger.warning("%s (%s); measure again when it is quiet", BUSY, profile.doubt)
    return card, profile


def num_gpus() -> int:
    """GPUs that workers may use."""
    return len(visible_gpus())


def _check_interpreter() -> None:
    if sys.flags.optimize > 1:
        raise ConfigError("python -OO removes docstrings, which transformers reads; use -O, and unset PYTHONOPTIMIZE=2")


def _check_device(pool: PoolConfig) -> None:
    if pool.device != "cuda":
        return
    available = num_gpus()
    if available == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = "" if visible is None else f" among CUDA_VISIBLE_DEVICES={visible[:100]!r}"
        raise ConfigError(f"device is cuda, but nvidia-smi finds no GPU on this machine{among}; use --device cpu")
    if available < pool.num_gpus:
        each = f" for {pool.ranks_per_gpu} ranks each" if pool.ranks_per_gpu > 1 else ""
        raise ConfigError(
            f"ranks is {pool.num_ranks}, but there are {available} GPUs{each}; "
            f"use --ranks {available * pool.ranks_per_gpu}"
        )
