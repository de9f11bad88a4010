"""Mixes of sizes: their probabilities, drawn and computed."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Shape
from tetriserve.workload.mixes import Mix, parse_mix

SHAPES = tuple(Shape(side, side) for side in (256, 512, 1024, 2048))


def test_uniform_spreads_over_all_shapes() -> None:
    assert parse_mix("uniform", SHAPES).shares == (0.25,) * 4


@pytest.mark.parametrize("spec", ["skewed", "skewed:1"])
def test_skewed_follows_the_papers_exponential(spec: str) -> None:
    weights = [math.exp(length / 16384) for length in (256, 1024, 4096, 16384)]
    expected = [weight / sum(weights) for weight in weights]
    assert parse_mix(spec, SHAPES).shares == pytest.approx(expected)
    assert expected[3] == pytest.approx(0.4469, abs=1e-4)


def test_alpha_zero_is_uniform_and_below_it_small_ones_lead() -> None:
    assert parse_mix("skewed:0", SHAPES).shares == pytest.approx((0.25,) * 4)
    shares = parse_mix("skewed:-2", SHAPES).shares
    assert shares == tuple(sorted(shares, reverse=True))


def test_one_shape_alone() -> None:
    assert parse_mix("homogeneous:1024x512", SHAPES) == Mix((Shape(512, 1024),), (1.0,))


def test_custom_weights_need_not_add_up() -> None:
    mix = parse_mix("256x256:3, 1024x1024:1", SHAPES)
    assert dict(zip(mix.shapes, mix.shares, strict=True)) == {Shape(256, 256): 0.75, Shape(1024, 1024): 0.25}
    assert parse_mix("256x256,512x512", SHAPES).shares == (0.5, 0.5)


def test_draws_have_the_shares_and_follow_from_the_seed() -> None:
    mix = parse_mix("256x256:3,1024x1024:1", SHAPES)
    first, second = random.Random(7), random.Random(7)
    drawn = [mix.draw(first) for _ in range(10_000)]
    assert Counter(drawn)[Shape(256, 256)] == pytest.approx(7500, abs=150)
    assert drawn == [mix.draw(second) for _ in range(10_000)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zipf", "unknown mix 'zipf'; choose one of: uniform, skewed[:ALPHA], homogeneous:WxH, or weights"),
        ("", "unknown mix ''"),
        ("uniform:2", "unknown mix 'uniform:2'"),
        ("skewed:much", "mix 'skewed:much': 'much' is not a number"),
        ("skewed:1e9", "mix 'skewed:1e9': alpha is 1e+09; allowed: -100 to 100"),
        ("skewed:nan", "mix 'skewed:nan': alpha is nan"),
        ("homogeneous", "mix 'homogeneous': size '' is not of the form WIDTHxHEIGHT"),
        ("256:1", "mix '256:1': size '256' is not of the form WIDTHxHEIGHT"),
        ("256x256:0", "the weight of 256x256 is 0; allowed: 1e-100 to 1e+100"),
        ("256x256:-1", "the weight of 256x256 is -1; allowed: 1e-100 to 1e+100"),
        ("256x256:1,256x256:2", "mix '256x256:1,256x256:2' names 256x256 twice"),
        ("256x256:1,", "mix '256x256:1,': size '' is not of the form"),
    ],
)
def test_what_cannot_be_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mix(spec, SHAPES)
    assert str(caught.value).startswith(message)
