"""The grammar that turns a scene into one of many sentences that say it.

Word order is free within it: the background first or last, a relation said from either side, colour before or after
the shape, with and without articles, in any of a word's synonyms.
"""

from __future__ import annotations

import re
from random import Random

from tetriserve.evaluation.scenes import DEFAULT_BACKGROUND, Item, Relation, Scene
from tetriserve.evaluation.vocabulary import COLOURS, OPPOSITE, SHAPES, SIZES, SYNONYMS

_OPENINGS = ("a picture of", "an image of", "a drawing of", "an illustration of", "a photo of", "draw", "show me")
_BACKGROUNDS_LAST = (
    "{body} on a {colour} background",
    "{body} on a {colour} background",
    "{body} against a {colour} background",
    "{body} on a plain {colour} background",
    "{body}, {colour} background",
    "{body} on {colour}",
)
_BACKGROUNDS_FIRST = (
    "on a {colour} background, {body}",
    "on a {colour} background there is {body}",
    "{colour} background, {body}",
    "a {colour} background with {body}",
)
_RELATED = (
    "{subject} {relation} {target}",
    "{subject} {relation} {target}",
    "{subject} is {relation} {target}",
    "{relation} {target} there is {subject}",
    "{target} {opposite} {subject}",
    "{target} with {subject} {relation} it",
)
_RELATED_AND_THIRD = ("{related}, and {third}", "{third}, {related}", "{related}, also {third}")
_RELATED_TWICE = (
    "{subject} {relation} {target} and {relation_2} {target_2}",
    "{subject} {relation} {target}, {relation_2} {target_2}",
    "{subject}, {relation} {target} and {relation_2} {target_2}",
)
_TEMPLATES = (*_OPENINGS, *_BACKGROUNDS_LAST, *_BACKGROUNDS_FIRST, *_RELATED, *_RELATED_AND_THIRD, *_RELATED_TWICE)
_SPOKEN = (*COLOURS, *SHAPES, *SIZES, *(synonym for synonyms in SYNONYMS.values() for synonym in synonyms))
WORDS = tuple(
    sorted(
        {"a", "an", "and", "in", "is", "that"}
        | {word for text in _SPOKEN for word in text.split()}
        | {word for text in _TEMPLATES for word in re.findall("[a-z]+", re.sub("{.*?}", "", text))}
    )
)
"""Every word that a caption can hold."""


def write_caption(scene: Scene, random: Random) -> str:
    """One of the sentences that describe `scene`; a white background may go unsaid.

    Items that the scene puts in no order by relations are named in that of the scene.
    """
    body = _body(scene, random)
    if scene.background == DEFAULT_BACKGROUND and random.random() < 0.4:
        return _opened(body, random)
    colour = _word(scene.background, random)
    if random.random() < 0.7:
        return random.choice(_BACKGROUNDS_LAST).format(body=_opened(body, random), colour=colour)
    return random.choice(_BACKGROUNDS_FIRST).format(body=body, colour=colour)


def _opened(body: str, random: Random) -> str:
    return f"{random.choice(_OPENINGS)} {body}" if random.random() < 0.25 else body


def _body(scene: Scene, random: Random) -> str:
    with_articles = random.random() < 0.85
    names = [_name(item, random, with_articles) for item in scene.items]
    if not scene.relations:
        return _listed(names, random)
    if len(scene.relations) == 2:
        return _related_twice(scene.relations, names, random)
    (relation,) = scene.relations
    related = random.choice(_RELATED).format(
        subject=names[relation.subject],
        target=names[relation.target],
        relation=_word(relation.name, random),
        opposite=_word(OPPOSITE[relation.name], random),
    )
    if len(names) == 2:
        return related
    return random.choice(_RELATED_AND_THIRD).format(related=related, third=names[2])


def _related_twice(relations: tuple[Relation, ...], names: list[str], random: Random) -> str:
    first, second = relations
    return random.choice(_RELATED_TWICE).format(
        subject=names[first.subject],
        target=names[first.target],
        relation=_word(first.name, random),
        relation_2=_word(second.name, random),
        target_2=names[second.target],
    )


def _listed(names: list[str], random: Random) -> str:
    *others, last = names
    if not others:
        return last
    joint = random.choice((" and ", ", ", " with ")) if len(names) == 2 else random.choice((" and ", ", "))
    return ", ".join(others) + joint + last


def _name(item: Item, random: Random, with_article: bool) -> str:
    size = [_word(item.size, random)] if item.size else []
    colour, shape = _word(item.colour, random), _word(item.shape, random)
    style = random.random()
    if style < 0.8:
        words = [*size, colour, shape]
    elif style < 0.9 and size:
        words = [colour, *size, shape]
    else:
        words = [*size, shape, *random.choice((("that", "is"), ("in",))), colour]
    if with_article:
        words.insert(0, "an" if words[0] == "orange" else "a")
    return " ".join(words)


def _word(word: str, random: Random) -> str:
    """`word` half of the time, otherwise any of its synonyms."""
    synonyms = SYNONYMS.get(word, (word,))
    return synonyms[0] if random.random() < 0.5 else random.choice(synonyms)
