"""Algorithm 1 against enumeration of every choice, and its tie-breaks by hand."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.policies.packing import ARRAY_CAPACITY, Option, OptionGroup, objective, pack_round

options = st.lists(st.builds(Option, st.sampled_from([1, 2, 3, 4, 8]), st.booleans()), max_size=3)
any_group = st.builds(OptionGroup, options, st.booleans())
narrow_options = st.lists(st.builds(Option, st.integers(1, 3), st.just(True)), max_size=2)
patient_group = st.builds(OptionGroup, narrow_options, st.just(True))
groups_of_requests = st.lists(any_group, max_size=5) | st.lists(patient_group, max_size=5)


def width(groups, chosen):
    return sum(group.options[index].width for group, index in zip(groups, chosen, strict=True) if index is not None)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(groups=groups_of_requests, capacity=st.integers(0, 9))
def test_equals_enumeration_in_objective(groups, capacity):
    chosen = pack_round(groups, capacity)
    assert width(groups, chosen) <= capacity
    choices = product(*[[None, *range(len(group.options))] for group in groups])
    best = max(objective(groups, choice, capacity) for choice in choices if width(groups, choice) <= capacity)
    assert objective(groups, chosen, capacity) == best


wide_options = st.lists(st.builds(Option, st.sampled_from([1, 8, 16, 24, 32]), st.booleans()), max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    groups=st.lists(st.builds(OptionGroup, wide_options, st.booleans()), max_size=5),
    capacity=st.integers(ARRAY_CAPACITY, 2 * ARRAY_CAPACITY),
)
def test_equals_enumeration_in_a_large_pool(groups, capacity):
    chosen = pack_round(groups, capacity)
    assert width(groups, chosen) <= capacity
    choices = product(*[[None, *range(len(group.options))] for group in groups])
    best = max(objective(groups, choice, capacity) for choice in choices if width(groups, choice) <= capacity)
    assert objective(groups, chosen, capacity) == best


def test_thousands_of_requests_fill_a_thousand_ranks_with_the_most_urgent():
    groups = [OptionGroup([Option(1 + position % 2, True)], survives_deferred=False) for position in range(3000)]
    chosen = pack_round(groups, 1024)
    assert [position for position, index in enumerate(chosen) if index is not None] == list(range(0, 2048, 2))


def test_two_survivors_beat_one_wide_request():
    wide = OptionGroup([Option(8, True)], survives_deferred=False)
    narrow = OptionGroup([Option(4, True)], survives_deferred=False)
    assert pack_round([wide, narrow, narrow], 8) == (None, 0, 0)


def test_the_one_that_deferring_would_lose_goes_before_those_it_would_not():
    patient = OptionGroup([Option(4, True)], survives_deferred=True)
    pressed = OptionGroup([Option(8, True)], survives_deferred=False)
    assert pack_round([patient, patient, pressed], 8) == (None, None, 0)


def test_running_is_preferred_when_deferring_survives_too():
    assert pack_round([OptionGroup([Option(1, True)], survives_deferred=True)], 8) == (0,)


def test_the_more_urgent_of_equals_runs():
    group = OptionGroup([Option(8, True)], survives_deferred=True)
    assert pack_round([group, group, group], 8) == (0, None, None)


def test_of_two_options_that_survive_the_narrower_is_taken():
    assert pack_round([OptionGroup([Option(8, True), Option(4, True)], survives_deferred=True)], 8) == (1,)
    assert pack_round([OptionGroup([Option(8, True), Option(4, False)], survives_deferred=True)], 8) == (0,)


def test_no_capacity_or_no_request():
    assert pack_round([OptionGroup([Option(1, True)], survives_deferred=False)], 0) == (None,)
    assert pack_round([], 8) == ()


def test_urgency_decides_even_where_the_order_of_the_groups_alone_would_not():
    """Four survivors, three running and no rank left over: groups 1, 2 and 4, or the less urgent 2, 3 and 4."""
    groups = [
        OptionGroup([Option(2, False), Option(3, True), Option(4, True)], survives_deferred=True),
        OptionGroup([Option(4, True)], survives_deferred=False),
        OptionGroup([Option(2, True), Option(1, True)], survives_deferred=True),
        OptionGroup([Option(3, False), Option(2, True), Option(4, True)], survives_deferred=True),
        OptionGroup([Option(3, True), Option(3, True), Option(1, False)], survives_deferred=False),
    ]
    assert pack_round(groups, 6) == (None, 0, 1, None, 2)
