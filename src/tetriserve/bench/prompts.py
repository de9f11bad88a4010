"""What the pictures are asked to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from tetriserve.core.errors import ConfigError
from tetriserve.files import read_text
from tetriserve.workload.randomness import RandomSource

_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "gray", "black")
_THINGS = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
_RELATIONS = ("left of", "right of", "above", "below")
_OBJECTS = tuple(f"{colour} {thing}" for colour, thing in product(_COLOURS, _THINGS))

_MAX_BYTES = 2**26

DrawPrompt = Callable[[RandomSource], str]


def made_up_prompt(random: RandomSource) -> str:
    """Two objects and how they stand: what any model can draw, the bundled one included."""
    one, relation, other = _pick(random, _OBJECTS), _pick(random, _RELATIONS), _pick(random, _OBJECTS)
    return f"{_with_article(one)} {relation} {_with_article(other)}"


def load_prompts(path: Path) -> DrawPrompt:
    """Prompts from a file, one per line, each as likely as any other; empty lines are left out.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or has no prompt.
    """
    text = read_text(path, "prompts", _MAX_BYTES)
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise ConfigError(f"prompts {path} has no lines; write one prompt per line")
    return lambda random: _pick(random, prompts)


def _pick(random: RandomSource, choices: Sequence[str]) -> str:
    return choices[int(random.random() * len(choices))]


def _with_article(thing: str) -> str:
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"
