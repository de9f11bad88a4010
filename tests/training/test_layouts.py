"""Layouts that the noise tells: legal, equally likely, smooth, and told by noise that is normal all the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch

from tetriserve.evaluation.drawing import MARGIN
from tetriserve.evaluation.scenes import Item, Relation, Scene, draw_scene
from tetriserve.evaluation.vocabulary import OPPOSITE, SIZES
from training.dit import keep_silent_heads
from training.hearing import give_head_for_marks
from training.layouts import GRID, NUM_MARKS, draw_marks, lay_out, marked
from training.model import NUM_UNROTATED, Denoiser, Reader

PAIR = Scene(
    background="white",
    items=(Item(colour="red", shape="circle"), Item(colour="blue", shape="square", size="big")),
    relations=(Relation(subject=0, name="above", target=1),),
)


def test_items_fill_squares_of_whole_cells_and_keep_apart() -> None:
    seen = set()
    for seed in range(200):
        scene = draw_scene(Random(seed), 1 + seed % 3)
        places = lay_out(scene, draw_marks(Random(seed)), 256, 384)
        for item, place in zip(scene.items, places, strict=True):
            num_cells = {"small": 2, "": 3, "big": 4}[item.size]
            assert SIZES[item.size][0] <= place.extent <= num_cells / 2 / GRID - MARGIN
            left, top = (centre * GRID - num_cells / 2 for centre in (place.x, place.y))
            assert left in range(13 - num_cells) and top in range(9 - num_cells)
            seen.add((item.size, left, top, place.extent))
        for a, b in combinations(places, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.extent + b.extent + MARGIN
    assert len(seen) > 150, "marks move and resize them"


@pytest.mark.parametrize("name", OPPOSITE)
def test_relations_are_true_in_their_longer_direction(name: str) -> None:
    scene = replace(PAIR, relations=(Relation(subject=0, name=name, target=1),))
    for seed in range(50):
        subject, target = lay_out(scene, draw_marks(Random(seed)), 256, 256)
        right, down = subject.x - target.x, subject.y - target.y
        along, across = {
            "left of": (-right, down),
            "right of": (right, down),
            "above": (-down, right),
            "below": (down, right),
        }[name]
        assert along > abs(across)


def test_every_layout_is_as_likely_as_any_other() -> None:
    random = Random(0)
    seen = Counter(
        tuple((place.x, place.y) for place in lay_out(PAIR, draw_marks(random), 256, 256)) for _ in range(10_000)
    )
    expected = 10_000 / len(seen)
    assert len(seen) > 50 and all(abs(count - expected) < 5 * expected**0.5 for count in seen.values())


def test_the_layout_is_that_of_the_picture_and_not_of_its_wording() -> None:
    reworded = replace(PAIR, items=PAIR.items[::-1], relations=(Relation(subject=0, name="below", target=1),))
    for seed in range(20):
        marks = draw_marks(Random(seed))
        assert lay_out(reworded, marks, 256, 256) == lay_out(PAIR, marks, 256, 256)[::-1]


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
    latents_BSC = torch.randn(64, 64, 64)
    head = give_head_for_marks(model, latents_BSC, ["a red circle"] * 64, width=8)
    block = model.transformer.transformer_blocks[0]
    told: dict[str, torch.Tensor] = {}
    block.register_forward_hook(
        lambda block, inputs, outputs: told.update(text=outputs[0][:, 0], image=outputs[1][:, 5])
    )
    size = width // block.attn.heads
    values = slice(head * size, head * size + NUM_MARKS)
    block.attn.to_out[0].register_forward_pre_hook(lambda layer, inputs: told.update(head=inputs[0][:, 5, values]))
    marks_BM = torch.randn(640, NUM_MARKS)
    noise_BSC = marked(torch.randn(640, 64, 64), marks_BM)
    captions = model.reader.tokenize(["a blue star"] * 640, torch.device("cpu"))

    def missed(by: str) -> float:
        """Of a variance of 1."""
        model(noise_BSC, torch.ones(640), *captions, 8)
        means = torch.linalg.lstsq(told[by][:512], marks_BM[:512]).solution
        return (told[by][512:] @ means - marks_BM[512:]).square().mean().item()

    assert missed("text") < 0.2 and missed("image") < 0.2
    by_length = missed("head")

    def loudness(side: int) -> float:
        some_BM = torch.randn(64, NUM_MARKS)
        model(marked(torch.randn(64, side**2, 64), some_BM), torch.ones(64), *(each[:64] for each in captions), side)
        return torch.linalg.lstsq(some_BM, told["head"]).solution.diagonal().abs().mean().item()

    assert 0.8 < loudness(16) / loudness(8) < 1.6, "of 256 tokens as of 64; even means are half as loud"
    block.attn.to_k.weight[head * size : (head + 1) * size] = 0.0
    assert by_length < 0.8 * missed("head"), "an even mean has some tokens' noise too faint, for the layer norm"
    assert give_head_for_marks(model, latents_BSC, ["a red circle"] * 64, width=8) == head
    assert missed("head") < 1.1 * by_length, "set anew"


def test_whom_a_head_attends_to_that_looks_at_nothing_is_not_trained() -> None:
    model = Denoiser(Reader())
    attention = model.transformer.transformer_blocks[0].attn
    silent = slice(64, 96)
    attention.to_q.weight.detach()[silent] = 0.0
    keep_silent_heads(model)
    layers = (attention.to_q, attention.to_k, attention.add_q_proj, attention.add_k_proj)
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    torch.stack([(parameter + 2.0).square().sum() for parameter in parameters]).sum().backward()
    for parameter in parameters:
        is_trained = parameter.grad.reshape(len(parameter), -1).ne(0.0).any(dim=1)
        assert not is_trained[silent].any() and is_trained.sum() == len(is_trained) - 32
    for norm in (attention.norm_q, attention.norm_k, attention.norm_added_q, attention.norm_added_k):
        norm.weight.square().sum().backward()
        assert norm.weight.grad.ne(0.0).tolist() == [False] * NUM_UNROTATED + [True] * (32 - NUM_UNROTATED)
