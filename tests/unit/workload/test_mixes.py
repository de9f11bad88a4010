"""Mixes of sizes: their probabilities, drawn and computed."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Shape
from tetriserve.workload.mixes import Mix, WeightedMix, parse_mix, parse_mix_of_models, uniform

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


OF_MODELS = {"images": SHAPES, "videos": (Shape(480, 832, 81), Shape(704, 1280, 121))}


def test_models_have_weights_and_mixes_of_their_own() -> None:
    images, videos = parse_mix_of_models(
        "images[skewed:-2]:20, videos[832x480x81:3,1280x704x121:1] :1", OF_MODELS
    ).values()
    assert (images.weight, videos.weight) == (20.0, 1.0)
    assert images.mix == parse_mix("skewed:-2", SHAPES)
    assert dict(zip(videos.mix.shapes, videos.mix.shares, strict=True)) == {
        Shape(480, 832, 81): 0.75,
        Shape(704, 1280, 121): 0.25,
    }


def test_a_model_without_brackets_has_every_size_equally_often() -> None:
    assert parse_mix_of_models("videos:3", OF_MODELS) == {"videos": WeightedMix(uniform(OF_MODELS["videos"]), 3.0)}
    assert parse_mix_of_models("videos", OF_MODELS)["videos"].weight == 1.0
    equal = parse_mix_of_models("uniform", OF_MODELS)
    assert {model: weighted.weight for model, weighted in equal.items()} == {"images": 1.0, "videos": 1.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "sound:1",
            "mix 'sound:1': unknown model 'sound'; models: images, videos; write uniform, or ",
        ),
        ("skewed", "mix 'skewed': unknown model 'skewed'"),
        ("images:1,images:2", "mix 'images:1,images:2' names images twice"),
        ("images:0", "the weight of images is 0; allowed: 1e-100 to 1e+100"),
        ("images:many", "mix 'images:many': 'many' is not a number"),
        ("images:", "mix 'images:': '' is not a number"),
        ("", "mix '' names no model; write uniform"),
        ("images[256x256", "mix 'images[256x256': cannot use 'images[256x256'; write uniform"),
        ("images:1,,videos:1", "mix 'images:1,,videos:1': cannot use ',videos:1'"),
        ("videos[832x480x0]", "mix '832x480x0': size '832x480x0' is not of the form WIDTHxHEIGHTxFRAMES"),
        ("videos[zipf]", "unknown mix 'zipf'"),
    ],
)
def test_what_cannot_be_a_mix_of_models_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mix_of_models(spec, OF_MODELS)
    assert str(caught.value).startswith(message)
