"""Scenes, their captions and drawings agree with each other and with the checker."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from tetriserve.evaluation.captions import WORDS, write_caption
from tetriserve.evaluation.drawing import MARGIN, draw_image, place_items
from tetriserve.evaluation.reading import Reading, read_image
from tetriserve.evaluation.scenes import Item, Relation, Scene, draw_held_out, draw_scene, draw_training
from tetriserve.evaluation.scoring import score_reading
from tetriserve.evaluation.vocabulary import COLOURS, OUTLINES, RELATIONS, SHAPES, SYNONYMS

RELATED = Scene(
    background="white",
    items=(Item(colour="red", shape="circle", size="small"), Item(colour="blue", shape="square", size="big")),
    relations=(Relation(subject=0, name="above", target=1),),
)


def drawn(scene: Scene, seed: int = 0, height: int = 256, width: int = 256) -> Reading:
    return read_image(draw_image(scene, place_items(scene, Random(seed), height, width), height, width))


def test_outlines_fit_their_box_exactly() -> None:
    for shape in SHAPES:
        xs, ys = zip(*OUTLINES[shape][0], strict=True)
        assert max(max(xs), max(ys)) == pytest.approx(1.0, abs=1e-6)
        assert (min(xs) + max(xs), min(ys) + max(ys)) == pytest.approx((0.0, 0.0), abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (512, 512), (256, 512), (1024, 1024)])
@pytest.mark.parametrize("num_items", [1, 2, 3])
def test_what_is_drawn_is_read_back(num_items: int, height: int, width: int) -> None:
    random = Random(num_items)
    for seed in range(5):
        scene = draw_scene(random, num_items)
        score = score_reading(scene, drawn(scene, seed, height, width))
        assert (score.background, score.objects) == (True, True), scene
        assert score.relations in (True, None), scene
        assert score.sizes in (True, None), scene


def test_scores_tell_each_kind_of_mistake() -> None:
    right = score_reading(RELATED, drawn(RELATED))
    assert (right.background, right.objects, right.relations, right.sizes) == (True, True, True, True)
    below = replace(RELATED, relations=(Relation(subject=0, name="below", target=1),))
    assert score_reading(below, drawn(RELATED)).relations is False
    sizes_swapped = replace(
        RELATED, items=(replace(RELATED.items[0], size="big"), replace(RELATED.items[1], size="small"))
    )
    assert score_reading(sizes_swapped, drawn(RELATED)).sizes is False
    green = replace(RELATED, items=(replace(RELATED.items[0], colour="green"), RELATED.items[1]))
    assert score_reading(green, drawn(RELATED)).objects is False
    star = replace(RELATED, items=(replace(RELATED.items[0], shape="star"), RELATED.items[1]))
    assert score_reading(star, drawn(RELATED)).objects is False
    assert score_reading(replace(RELATED, background="black"), drawn(RELATED)).background is False


def test_an_object_too_many_is_a_mistake() -> None:
    alone = Scene(background="white", items=RELATED.items[:1])
    assert score_reading(alone, drawn(RELATED)).objects is False


def test_objects_keep_apart_and_seeds_move_them() -> None:
    first, second = (place_items(RELATED, Random(seed), 256, 512) for seed in (0, 1))
    assert first != second
    for seed in range(50):
        a, b = place_items(RELATED, Random(seed), 256, 512)
        assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.extent + b.extent + MARGIN
        assert a.y < b.y and 0.09 <= a.extent <= 0.12 and 0.20 <= b.extent <= 0.24


def test_captions_stay_within_the_vocabulary_and_name_every_object() -> None:
    random = Random(0)
    for index in range(300):
        scene = draw_scene(random, 1 + index % 3)
        words = write_caption(scene, random).replace(",", "").split()
        assert set(words) <= set(WORDS)
        for item in scene.items:
            for name in (item.colour, item.shape, item.size):
                assert not name or set(SYNONYMS.get(name, (name,))) & set(words), (scene, words)


def test_a_relation_is_never_said_the_wrong_way_round() -> None:
    """Red is above blue: "above" and its like come after red, "below" and its like after blue."""
    above, below = SYNONYMS["above"], SYNONYMS["below"]
    seen = set()
    for seed in range(200):
        caption = write_caption(RELATED, Random(seed))
        red_is_first = caption.index("red") < caption.index("blue")
        said_below = any(word in caption for word in below)
        assert said_below != any(f" {word} " in f" {caption} ".replace(",", " ") for word in above), caption
        relation_at = min(caption.find(word) for word in (below if said_below else above) if word in caption)
        between = min(caption.index("red"), caption.index("blue")) < relation_at
        ends_with_it = " it" in caption
        subject_is_red = red_is_first == (between and not ends_with_it)
        assert subject_is_red != said_below, caption
        seen.add((red_is_first, said_below, between, ends_with_it))
    assert len(seen) == 4


def test_an_unsaid_background_is_white() -> None:
    random = Random(0)
    for _ in range(300):
        scene = draw_scene(random, 2)
        caption = write_caption(scene, random)
        if "background" not in caption and " on " not in caption:
            assert scene.background == "white", caption


def test_held_out_scenes_are_a_twentieth_and_never_trained_on() -> None:
    random = Random(0)
    share = sum(draw_scene(random, 2).is_held_out for _ in range(4000)) / 4000
    assert 0.04 < share < 0.06
    assert all(draw_held_out(random, 1 + index % 3).is_held_out for index in range(20))
    assert not any(draw_training(random, 1 + index % 3).is_held_out for index in range(200))


def test_no_object_has_the_colour_of_its_background_and_all_words_occur() -> None:
    random, colours, shapes, relations = Random(0), set(), set(), set()
    for index in range(600):
        scene = draw_scene(random, 1 + index % 3)
        assert all(item.colour != scene.background for item in scene.items)
        assert len({(item.colour, item.shape) for item in scene.items}) == len(scene.items)
        colours |= {scene.background, *(item.colour for item in scene.items)}
        shapes |= {item.shape for item in scene.items}
        relations |= {relation.name for relation in scene.relations}
    assert (colours, shapes, relations) == (set(COLOURS), set(SHAPES), set(RELATIONS))
