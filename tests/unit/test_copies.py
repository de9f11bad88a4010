"""The books of a cluster's states: where each is, what the head may drop, and where a lost node leaves a request."""

from __future__ import annotations

from tetriserve.core.events import Result, StateLost, TensorRef, Work
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, image_stages
from tetriserve.executor.copies import HEAD, Copies

REQUEST = Request(
    request_id="r", prompt="p", shape=Shape(256, 256), stages=image_stages(4), seed=0, arrival_s=0.0, deadline_s=1.0
)
EMBEDS, FIRST, SECOND = (TensorRef(f"r.{name}", 1) for name in ("embeds", "first", "second"))
BEGUN = Work(REQUEST, 0, 0, {})
ENCODED = Work(REQUEST, 1, 0, {ENCODE: EMBEDS})
ONE_DONE = Work(REQUEST, 1, 1, {ENCODE: EMBEDS, DENOISE: FIRST})


def stand(work: Work) -> StateLost:
    return StateLost("r", work.stage_index, work.steps_done, work.states)


def two_steps_on_node_0() -> Copies:
    copies = Copies()
    copies.start(BEGUN)
    copies.finish(BEGUN, ENCODE, Result(EMBEDS, 0, is_stage_over=True), 0)
    copies.finish(ENCODED, DENOISE, Result(FIRST, 1, is_stage_over=False), 0)
    copies.finish(ONE_DONE, DENOISE, Result(SECOND, 1, is_stage_over=False), 0)
    return copies


def test_a_newer_state_takes_the_place_of_the_older_on_its_node() -> None:
    copies = two_steps_on_node_0()
    assert copies.places("r", SECOND.key) == {0}
    assert copies.places("r", FIRST.key) == set()


def test_a_loss_before_any_copy_takes_a_request_back_to_its_beginning() -> None:
    assert two_steps_on_node_0().lose(0) == [stand(BEGUN)]


def test_a_loss_takes_a_request_back_to_the_newest_step_whose_states_are_all_copied() -> None:
    copies = two_steps_on_node_0()
    assert copies.arrive("r", FIRST.key, HEAD) == []
    assert copies.arrive("r", EMBEDS.key, HEAD) == []
    assert copies.lose(0) == [stand(ONE_DONE)]


def test_nothing_is_lost_with_a_node_whose_states_are_copied_or_elsewhere() -> None:
    for place in (HEAD, 1):
        copies = two_steps_on_node_0()
        copies.arrive("r", EMBEDS.key, HEAD)
        copies.arrive("r", SECOND.key, place)
        assert copies.lose(0) == []
        assert copies.places("r", SECOND.key) == {place}


def test_the_head_drops_a_copy_once_a_newer_step_is_there_as_a_whole() -> None:
    copies = two_steps_on_node_0()
    copies.arrive("r", FIRST.key, HEAD)
    assert copies.arrive("r", SECOND.key, HEAD) == [], "the embeddings of both steps are still to come"
    assert copies.arrive("r", EMBEDS.key, HEAD) == [FIRST]


def test_what_a_request_brings_along_is_at_the_head() -> None:
    copies = Copies()
    copies.start(ONE_DONE)
    assert copies.places("r", FIRST.key) == {HEAD}
    copies.finish(ONE_DONE, DENOISE, Result(SECOND, 1, is_stage_over=False), 1)
    assert copies.lose(1) == [stand(ONE_DONE)]


def test_a_forgotten_request_has_no_places() -> None:
    copies = two_steps_on_node_0()
    copies.forget("r")
    assert "r" not in copies
    assert copies.places("r", EMBEDS.key) == set()
    assert copies.lose(0) == []
