"""Layouts that the noise tells: legal, smooth, and told by noise that is normal all the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
import torch

from tetriserve.evaluation.drawing import MARGIN
from tetriserve.evaluation.scenes import Item, Relation, Scene, draw_scene
from tetriserve.evaluation.vocabulary import SIZES
from training.dit import dit_learner
from training.hearing import give_head_for_marks, what_hears
from training.layouts import NUM_MARKS, draw_marks, lay_out, marked
from training.learner import Schedule
from training.model import Denoiser, Reader

PAIR = Scene(
    background="white",
    items=(Item(colour="red", shape="circle"), Item(colour="blue", shape="square", size="big")),
    relations=(Relation(subject=0, name="above", target=1),),
)


def test_items_fill_squares_of_whole_tokens_and_keep_apart() -> None:
    seen = set()
    for seed, (height, width) in product(range(200), ((256, 384), (512, 512))):
        scene = draw_scene(Random(seed), 1 + seed % 3)
        places = lay_out(scene, draw_marks(Random(seed)), height, width)
        num_tokens = min(height, width) // 32
        for item, place in zip(scene.items, places, strict=True):
            num_cells = {"small": 2, "": 3, "big": 4}[item.size]
            assert SIZES[item.size][0] <= place.extent <= num_cells / 16 - MARGIN
            left, top = ((centre - num_cells / 16) * num_tokens for centre in (place.x, place.y))
            side = num_cells * num_tokens / 8
            assert left in range(width // 32 + 1 - int(side)) and top in range(height // 32 + 1 - int(side))
            seen.add((item.size, left, top, place.extent))
        for a, b in combinations(places, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.extent + b.extent + MARGIN
    assert len(seen) > 300, "marks move and resize them"


@pytest.mark.parametrize("num_items", [2, 3])
def test_relations_are_true_in_their_longer_direction(num_items: int) -> None:
    seen = Counter()
    for seed in range(400):
        scene = draw_scene(Random(seed), num_items)
        places = lay_out(scene, draw_marks(Random(seed)), 256, 256)
        for relation in scene.relations:
            subject, target = places[relation.subject], places[relation.target]
            right, down = subject.x - target.x, subject.y - target.y
            along, across = {
                "left of": (-right, down),
                "right of": (right, down),
                "above": (-down, right),
                "below": (down, right),
            }[relation.name]
            assert along > abs(across)
        seen[tuple(relation.name for relation in scene.relations)] += 1
    assert len(seen) == (5 if num_items == 2 else 17)


def test_every_place_of_an_object_is_as_likely_as_any_other() -> None:
    random = Random(0)
    alone = Scene(background="white", items=PAIR.items[:1])
    seen = Counter(
        tuple((place.x, place.y) for place in lay_out(alone, draw_marks(random), 256, 256)) for _ in range(10_000)
    )
    expected = 10_000 / len(seen)
    assert len(seen) == 36 and all(abs(count - expected) < 5 * expected**0.5 for count in seen.values())


@pytest.mark.parametrize("num_items", [1, 2, 3])
def test_nearly_the_same_marks_mean_nearly_the_same_layout_at_every_size(num_items: int) -> None:
    token = 1 / 32
    for seed in range(100):
        scene = draw_scene(Random(seed), num_items)
        marks = draw_marks(Random(seed))
        places = lay_out(scene, marks, 1024, 1024)
        for near, tolerance in (
            (lay_out(scene, tuple(mark + 0.02 for mark in marks), 1024, 1024), 2 * token),
            (lay_out(scene, marks, 256, 256), 8 * token),
        ):
            for place, other in zip(places, near, strict=True):
                assert max(abs(place.x - other.x), abs(place.y - other.y)) <= tolerance
                assert abs(place.extent - other.extent) < 0.001


def test_the_layout_is_that_of_the_picture_and_not_of_its_wording() -> None:
    reworded = replace(PAIR, items=PAIR.items[::-1], relations=(Relation(subject=0, name="below", target=1),))
    for seed in range(20):
        marks = draw_marks(Random(seed))
        assert lay_out(reworded, marks, 256, 256) == lay_out(PAIR, marks, 256, 256)[::-1]


def test_what_no_relation_orders_lies_as_it_is_named_from_the_left() -> None:
    for seed in range(20):
        first, second = lay_out(replace(PAIR, relations=()), draw_marks(Random(seed)), 256, 256)
        assert second.x - first.x > abs(second.y - first.y)


def test_greater_marks_lie_further_to_the_right_and_down() -> None:
    alone = Scene(background="white", items=PAIR.items[:1])
    places = [
        lay_out(alone, (mark, mark) + (0.0,) * (NUM_MARKS - 2), 256, 256)[0] for mark in (-9.0, -0.9, 0, 0.9, 9.0)
    ]
    assert [place.x for place in places] == [place.y for place in places] == [0.1875, 0.3125, 0.5625, 0.6875, 0.8125]


def test_marked_noise_holds_the_marks_and_is_normal_all_the_same() -> None:
    torch.manual_seed(0)
    noise_BSC, marks_BM = torch.randn(4096, 6, 64), torch.randn(4096, NUM_MARKS)
    marked_BSC = marked(noise_BSC, marks_BM)
    assert torch.equal(marked_BSC[..., 4 * NUM_MARKS :], noise_BSC[..., 4 * NUM_MARKS :])
    again_BSC = marked(marked_BSC, marks_BM)
    torch.testing.assert_close(again_BSC, marked_BSC)
    covariance = torch.cov(marked_BSC.flatten(1).T)
    assert (covariance - torch.eye(384)).abs().max() < 0.1 and marked_BSC.mean(0).abs().max() < 0.08
    # The same noise with other marks is told apart by them alone.
    other_BSC = marked(noise_BSC, -marks_BM)
    assert torch.linalg.matrix_rank((marked_BSC - other_BSC)[0]) == 1


def test_a_head_that_hears_tells_every_token_the_marks() -> None:
    torch.manual_seed(0)
    model = Denoiser(Reader()).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing through"):
        give_head_for_marks(model, torch.randn(2, 64, 64), ["a red circle"] * 2, width=8)
    width = model.transformer.inner_dim
    for block in model.transformer.transformer_blocks:
        for modulation in (block.norm1.linear, block.norm1_context.linear):
            torch.nn.init.normal_(modulation.bias[2 * width : 3 * width])  # a fresh one's gates are shut
    latents_BSC = torch.randn(512, 64, 64)
    head = give_head_for_marks(model, latents_BSC, ["a red circle"] * 512, width=8)
    block = model.transformer.transformer_blocks[0]
    told: dict[str, torch.Tensor] = {}
    block.register_forward_hook(
        lambda block, inputs, outputs: told.update(text=outputs[0][:, 0], image=outputs[1][:, 5])
    )
    size = width // block.attn.heads
    values = slice(head * size, head * size + NUM_MARKS)
    block.attn.to_out[0].register_forward_pre_hook(lambda layer, inputs: told.update(head=inputs[0][:, 5, values]))
    marks_BM = torch.randn(400, NUM_MARKS)
    noise_BSC = marked(torch.randn(400, 64, 64), marks_BM)
    captions = model.reader.tokenize(["a blue star"] * 400, torch.device("cpu"))

    def missed(by: str) -> float:
        """Of a variance of 1."""
        model(noise_BSC, torch.ones(400), *captions, 8)
        means = torch.linalg.lstsq(told[by][:320], marks_BM[:320]).solution
        return (told[by][320:] @ means - marks_BM[320:]).square().mean().item()

    assert missed("text") < 0.2 and missed("image") < 0.2
    assert missed("head") < 0.03, "as long tokens as short ones"

    def loudness(side: int) -> float:
        some_BM = torch.randn(64, NUM_MARKS)
        model(marked(torch.randn(64, side**2, 64), some_BM), torch.ones(64), *(each[:64] for each in captions), side)
        return torch.linalg.lstsq(some_BM, told["head"]).solution.diagonal().abs().mean().item()

    assert 0.9 < loudness(16) / loudness(8) < 1.5, "of 256 tokens as of 64; even means are half as loud"
    with pytest.raises(ValueError, match="already"):
        give_head_for_marks(model, latents_BSC, ["a red circle"] * len(latents_BSC), width=8)


def test_training_leaves_alone_what_the_head_hears_by(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Denoiser(Reader())
    assert not what_hears(model), "no head yet"
    block = model.transformer.transformer_blocks[0]
    block.norm1.linear.bias.detach().fill_(1.0)
    block.norm1_context.linear.bias.detach().fill_(1.0)
    head = give_head_for_marks(model, torch.randn(64, 64, 64), ["a red circle"] * 64, width=8)
    learner = dit_learner(tmp_path / "dit.pt", model)
    for parameter, rows in what_hears(model):
        learner.keep(parameter, rows)
    heard: list[torch.Tensor] = []
    block.attn.to_out[0].register_forward_pre_hook(lambda layer, inputs: heard.append(inputs[0].detach().clone()))
    noise_BSC = torch.randn(2, 64, 64)
    tokens = model.reader.tokenize(["a red star", ""], torch.device("cpu"))

    def loss_terms() -> dict[str, torch.Tensor]:
        return {"all": model(noise_BSC, torch.ones(2), *tokens, 8).velocity.sub(1.0).square().mean()}

    ticks = iter(range(100))
    learner.train(Schedule(learning_rate=0.1, minutes=0.1, warmup_steps=1), loss_terms, clock=lambda: next(ticks))
    size = block.attn.to_q.out_features // block.attn.heads
    first, last = (seen_BSD.unflatten(-1, (-1, size)) for seen_BSD in (heard[0], heard[-1]))
    is_same = [torch.equal(first[..., number, :], last[..., number, :]) for number in range(block.attn.heads)]
    assert is_same == [number == head for number in range(block.attn.heads)]
