"""Profiles of models: found, measured where there is none, kept, and with them what engines learn about them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from tetriserve.config import PoolConfig
from tetriserve.core.errors import ProfileError
from tetriserve.core.models import of_model
from tetriserve.core.stages import DECODE, ENCODE_IMAGE
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.observers import Observation, Stopped
from tetriserve.executor.protocol import Executor
from tetriserve.models.card import ModelCard
from tetriserve.profile.by_model import CostByModel
from tetriserve.profile.corrections import Corrections
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.learnt import load_corrections, save_corrections
from tetriserve.profile.table import Profile, load_profile, save_profile
from tetriserve.profiler.hardware import hardware_name
from tetriserve.profiler.measure import OnProgress, measure

logger = logging.getLogger(__name__)

BUNDLED_PROFILES = Path(__file__).parent / "profile" / "data"
BUSY = "the machine was busy while the profile was measured: its times, and default deadlines, may be too long"


def find_profile(
    card: ModelCard, pool: PoolConfig, named: str | None = None, *, remeasure: bool = False
) -> Profile | None:
    """The profile to plan with: the one named, else one for this model and hardware, else None: measure.

    One in doubt is taken only if it is named.

    Args:
        pool: the model's part of it (`models.ranks.pool_of`), here as everywhere in this module.
        named: path of the file to take.
        remeasure: take none that was kept.

    Raises:
        ProfileError: the named profile is unreadable, for another model, or lacks a degree.
    """
    if named is not None:
        profile = check_profile(load_profile(Path(named)), named, card, pool)
        if profile.doubt:
            logger.warning("the times of profile %s may be too long: %s", named, profile.doubt)
        if not _knows_teams(profile, pool):
            logger.warning(
                "profile %s has no team_s, the seconds that a new set of ranks costs: requests run on any sets, "
                "and torch forms a group for each", named,
            )  # fmt: skip
        if profile.execution != card.execution:
            logger.warning(
                "profile %s is of %s, but %s runs in %s", named, profile.execution, card.name, card.execution
            )
        return profile
    if remeasure:
        return None
    kept = cached_profile_path(card, pool)
    for path in (kept, *sorted(BUNDLED_PROFILES.glob("*.json"))):
        if not path.exists():
            continue
        try:
            profile = check_profile(load_profile(path), str(path), card, pool)
        except ProfileError as error:
            logger.debug("not using a profile: %s", error)
            continue
        known = (profile.hardware, profile.fingerprint, profile.execution)
        wanted = (hardware_name(pool), card.fingerprint, card.execution)
        # Sizes may have been added since it was kept, larger batches be allowed, and pictures be encoded.
        is_enough = path != kept or profile.max_batch >= pool.max_batch
        is_enough = is_enough and (path != kept or not card.max_images or ENCODE_IMAGE in profile.stages)
        is_enough = is_enough and _knows_teams(profile, pool)
        is_enough = is_enough and (path != kept or _knows_decodes(profile, card, pool))
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
    """Whether it has each size's decode at all degrees above 1 that its tiles allow; earlier versions measured none."""
    known = {(row.shape, row.degree) for row in profile.rows_of(DECODE)}
    return all(
        (shape, degree) in known
        for shape in card.sizes
        for degree in card.short_degrees(DECODE, shape, pool.degrees)
        if degree > 1
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


def keep_corrections(engine: LiveEngine, models: Sequence[tuple[ModelCard, PoolConfig]]) -> None:
    """Save what `engine` has learnt about the profiles of `models` when it stops, unless it failed."""

    def on_observation(observation: Observation) -> None:
        if not isinstance(observation, Stopped) or engine.failure is not None:
            return
        cost = engine.controller.cost
        for card, pool in models:
            own = of_model(cost.costs, card.key) if isinstance(cost, CostByModel) else cost
            if not isinstance(own, ProfileCost) or own.corrections == Corrections():
                continue
            try:
                save_corrections(own.corrections, corrections_path(card, pool), own.profile, hardware_name(pool))
            except ProfileError as error:
                logger.warning("the next start corrects the profile anew: %s", error)

    engine.subscribe(on_observation)


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


async def measure_and_keep(executor: Executor, card: ModelCard, pool: PoolConfig, on_progress: OnProgress) -> Profile:
    """A profile of the model's own sizes, kept for later starts."""
    profile = await measure(executor, card, pool, card.sizes, on_progress)
    if profile.doubt:
        logger.warning("%s (%s); the next start measures again, unless --profile names one", BUSY, profile.doubt)
    path = cached_profile_path(card, pool)
    try:
        save_profile(profile, path)
    except ProfileError as error:  # a read-only home is no reason not to serve
        logger.warning("the profile is measured again at the next start: %s", error)
    else:
        logger.info("measured a profile and kept it in %s", path)
    return profile
