"""The models of a simulated pool: each a profile, and what its requests are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tetriserve.core.bounds import MAX_STEPS, check_range
from tetriserve.core.cost import narrowest_s
from tetriserve.core.errors import ConfigError, ProfileError
from tetriserve.core.probes import probe
from tetriserve.core.request import Request, Shape
from tetriserve.profile.bundled import open_profile
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.table import Profile
from tetriserve.workload.slo import DeadlineRule, MultipleRule, TableRule, slack_s

IMAGE_STEPS, IMAGE_PASSES = 28, 1
VIDEO_STEPS, VIDEO_PASSES = 50, 2
"""Of a request, by default. Models of videos guide each step by a second prompt, which takes a pass of its own."""
MAX_PASSES = 8


@dataclass(frozen=True, kw_only=True)
class SimulatedModel:
    """One of the models that share a pool, as the user writes it.

    key: what requests, mixes and traces call it; empty where it is the only one.
    profile: name of a bundled profile, or a path.
    num_steps, num_passes: of each request, and of the model in each step; None: 28 and 1, or 50 and 2 where the profile
        is one of videos.
    slo_multiple: deadlines as a multiple of the time alone at the narrowest degrees; None takes the paper's table times
        `slo_scale`.
    """

    key: str = ""
    profile: str
    num_steps: int | None = None
    num_passes: int | None = None
    slo_scale: float = 1.0
    slo_multiple: float | None = None


@dataclass(frozen=True, kw_only=True)
class PooledModel:
    """A model made ready: its profile is open, and its numbers have been checked."""

    key: str
    profile_name: str
    cost: ProfileCost
    num_steps: int
    num_passes: int
    deadlines: DeadlineRule

    @property
    def profile(self) -> Profile:
        return self.cost.profile

    @property
    def least_degree(self) -> int:
        return self.profile.degrees[0]

    @cached_property
    def probes(self) -> tuple[Request, ...]:
        """A request of each measured shape."""
        return tuple(map(self._request, self.profile.shapes))

    @property
    def slack_s(self) -> float:
        """How long a request of the smallest measured size can wait."""
        return slack_s(
            self.profile.shapes, self.cost, self.deadlines, self.num_steps, num_passes=self.num_passes, model=self.key
        )

    def check_covered(self, shape: Shape) -> None:
        """Every shape is checked before anything runs: a missing one would show only when it first arrives.

        Raises:
            ProfileError: the profile has no times for it.
        """
        try:
            narrowest_s(self.cost, self._request(shape))
        except ProfileError as error:
            measured = ", ".join(map(str, self.profile.shapes))
            raise ProfileError(
                f"profile {self.profile_name} does not cover {shape}: {error} (measured: {measured})"
            ) from error

    def check_deadline(self, shape: Shape) -> None:
        """Raises: ConfigError: there is no deadline for it."""
        try:
            self.deadlines.slo_s(self._request(shape))
        except ConfigError as error:
            raise ConfigError(f"model {self.key}: {error}" if self.key else str(error)) from None

    def _request(self, shape: Shape) -> Request:
        return probe(shape, self.num_steps, self.num_passes, self.key)


def open_models(
    models: Sequence[SimulatedModel], num_ranks: int | None, ranks_per_node: int | None = None
) -> tuple[tuple[PooledModel, ...], int]:
    """Open the profiles and check the numbers.

    Args:
        num_ranks: of the pool; None takes the largest degree of any profile.
        ranks_per_node: wider degrees are left out; None: the pool is one node.

    Returns:
        The models, and the number of ranks.

    Raises:
        ConfigError: a profile or a number cannot be used.
    """
    profiles = [open_profile(model.profile) for model in models]
    if num_ranks is None:
        num_ranks = ranks_per_node or max(profile.degrees[-1] for profile in profiles)
    widest = min(num_ranks, ranks_per_node or num_ranks)
    return tuple(_open(model, profile, widest) for model, profile in zip(models, profiles, strict=True)), num_ranks


def _open(model: SimulatedModel, profile: Profile, widest: int) -> PooledModel:
    is_video = profile.frame_step > 1
    num_steps = (VIDEO_STEPS if is_video else IMAGE_STEPS) if model.num_steps is None else model.num_steps
    num_passes = (VIDEO_PASSES if is_video else IMAGE_PASSES) if model.num_passes is None else model.num_passes
    check_range("steps", num_steps, 1, MAX_STEPS)
    check_range("passes", num_passes, 1, MAX_PASSES)
    degrees = tuple(degree for degree in profile.degrees if degree <= widest)
    if not degrees:
        raise ConfigError(f"ranks is {widest}; profile {model.profile} starts at degree {profile.degrees[0]}")
    cost = ProfileCost(profile, lambda shape: degrees)
    return PooledModel(
        key=model.key,
        profile_name=model.profile,
        cost=cost,
        num_steps=num_steps,
        num_passes=num_passes,
        deadlines=TableRule(model.slo_scale) if model.slo_multiple is None else MultipleRule(model.slo_multiple, cost),
    )
