"""The schedule that changes at every step."""

from __future__ import annotations

from collections import Counter

import pytest

from tetriserve.core.errors import ConfigError


def test_every_step_is_a_task_at_a_degree_and_on_ranks_of_its_own(drive, make, request_of, flux):
    run = drive(make("unsteady", flux), [request_of(1024, num_steps=200)], flux)
    tasks = run.denoise("r")
    assert [task.num_steps for task in tasks] == [1] * 200
    degrees = Counter(task.degree for task in tasks)
    assert set(degrees) == {1, 2, 4, 8}
    assert min(degrees.values()) >= 30
    leaders = Counter(task.ranks[0] for task in tasks)
    assert set(leaders) == set(range(8))
    assert len({task.ranks for task in tasks if task.degree == 2}) > 10


def test_equal_requests_go_through_equal_degrees(drive, make, request_of, flux):
    first, again, other = (
        drive(make("unsteady", flux), [request_of(1024, seed=seed)], flux).denoise("r") for seed in (5, 5, 6)
    )
    assert first == again
    assert [task.degree for task in first] != [task.degree for task in other]


def test_it_takes_no_argument(make, flux):
    with pytest.raises(ConfigError, match="'unsteady:3'.*no argument"):
        make("unsteady:3", flux)
