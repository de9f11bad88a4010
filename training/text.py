"""The text encoders: they learn to say what a caption says, before anything is drawn from it.

Learnt from the flow loss alone they stay blind for long, since what a caption says is little of a picture's error. So
what each colour, shape, size and relation belongs to is asked of them directly, and the denoiser finds it ready.

Suffixes of tensor names: B batch, L text tokens, D embedding width, F facts, N objects asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from tetriserve.evaluation.captions import write_caption
from tetriserve.evaluation.scenes import Scene
from tetriserve.evaluation.vocabulary import COLOURS, OPPOSITE, RELATIONS, SHAPES, SYNONYMS
from training.learner import Learner, Schedule, load
from training.model import EMBED_DIM, Reader
from training.pictures import draw_scene_of_any_count

_WORD_SHAPES = {word: shape for shape in SHAPES for word in SYNONYMS.get(shape, (shape,))}
_BACKGROUND_FACTS = [(colour, "background") for colour in COLOURS]
_STATED_SIZES = ("small", "big")
SCENE_FACTS = [
    *_BACKGROUND_FACTS,
    *product(COLOURS, SHAPES),
    *product(COLOURS, _STATED_SIZES),
    *product(COLOURS, RELATIONS),
    *product(SHAPES, RELATIONS),
]
"""What the pooled embedding tells of a scene: each pair, such as (red, circle) or (red, above), is in it or not."""
OBJECT_FACTS = [*_BACKGROUND_FACTS, *((word,) for word in (*COLOURS, *SHAPES, *_STATED_SIZES, *RELATIONS))]
"""What the token of an object's shape tells of that object."""
_STRANGE_WORD_SHARE = 0.1


class Questions(nn.Module):
    """A linear answer to every fact, from the pooled embedding and from the token of each object's shape."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.of_scene = nn.Linear(EMBED_DIM, len(SCENE_FACTS))
        self.of_object = nn.Linear(EMBED_DIM, len(OBJECT_FACTS))
        self._shapes = shapes_by_token(reader)

    def forward(self, scenes: list[Scene], captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean cross entropy per fact that holds, of the scenes' facts and of the objects'."""
        clip_BL, t5_BL = self.reader.tokenize(captions, device)
        pooled_BD, text_BLD = self.reader(clip_BL, t5_BL)
        places, truths = self.objects_of(scenes, t5_BL)
        return (
            _loss(self.of_scene(pooled_BD), torch.stack([_held(SCENE_FACTS, scene_facts(scene)) for scene in scenes])),
            _loss(self.of_object(text_BLD[places[:, 0], places[:, 1]]), truths),
        )

    def objects_of(self, scenes: list[Scene], t5_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns (N, 2) of the shapes' tokens, and the objects' facts (N, F).

        Of shapes that a scene has twice nothing is asked: which token means which is not told.
        """
        found = list(shape_tokens(scenes, t5_BL, self._shapes))
        truths = [_held(OBJECT_FACTS, object_facts(scenes[row], index)) for row, _, index in found]
        return torch.tensor([place[:2] for place in found], device=t5_BL.device), torch.stack(truths)


def train_text(path: Path, schedule: Schedule, *, batch: int, device: torch.device) -> None:
    """Train into the checkpoint `path`, continuing it if it exists. `batch`: captions."""
    torch.manual_seed(0)
    questions = Questions(Reader()).to(device)
    learner = text_learner(path, questions)
    random = Random(learner.num_steps)

    def loss_terms() -> dict[str, Tensor]:
        scenes = [draw_scene_of_any_count(random) for _ in range(batch)]
        captions = [_with_strange_words(write_caption(scene, random), random) for scene in scenes]
        with torch.autocast(device.type, torch.bfloat16):
            of_scene, of_object = questions(scenes, captions, device)
        return {"scene": of_scene, "object": of_object}

    learner.train(schedule, loss_terms)


def text_learner(path: Path, questions: Questions) -> Learner[Questions]:
    encoders = [questions.reader.text_encoder.encoder, questions.reader.text_encoder_2.encoder]
    return Learner(path, questions, encoders, horizon=200, weight_decay=0.01)


def load_reader(path: Path, device: torch.device) -> Reader:
    """The averaged text encoders of checkpoint `path`, not to be trained further."""
    questions = Questions(Reader()).to(device)
    questions.load_state_dict(load(path, device)["average"])
    return questions.reader.eval().requires_grad_(False)


def shapes_by_token(reader: Reader) -> dict[int, str]:
    """The shape that each of T5's tokens names, of those that name one."""
    return {reader.tokenizer_2(word).input_ids[0]: shape for word, shape in _WORD_SHAPES.items()}


def shape_tokens(scenes: list[Scene], t5_BL: Tensor, shapes_by_token: dict[int, str]) -> Iterator[tuple[int, int, int]]:
    """Row, column and the number of the item in its scene, of every token that names the shape of one item alone."""
    for row, (scene, numbers) in enumerate(zip(scenes, t5_BL.tolist(), strict=True)):
        shapes = [item.shape for item in scene.items]
        for column, number in enumerate(numbers):
            shape = shapes_by_token.get(number)
            if shape is not None and shapes.count(shape) == 1:
                yield row, column, shapes.index(shape)


def scene_facts(scene: Scene) -> set[tuple[str, ...]]:
    facts: set[tuple[str, ...]] = {(scene.background, "background")}
    for index, item in enumerate(scene.items):
        facts |= {(item.colour, item.shape), (item.colour, item.size)}
        facts |= {(word, relation) for relation in _relations_of(scene, index) for word in (item.colour, item.shape)}
    return facts


def object_facts(scene: Scene, index: int) -> set[tuple[str, ...]]:
    item = scene.items[index]
    words = (item.colour, item.shape, item.size, *_relations_of(scene, index))
    return {(scene.background, "background"), *((word,) for word in words)}


def _relations_of(scene: Scene, index: int) -> set[str]:
    """On which sides of others the object lies."""
    said = {relation.name for relation in scene.relations if relation.subject == index}
    return said | {OPPOSITE[relation.name] for relation in scene.relations if relation.target == index}


def _held(names: Sequence[tuple[str, ...]], facts: set[tuple[str, ...]]) -> Tensor:
    return torch.tensor([float(name in facts) for name in names])


def _loss(logits_NF: Tensor, truths_NF: Tensor) -> Tensor:
    truths_NF = truths_NF.to(logits_NF.device)
    return binary_cross_entropy_with_logits(logits_NF.float(), truths_NF, reduction="sum") / truths_NF.sum()


def _with_strange_words(caption: str, random: Random) -> str:
    """Now and then a word that means nothing, so that users' own words do not confuse."""
    words = caption.split()
    while random.random() < _STRANGE_WORD_SHARE:
        strange = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 7)))
        words.insert(random.randint(0, len(words)), strange)
    return " ".join(words)
