"""Which models and sizes are asked for, and how often."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tetriserve.core.bounds import check_range
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Shape
from tetriserve.workload.randomness import RandomSource, draw

USAGE = "uniform, skewed[:ALPHA], homogeneous:WxH, or weights such as 256x256:3,1024x1024:1"
MODELS_USAGE = "uniform, or weights of models such as images:20,videos:1 or images[skewed]:20,videos[832x480x81]:1"
_WEIGHTS = (1e-100, 1e100)
_MAX_FRAMES = 100_000
_OF_MODEL = re.compile(r"\s*([^,:\[\]]+?)\s*(?:\[([^\[\]]*)\])?\s*(?::([^,:\[\]]*))?\s*(?:,|$)")
"""A model, the mix of its sizes, and its weight: `videos[832x480x81:1,1280x704x121:2]:3`."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Shapes and how likely each is; weights need not add up to 1."""

    shapes: tuple[Shape, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shapes or len(self.shapes) != len(self.weights):
            raise ConfigError(f"a mix has {len(self.shapes)} shapes and {len(self.weights)} weights; it needs one each")
        for shape, weight in zip(self.shapes, self.weights, strict=True):
            check_range(f"the weight of {shape}", weight, *_WEIGHTS)

    @property
    def shares(self) -> tuple[float, ...]:
        """The probability of each shape."""
        total = sum(self.weights)
        return tuple(weight / total for weight in self.weights)

    def draw(self, random: RandomSource) -> Shape:
        return draw(random, self.shapes, self.weights)


def uniform(shapes: Sequence[Shape]) -> Mix:
    """Every shape equally often."""
    return Mix(tuple(shapes), (1.0,) * len(shapes))


def skewed(shapes: Sequence[Shape], alpha: float = 1.0) -> Mix:
    """p_i ~ exp(alpha * L_i / L_max) with L = (H * W) / 16^2 (TetriServe, 6.1): large ones more often for alpha > 0."""
    lengths = [shape.num_pixels / 16**2 for shape in shapes]
    return Mix(tuple(shapes), tuple(math.exp(alpha * length / max(lengths)) for length in lengths))


def homogeneous(shape: Shape) -> Mix:
    """One shape only."""
    return Mix((shape,), (1.0,))


def parse_mix(spec: str, shapes: Sequence[Shape]) -> Mix:
    """The mix that `spec` names: `uniform`, `skewed`, `skewed:2`, `homogeneous:512x512`, `256x256:3,1024x1024:1`.

    Args:
        shapes: those that `uniform` and `skewed` spread over.

    Raises:
        ConfigError: an unknown mix or a number that cannot be used.
    """
    name, _, argument = spec.partition(":")
    if name == "uniform" and not argument:
        return uniform(shapes)
    if name == "skewed":
        alpha = _number(spec, argument or "1")
        check_range(f"mix {spec!r}: alpha", alpha, -100.0, 100.0)
        return skewed(shapes, alpha)
    if name == "homogeneous":
        return homogeneous(_shape(spec, argument))
    if not spec[:1].isdecimal():
        raise ConfigError(f"unknown mix {spec!r}; choose one of: {USAGE}")
    weights: dict[Shape, float] = {}
    for item in spec.split(","):
        size, _, weight = item.partition(":")
        shape = _shape(spec, size.strip())
        if shape in weights:
            raise ConfigError(f"mix {spec!r} names {shape} twice; give each size one weight")
        weights[shape] = _number(spec, weight or "1")
    return Mix(tuple(weights), tuple(weights.values()))


@dataclass(frozen=True, slots=True)
class WeightedMix:
    """The mix of one model's sizes, and how often the model is asked for."""

    mix: Mix
    weight: float = 1.0


def parse_mix_of_models(spec: str, shapes: Mapping[str, Sequence[Shape]]) -> dict[str, WeightedMix]:
    """The mix over several models that `spec` names: `uniform`, `images:20,videos:1`, `images[skewed]:20,videos:1`.

    `uniform` asks for every model equally often. A model without brackets has every size equally often, one that is
    not named is not asked for, and one without a weight has weight 1.

    Args:
        shapes: by model, those that its `uniform` and `skewed` spread over.

    Raises:
        ConfigError: an unknown model or mix, or a number that cannot be used.
    """
    if spec == "uniform":
        return {model: WeightedMix(uniform(sizes)) for model, sizes in shapes.items()}
    found: dict[str, WeightedMix] = {}
    at = 0
    while at < len(spec):
        item = _OF_MODEL.match(spec, at)
        if item is None:
            raise ConfigError(f"mix {spec!r}: cannot use {spec[at:]!r}; write {MODELS_USAGE}")
        model, sizes, weight = item.groups()
        if model not in shapes:
            raise ConfigError(
                f"mix {spec!r}: unknown model {model!r}; models: {', '.join(shapes)}; write {MODELS_USAGE}"
            )
        if model in found:
            raise ConfigError(f"mix {spec!r} names {model} twice; give each model one weight")
        found[model] = WeightedMix(
            parse_mix("uniform" if sizes is None else sizes, shapes[model]),
            1.0 if weight is None else _number(spec, weight),
        )
        check_range(f"the weight of {model}", found[model].weight, *_WEIGHTS)
        at = item.end()
    if not found:
        raise ConfigError(f"mix {spec!r} names no model; write {MODELS_USAGE}")
    return found


def _shape(spec: str, size: str) -> Shape:
    """From WxH, or WxHxFRAMES of a video."""
    try:
        frame, _, frames = size.rpartition("x") if size.count("x") == 2 else (size, "", "1")
        if not (frames.isdecimal() and len(frames) <= 6 and 1 <= int(frames) <= _MAX_FRAMES):
            raise ValueError(f"size {size[:40]!r} is not of the form WIDTHxHEIGHTxFRAMES, such as 832x480x81")
        return replace(Shape.parse(frame), frames=int(frames))
    except ValueError as error:
        raise ConfigError(f"mix {spec!r}: {error}") from None


def _number(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"mix {spec!r}: {text!r} is not a number") from None
