"""GenServe's setting: half images, half videos, at rates that follow from the load."""

from __future__ import annotations

from statistics import fmean

import pytest

from tetriserve.core.cost import stages_gpu_s
from tetriserve.report.paper.experiment import Experiment
from tetriserve.report.paper.gen_serve import LOADS, POLICIES, images_beside_videos, scenario_at
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.simulator.study import Study


def test_the_load_is_the_least_gpu_time_of_what_arrives_over_the_pools() -> None:
    scenario = scenario_at(Scenario(num_requests=4000), 0.75)
    setting = prepare(scenario)
    requests = list(setting.requests(0))
    assert sum(request.model == "videos" for request in requests) == pytest.approx(2000, abs=100)
    least_s = fmean(stages_gpu_s(setting.cost, request, request.stages) for request in requests)
    assert scenario.rate_per_min * least_s == pytest.approx(0.75 * 60 * 8, rel=0.05)


def test_attainment_of_images_and_of_videos_is_beside_that_of_all() -> None:
    with Study([0]) as study:
        experiment = Experiment(
            study=study, base=Scenario(num_requests=6), fixed=(), others=(), has_bound=True, clock=lambda: 0.0
        )
        exhibit = images_beside_videos(experiment)
    assert [column.heading for column in exhibit.sheet.columns[:7]] == [
        "load", "per minute", "policy", "SAR", "± 95 %", "SAR images", "SAR videos",
    ]  # fmt: skip
    assert len(exhibit.sheet.rows) == len(LOADS) * (len(POLICIES) + 1)
    assert exhibit.figure is not None
    assert [axes.get_title() for axes in exhibit.figure.axes] == ["all", "images", "videos"]
    assert "--mix images:1,videos:1" in exhibit.command
