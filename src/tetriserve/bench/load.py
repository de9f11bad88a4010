"""What is asked of the server: how many requests, when, of which sizes, by which deadlines."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from tetriserve.bench.prompts import load_prompts, made_up_prompt
from tetriserve.bench.target import Target
from tetriserve.core.bounds import MAX_REQUESTS, MAX_SEED, MAX_STEPS, MAX_TIME_S, SLO_SCALES, check_range, shown
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import MAX_SIDE, Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.workload.arrivals import parse_arrivals
from tetriserve.workload.mixes import Mix, parse_mix
from tetriserve.workload.randomness import RandomSource
from tetriserve.workload.slo import BASE_DEADLINES_S, DeadlineRule, TableRule
from tetriserve.workload.synthesis import Portion, Synthesis
from tetriserve.workload.traces import load_trace

_UNKNOWN_STEPS = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A workload as an operator describes it, before the server is asked what it serves.

    mix: as `parse_mix` reads it, over the sizes of `slo_table`, else the server's, else the paper's.
    request_config: instead of a mix, JSON as the peers' benches read it: objects of width, height,
        num_inference_steps and weight.
    rate_per_min: on average; infinite: all at once.
    num_steps: None takes what `/v1/models` says, else the server's own number.
    slo_table: base deadlines, as `parse_slo_table` reads them; None for the paper's.
    slo_multiple: instead of a table: a multiple of each size's time alone, as the warm-up measures it.
    trace: requests from this file; then mix, rate, arrivals and number are not used.
    """

    mix: str = "uniform"
    request_config: str | None = None
    num_requests: int = 300
    rate_per_min: float = 12.0
    arrivals: str = "poisson"
    num_steps: int | None = None
    slo_table: str | None = None
    slo_scale: float = 1.0
    slo_multiple: float | None = None
    trace: Path | None = None
    prompts: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("num-prompts", self.num_requests, 1, MAX_REQUESTS)
        check_range("seed", self.seed, -MAX_SEED, MAX_SEED)
        if self.rate_per_min != math.inf:
            parse_arrivals(self.arrivals, self.rate_per_min)
        check_range("slo-scale", self.slo_scale, *SLO_SCALES)
        if self.num_steps is not None:
            check_range("num-inference-steps", self.num_steps, 1, MAX_STEPS)
        if self.slo_multiple is not None:
            check_range("slo-multiple", self.slo_multiple, *SLO_SCALES)

    def deadlines(self, alone_s: Mapping[Shape, float]) -> TableRule:
        """The rule. alone_s: seconds that each size takes alone; looked at only for `slo_multiple`.

        Raises:
            ConfigError: the table or the scale cannot be used.
        """
        if self.slo_multiple is not None:
            return TableRule(self.slo_multiple, alone_s)
        return TableRule(
            self.slo_scale, BASE_DEADLINES_S if self.slo_table is None else parse_slo_table(self.slo_table)
        )

    def requests(self, target: Target, deadlines: DeadlineRule) -> list[Request]:
        """The requests in order of arrival; equal loads and targets give equal requests.

        Times, sizes and seeds are those of `tetriserve simulate` with the same options.

        Raises:
            ConfigError: an option cannot be used.
        """
        draw_prompt = made_up_prompt if self.prompts is None else load_prompts(self.prompts)
        words = random.Random(f"prompts {self.seed}")
        return [
            replace(request, prompt=request.prompt or draw_prompt(words)) for request in self._bare(target, deadlines)
        ]

    def _bare(self, target: Target, deadlines: DeadlineRule) -> Iterator[Request]:
        """Requests without prompts, but for those that a trace has."""
        num_steps = self.num_steps if self.num_steps is not None else target.num_steps or _UNKNOWN_STEPS
        if self.trace is not None:
            yield from _only_images(load_trace(self.trace, default_steps=num_steps, deadlines=deadlines))
            return
        mix, steps = self._mix(target)
        synthesis = Synthesis(
            arrivals=AtOnce() if self.rate_per_min == math.inf else parse_arrivals(self.arrivals, self.rate_per_min),
            portions=(Portion(mix=mix, num_steps=num_steps or 1),),
            deadlines=deadlines,
            num_requests=self.num_requests,
        )
        for request in synthesis.requests(random.Random(self.seed)):
            yield replace(request, stages=image_stages(steps.get(request.shape, num_steps)))

    def _mix(self, target: Target) -> tuple[Mix, Mapping[Shape, int]]:
        """The mix, and the steps of sizes that have a number of their own."""
        if self.request_config is not None:
            return parse_request_config(self.request_config)
        named = () if self.slo_table is None else tuple(parse_slo_table(self.slo_table))
        mix = parse_mix(self.mix, named or target.shapes or tuple(BASE_DEADLINES_S))
        if videos := [shape for shape in mix.shapes if shape.frames != 1]:
            raise ConfigError(f"mix {self.mix!r} asks for {videos[0].frames} frames; the bench asks for 1")
        return mix, {}


def _only_images(requests: Iterable[Request]) -> Iterator[Request]:
    for request in requests:
        if request.shape.frames != 1:
            raise ConfigError(
                f"trace: {request.request_id} asks for {request.shape.frames} frames; the bench asks for 1"
            )
        yield request


@dataclass(frozen=True, slots=True)
class AtOnce:
    """All requests at the start: how fast a server works through a queue."""

    def times(self, random: RandomSource) -> Iterator[float]:
        return repeat(0.0)


class NoDeadline:
    """For requests whose deadlines are not known yet."""

    def slo_s(self, request: Request) -> float:
        return math.inf


def parse_slo_table(spec: str) -> Mapping[Shape, float]:
    """Seconds by size: `256x256:1.5,512x512:2`.

    Raises:
        ConfigError: not of that form, or a number that is not above 0.
    """
    usage = f"slo-table is {spec!r}; write seconds by size, such as 256x256:1.5,512x512:2"
    table: dict[Shape, float] = {}
    for item in spec.split(","):
        size, _, seconds = item.partition(":")
        try:
            shape, base_s = Shape.parse(size.strip()), float(seconds)
        except ValueError:
            raise ConfigError(usage) from None
        if shape in table or not 0 < base_s <= MAX_TIME_S:
            raise ConfigError(usage)
        table[shape] = base_s
    return table


def parse_request_config(text: str) -> tuple[Mix, Mapping[Shape, int]]:
    """A mix, and steps by size, from `[{"width": 512, "height": 512, "num_inference_steps": 20, "weight": 1}]`.

    Raises:
        ConfigError: not of that form, a field that is not known, or a size that occurs twice.
    """
    known = ("width", "height", "num_inference_steps", "weight")
    usage = f"random-request-config must be a JSON list of objects with {', '.join(known)}"
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{usage}: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(usage)
    weights: dict[Shape, float] = {}
    steps: dict[Shape, int] = {}
    for row in rows:
        if unknown := sorted(row.keys() - {*known}):
            raise ConfigError(f"{usage}; {unknown[0]!r} is none of them")
        shape = Shape(_whole(row, "height", MAX_SIDE), _whole(row, "width", MAX_SIDE))
        if shape in weights:
            raise ConfigError(f"random-request-config names {shape} twice; give each size one object")
        weight = row.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"random-request-config: weight is {shown(weight)}; it must be a number")
        weights[shape] = weight
        if "num_inference_steps" in row:
            steps[shape] = _whole(row, "num_inference_steps", MAX_STEPS)
    return Mix(tuple(weights), tuple(weights.values())), steps


def _whole(row: Mapping[str, object], name: str, most: int) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"random-request-config: {name} is {shown(value)}; it must be a whole number")
    check_range(f"random-request-config: {name}", value, 1, most)
    return value
