"""Prompts that no training has seen, each with the scene that it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tetriserve.evaluation.captions import write_caption
from tetriserve.evaluation.scenes import Scene, draw_held_out


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`text` asks for `scene`; `seed` is that of the noise."""

    text: str
    scene: Scene
    seed: int


def unseen_prompts(num_items: int, count: int, seed: int = 0) -> list[Prompt]:
    """The first `count` prompts of a series about `num_items` objects; a longer series begins with a shorter one."""
    random = Random(f"{seed} {num_items}")
    prompts = []
    for number in range(count):
        scene = draw_held_out(random, num_items)
        prompts.append(Prompt(text=write_caption(scene, random), scene=scene, seed=number))
    return prompts
