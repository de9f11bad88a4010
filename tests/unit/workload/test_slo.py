"""Deadline rules in seconds."""

from __future__ import annotations

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.profile import ProfileCost
from tetriserve.profile.bundled import open_profile
from tetriserve.workload.slo import MultipleRule, TableRule, slack_s


def of(height: int, width: int | None = None, num_steps: int = 28) -> Request:
    shape = Shape(height, width or height)
    return Request(
        request_id="r", prompt="", shape=shape, stages=image_stages(num_steps), seed=0, arrival_s=7.0, deadline_s=7.0
    )


@pytest.mark.parametrize(("side", "base_s"), [(256, 1.5), (512, 2.0), (1024, 3.0), (2048, 5.0)])
def test_the_papers_deadlines_times_the_scale(side: int, base_s: float) -> None:
    assert TableRule(1.2).slo_s(of(side)) == pytest.approx(1.2 * base_s)


def test_a_size_in_between_lies_on_the_line_between_its_neighbours() -> None:
    share = (1536**2 - 1024**2) / (2048**2 - 1024**2)
    assert TableRule().slo_s(of(1536)) == pytest.approx(3.0 + 2.0 * share)
    assert TableRule().slo_s(of(512, 2048)) == pytest.approx(3.0)  # as many pixels as 1024x1024


@pytest.mark.parametrize("side", [128, 4096])
def test_a_size_outside_the_table_is_refused(side: int) -> None:
    with pytest.raises(ConfigError, match=f"no deadline is known for {side}x{side}, only from 256x256 to 2048x2048"):
        TableRule().slo_s(of(side))


def test_a_multiple_of_the_time_alone_at_degree_1() -> None:
    cost = ProfileCost(open_profile("flux.1-dev-8xh100"))
    assert MultipleRule(3.0, cost).slo_s(of(1024)) == pytest.approx(3 * (0.02 + 28 * 0.1536 + 0.06))


def test_what_the_smallest_size_can_wait_is_its_deadline_less_its_time_alone_at_its_best_degree() -> None:
    cost = ProfileCost(open_profile("flux.1-dev-8xh100"))
    alone_s = 0.02 + 28 * 0.0175 + 0.005
    sizes = [Shape(1024, 1024), Shape(256, 256)]
    assert slack_s(sizes, cost, TableRule(), 28) == pytest.approx(1.5 - alone_s)
    assert slack_s(sizes, cost, TableRule(0.1), 28) == pytest.approx(0.15 - alone_s)
    qwen = ProfileCost(open_profile("qwen-image-4xh20"))
    assert slack_s(qwen.profile.shapes, qwen, TableRule(), 28) < 0  # the paper's deadlines are out of reach there


def test_a_smallest_size_without_a_deadline_can_wait_for_ever() -> None:
    cost = ProfileCost(open_profile("flux.1-dev-8xh100"))
    rule = TableRule(base_s={Shape(1024, 1024): 3.0, Shape(2048, 2048): 5.0})
    assert slack_s([Shape(256, 256)], cost, rule, 28) == float("inf")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_that_cannot_be_is_named(value: float) -> None:
    with pytest.raises(ConfigError, match="slo-scale is .*; allowed: 0.001 to"):
        TableRule(value)
    with pytest.raises(ConfigError, match="slo-multiple is .*; allowed: 0.001 to"):
        MultipleRule(value, ProfileCost(open_profile("flux.1-dev-8xh100")))
