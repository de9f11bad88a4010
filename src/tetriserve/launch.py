"""Puts an engine together from a configuration: the one place where the parts meet."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import platformdirs

from tetriserve.config import EngineConfig, ExecutionConfig, LoraConfig, PoolConfig
from tetriserve.control.controller import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.errors import ConfigError, ProfileError
from tetriserve.core.execution import DEFAULT
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, ENCODE_IMAGE
from tetriserve.engine.intake import Intake
from tetriserve.engine.jobs import Jobs
from tetriserve.engine.journalled import JournalledJobs
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.observers import Observation, Observer, Stopped
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.protocol import Executor
from tetriserve.journal import Journal, Model
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.lora import with_loras
from tetriserve.models.registry import family_of
from tetriserve.models.video_file import check_encoder
from tetriserve.policies.fixed import FixedDegree
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import find_policy, make_policy, warn_of_long_rounds
from tetriserve.profile.corrections import Corrections
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.estimate import with_largest
from tetriserve.profile.learnt import load_corrections, save_corrections
from tetriserve.profile.table import Profile, load_profile, save_profile
from tetriserve.profiler.hardware import hardware_name, visible_gpus
from tetriserve.profiler.measure import measure, measure_lora
from tetriserve.profiler.warmup import warm_up
from tetriserve.workload.slo import MultipleRule, slack_s

logger = logging.getLogger(__name__)

BUNDLED_MODEL = Path(__file__).parent / "models" / "tiny"
BUNDLED_PROFILES = Path(__file__).parent / "profile" / "data"
_BUSY = "the machine was busy while the profile was measured: its times, and default deadlines, may be too long"


@dataclass(frozen=True)
class StartProgress:
    """Who hears how the start goes: `step` names what happens now, `counted` counts what is measured or warmed."""

    step: Callable[[str], None] = lambda text: logger.info("%s", text)
    counted: Callable[[int, int, str], None] = lambda done, total, text: None


async def launch(
    config: EngineConfig, progress: StartProgress, *, observer: Observer | None = None, profile: Profile | None = None
) -> Jobs:
    """A started engine, and the jobs above it. Whatever can be checked before workers start is checked before.

    Args:
        profile: one that an earlier engine of the same model and pool was launched with; None finds or measures one.

    Raises:
        ConfigError: model, profile, degrees or policy cannot be served; one line says why and how to mend it.
    """
    spec, pool = config.scheduling.policy, config.pool
    find_policy(spec)
    _check_interpreter()
    _check_device(pool)
    card = find_model(config.model, config.max_sequence_length, config.execution, config.adapter)
    card.execution.check_device(pool.device)
    if config.served_model_names:
        name, *aliases = config.served_model_names
        card = replace(card, name=name, aliases=tuple(aliases))
    card = with_loras(card, config.loras)
    pool = with_usable_degrees(card, pool)
    profile = profile or find_profile(replace(config, pool=pool), card)

    def plan_with(
        profile: Profile, corrections: Corrections, lora_s: float = 0.0
    ) -> tuple[Callable[[], Policy], ProfileCost]:
        cost = ProfileCost(
            profile,
            lambda shape: card.valid_degrees(pool.degrees),
            corrections,
            pool.max_batch,
            with_largest(profile, card.size_multiple),
            lora_s,
            lambda kind, shape: card.short_degrees(kind, shape, pool.degrees),
        )
        deadlines = MultipleRule(config.scheduling.default_slo_scale, cost)
        can_wait_s = slack_s(profile.shapes, cost, deadlines, card.default_num_steps)
        new_policy = partial(
            make_policy, spec, cost, num_ranks=pool.num_ranks, shapes=profile.shapes, slack_s=can_wait_s
        )
        warn_of_long_rounds(spec, new_policy(), can_wait_s)  # what is wrong with the policy shows now
        return new_policy, cost

    is_named = config.profile is not None  # then it is taken as it is written
    planned = None
    if profile is not None:
        planned = plan_with(profile, Corrections() if is_named else find_corrections(profile, card, pool))
    journal = _open_journal(config, card)
    try:
        executor = LocalExecutor([card], pool)
        await executor.start(progress.step)
        try:
            new_policy, cost = planned or plan_with(
                await measure_and_keep(executor, card, pool, progress), Corrections()
            )
            if card.loras and not cost.lora_s:
                progress.step("measuring a change of LoRAs")
                lora_s = await measure_lora(executor, card, cost.profile.shapes[0])
                logger.info("a change of LoRAs takes %.4f s", lora_s)
                new_policy, cost = plan_with(cost.profile, cost.corrections, lora_s)
            policy = new_policy()
            intake = Intake(
                card=card,
                cost=cost,
                default_slo_scale=config.scheduling.default_slo_scale,
                max_degree=policy.degree if isinstance(policy, FixedDegree) else None,
            )
            if pool.device == "cuda" or card.execution.compile != DEFAULT:
                progress.step("running every size once")
                await warm_up(executor, card, pool, cost, intake.sizes, progress.counted)
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
            stage_ranks=pool.stage_ranks,
        ),
        executor,
        [intake],
        Foresight(new_policy),
        max_queue=scheduling.max_queue,
        policy_name=spec,
        observer=observer,
    )
    if not is_named:
        keep_corrections(engine, card, pool)
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


def _open_journal(config: EngineConfig, card: ModelCard) -> Journal | None:
    if config.journal is None:
        return None
    return Journal(Path(config.journal.directory), Model(card.name, card.fingerprint))


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


def find_profile(config: EngineConfig, card: ModelCard) -> Profile | None:
    """The profile to plan with: the one named, else one for this model and hardware, else None: measure.

    One in doubt is taken only if it is named.

    Raises:
        ProfileError: the named profile is unreadable, for another model, or lacks a degree.
    """
    if config.profile is not None:
        profile = check_profile(load_profile(Path(config.profile)), config.profile, card, config.pool)
        if profile.doubt:
            logger.warning("the times of profile %s may be too long: %s", config.profile, profile.doubt)
        if not _knows_teams(profile, config.pool):
            logger.warning(
                "profile %s has no team_s, the seconds that a new set of ranks costs: requests run on any sets, "
                "and torch forms a group for each", config.profile,
            )  # fmt: skip
        if profile.execution != card.execution:
            logger.warning(
                "profile %s is of %s, but %s runs in %s", config.profile, profile.execution, card.name, card.execution
            )
        return profile
    if config.remeasure:
        return None
    kept = cached_profile_path(card, config.pool)
    for path in (kept, *sorted(BUNDLED_PROFILES.glob("*.json"))):
        if not path.exists():
            continue
        try:
            profile = check_profile(load_profile(path), str(path), card, config.pool)
        except ProfileError as error:
            logger.debug("not using a profile: %s", error)
            continue
        known = (profile.hardware, profile.fingerprint, profile.execution)
        wanted = (hardware_name(config.pool), card.fingerprint, card.execution)
        # Sizes may have been added since it was kept, larger batches be allowed, and pictures be encoded.
        is_enough = path != kept or profile.max_batch >= config.pool.max_batch
        is_enough = is_enough and (path != kept or not card.max_images or ENCODE_IMAGE in profile.stages)
        is_enough = is_enough and _knows_teams(profile, config.pool)
        is_enough = is_enough and (path != kept or _knows_decodes(profile, card, config.pool))
        if known == wanted and set(profile.shapes) >= set(card.sizes) and is_enough:
            if profile.doubt:
                logger.info("the kept profile is not used, it may be wrong: %s", profile.doubt)
                continue
            logger.info("using the profile %s", path)
            return profile
    return None


def check_profile(profile: Profile, name: str, card: ModelCard, pool: PoolConfig) -> Profile:
    """`profile` if it can plan for this model on this pool.

    Raises:
        ProfileError: it is for another model, or lacks a degree that the pool uses.
    """
    if profile.fingerprint and profile.fingerprint != card.fingerprint:
        raise ProfileError(
            f"profile {name} is for model {profile.model!r} ({profile.fingerprint}), "
            f"not for {card.name!r} ({card.fingerprint}); measure one with: tetriserve profile {card.path}"
        )
    for shape in profile.shapes:
        measured = {row.degree for row in profile.rows if row.shape == shape and row.tokens}
        missing = [degree for degree in card.valid_degrees(pool.degrees) if degree not in measured]
        if missing:
            raise ProfileError(
                f"profile {name} has no row for {shape} at degree {missing[0]}; measure one with --degrees "
                f"{','.join(map(str, pool.degrees))}, or serve with --degrees {','.join(map(str, sorted(measured)))}"
            )
    return profile


def _knows_teams(profile: Profile, pool: PoolConfig) -> bool:
    """Whether `team_s` is right where groups of torch are formed, which takes time; earlier versions wrote none."""
    return pool.collectives == "shm" or profile.team_s > 0


def _knows_decodes(profile: Profile, card: ModelCard, pool: PoolConfig) -> bool:
    """Whether it has each size's decode at all degrees that its tiles allow; earlier versions measured one."""
    known = {(row.shape, row.degree) for row in profile.rows_of(DECODE)}
    return all(
        (shape, degree) in known for shape in card.sizes for degree in card.short_degrees(DECODE, shape, pool.degrees)
    )


def find_corrections(profile: Profile, card: ModelCard, pool: PoolConfig) -> Corrections:
    """What an earlier engine learnt about `profile` on this hardware; none if it cannot be read."""
    path = corrections_path(card, pool)
    try:
        corrections = load_corrections(path, profile, hardware_name(pool))
    except ProfileError as error:
        logger.warning("the profile is corrected anew: %s", error)
        return Corrections()
    if corrections != Corrections():
        logger.info("correcting the profile by what was observed until the last stop (%s)", path)
    return corrections


def keep_corrections(engine: LiveEngine, card: ModelCard, pool: PoolConfig) -> None:
    """Save what `engine` has learnt when it stops, unless it failed."""

    def on_observation(observation: Observation) -> None:
        if not isinstance(observation, Stopped) or engine.failure is not None:
            return
        cost = engine.controller.cost
        if not isinstance(cost, ProfileCost) or cost.corrections == Corrections():
            return
        try:
            save_corrections(cost.corrections, corrections_path(card, pool), cost.profile, hardware_name(pool))
        except ProfileError as error:
            logger.warning("the next start corrects the profile anew: %s", error)

    engine.subscribe(on_observation)


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
    pool = with_usable_degrees(card, pool)
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
        logger.warning("%s (%s); measure again when it is quiet", _BUSY, profile.doubt)
    return card, profile


def num_gpus() -> int:
    """GPUs that workers may use."""
    return len(visible_gpus())


def cache_directory() -> Path:
    """Where built models and measured profiles are kept for this user."""
    return platformdirs.user_cache_path("tetriserve")


def cached_profile_path(card: ModelCard, pool: PoolConfig) -> Path:
    """One file per model, execution, hardware and degrees."""
    parts = (card.fingerprint, str(card.execution), hardware_name(pool), "-".join(map(str, pool.degrees)))
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(parts))
    return cache_directory() / "profiles" / f"{name}.json"


def corrections_path(card: ModelCard, pool: PoolConfig) -> Path:
    """Beside the cached profile, whichever profile they correct."""
    return cached_profile_path(card, pool).with_suffix(".corrections.json")


async def measure_and_keep(executor: Executor, card: ModelCard, pool: PoolConfig, progress: StartProgress) -> Profile:
    """A profile of the model's own sizes, kept for later starts."""
    progress.step(f"measuring {card.name} on {hardware_name(pool)} (once)")
    profile = await measure(executor, card, pool, card.sizes, progress.counted)
    if profile.doubt:
        logger.warning("%s (%s); the next start measures again, unless --profile names one", _BUSY, profile.doubt)
    path = cached_profile_path(card, pool)
    try:
        save_profile(profile, path)
    except ProfileError as error:  # a read-only home is no reason not to serve
        logger.warning("the profile is measured again at the next start: %s", error)
    else:
        logger.info("measured a profile and kept it in %s", path)
    return profile


def with_usable_degrees(card: ModelCard, pool: PoolConfig) -> PoolConfig:
    """`pool` without degrees, which a warning names, and batches that the model cannot run."""
    usable = card.valid_degrees(pool.degrees)
    dropped = [degree for degree in pool.degrees if degree not in usable]
    if dropped:
        logger.warning(
            "degrees %s are not used: a degree must divide the %d attention heads of %s",
            ",".join(map(str, dropped)), card.num_heads, card.name,
        )  # fmt: skip
    return replace(pool, degrees=usable, max_batch=pool.max_batch if card.can_batch else 1)


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
