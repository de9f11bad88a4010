"""`Execution` as a part of a profile's identity, and what is said of values that do not exist."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tetriserve.config import EngineConfig, ExecutionConfig, ModelConfig, PoolConfig
from tetriserve.core.errors import ConfigError, ProfileError
from tetriserve.core.execution import ATTENTIONS, DTYPES, Execution
from tetriserve.launch import StartProgress, find_model, launch, measure_profile
from tetriserve.models.card import TOLERANCES
from tetriserve.profile.table import Profile, Row, load_profile, save_profile
from tetriserve.profiler import hardware_name
from tetriserve.profiles import cached_profile_path, find_profile

POOL = PoolConfig(num_ranks=2)
CARD = find_model(None)
PROFILE = Profile(
    model=CARD.name, fingerprint=CARD.fingerprint, hardware=hardware_name(POOL), execution=CARD.execution,
    source="s", created="c", switch_s=0.001, max_batch=8,
    rows=tuple(
        Row(stage="denoise", height=shape.height, width=shape.width, tokens=64, degree=degree, seconds=0.1)
        for shape in CARD.sizes
        for degree in (1, 2)
    ),
)  # fmt: skip
HALF = Execution("bfloat16")
LISTED = ", ".join(ATTENTIONS)
OTHERS = {
    "dtype": ExecutionConfig(dtype="bfloat16"),
    "attention": ExecutionConfig(attention="native_math"),
    "compile": ExecutionConfig(compile=True),
    "quantization": ExecutionConfig(dtype="bfloat16", quantization="fp8"),
    "tiling": ExecutionConfig(vae_tiling=True),
    "offload": ExecutionConfig(offload_text_encoders=True),
}
"""Differ from the model's own, one for each field."""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32, bfloat16, float16"),
        ({"dtype": None}, "dtype is None; allowed: float32, bfloat16, float16"),
        ({"dtype": ["float32"]}, "dtype is ['float32']; allowed: float32, bfloat16, float16"),
        ({"attention": "_native_math"}, f"attention is '_native_math'; allowed: {LISTED}"),
        ({"compile": "max-autotune"}, "compile is 'max-autotune'; allowed: default, regional"),
        ({"quantization": "a\nb"}, "quantization is 'a\\nb'; allowed: default, fp8"),
        ({"quantization": "fp8"}, "quantization is 'fp8' with dtype 'float32'; allowed with it: bfloat16"),
        ({"tiling": 10**400}, "tiling is a number of 1329 bits; allowed: default, vae"),
        ({"offload": "vae"}, "offload is 'vae'; allowed: default, text_encoders"),
    ],
)
def test_a_value_that_is_not_implemented_is_one_line_in_python_and_in_a_profile(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    values = {"dtype": "float32", **values}
    with pytest.raises(ConfigError) as caught:
        Execution(**values)
    assert str(caught.value) == message
    path = tmp_path / "p.json"
    save_profile(PROFILE, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "execution": values}))
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value) == f"profile {path}: execution: {message}"


def test_every_dtype_has_a_tolerance() -> None:
    assert {*TOLERANCES} == {*DTYPES}


def test_an_execution_is_written_as_its_dtype_where_all_else_is_the_default() -> None:
    assert str(HALF) == "bfloat16"
    every = ExecutionConfig(
        attention="sage", compile=True, quantization="fp8", vae_tiling=True, offload_text_encoders=True
    ).of("bfloat16")
    assert str(every) == ("bfloat16,attention=sage,compile=regional,quantization=fp8,tiling=vae,offload=text_encoders")


def test_a_configuration_keeps_the_models_dtype_unless_it_names_one() -> None:
    assert find_model(None).execution == find_model(None, execution=ExecutionConfig()).execution == Execution("float32")
    assert find_model(None, execution=ExecutionConfig(compile=True)).execution == Execution(
        "float32", compile="regional"
    )
    assert find_model(None, execution=ExecutionConfig(dtype="float16")).execution == Execution("float16")
    with pytest.raises(ConfigError, match="quantization is 'fp8' with dtype 'float32'; allowed with it: bfloat16"):
        find_model(None, execution=ExecutionConfig(quantization="fp8"))
    with pytest.raises(ConfigError, match=re.escape(f"attention is 'fa'; allowed: {LISTED}")):
        ExecutionConfig(attention="fa")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OTHERS["quantization"], "quantization is 'fp8', which takes a GPU, but device is cpu; allowed there: default"),
        (
            OTHERS["offload"],
            "offload-text-encoders is set, but device is cpu, where there is nothing to offload; leave it out",
        ),
    ],
)
async def test_what_takes_a_gpu_is_refused_on_a_cpu_before_any_worker_starts(
    config: ExecutionConfig, message: str
) -> None:
    steps: list[str] = []
    progress = StartProgress(step=steps.append)
    for start in (
        launch(EngineConfig(models=(ModelConfig(execution=config),)), progress),
        measure_profile(None, PoolConfig(), (), progress, execution=config),
    ):
        with pytest.raises(ConfigError) as caught:
            await start
        assert str(caught.value) == message
    assert steps == []
    config.of("bfloat16").check_device("cuda")


def test_a_profile_keeps_its_execution(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_profile(dataclasses.replace(PROFILE, execution=HALF), path)
    assert json.loads(path.read_text())["execution"] == {
        "dtype": "bfloat16", "attention": "default", "compile": "default", "quantization": "default",
        "tiling": "default", "offload": "default",
    }  # fmt: skip
    assert load_profile(path).execution == HALF


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ("float32", "execution must be an object"),
        ({"attention": "default"}, "execution lacks the field 'dtype'"),
        ({"dtype": "float32", "cache": "on"}, "execution has the unknown field 'cache'"),
    ],
)
def test_a_profile_without_a_proper_execution_is_refused(tmp_path: Path, execution: object, message: str) -> None:
    path = tmp_path / "p.json"
    save_profile(PROFILE, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "execution": execution}))
    with pytest.raises(ProfileError, match=re.escape(message)):
        load_profile(path)


def test_the_dtype_of_a_profile_of_the_first_format_is_its_execution(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    document: dict[str, Any] = {
        "format": "tetriserve-profile/1", "model": "m", "hardware": "h", "dtype": "bfloat16", "source": "s",
        "created": "c", "encode_s": 0.1, "switch_s": 0.001,
        "denoise": [{"height": 64, "width": 64, "tokens": 4, "degree": 1, "step_s": 0.1}],
        "decode": [{"height": 64, "width": 64, "decode_s": 0.1}],
    }  # fmt: skip
    path.write_text(json.dumps(document))
    assert load_profile(path).execution == HALF
    path.write_text(json.dumps({**document, "dtype": "int8"}))
    with pytest.raises(ProfileError, match="execution: dtype is 'int8'; allowed: float32, bfloat16, float16"):
        load_profile(path)


@pytest.mark.parametrize("field", OTHERS)
def test_a_profile_of_another_execution_is_neither_taken_from_the_cache_nor_from_the_bundled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tetriserve.profiles.BUNDLED_PROFILES", tmp_path / "bundled")
    other = find_model(None, execution=OTHERS[field])
    other = dataclasses.replace(other, max_images=0)  # a kept profile without times of pictures is measured again
    assert getattr(other.execution, field) != getattr(CARD.execution, field)
    assert cached_profile_path(CARD, POOL) != cached_profile_path(other, POOL)
    decodes = tuple(
        Row(stage="decode", height=shape.height, width=shape.width, degree=degree, seconds=0.1)
        for shape in other.sizes
        for degree in other.short_degrees("decode", shape, POOL.degrees)
    )  # a kept profile that lacks those of shared tiles is measured again
    others_profile = dataclasses.replace(PROFILE, execution=other.execution, rows=(*PROFILE.rows, *decodes))
    for path in (cached_profile_path(other, POOL), tmp_path / "bundled/p.json"):
        save_profile(PROFILE, path)
        assert find_profile(other, POOL) is None
        save_profile(others_profile, path)
        assert find_profile(other, POOL) == others_profile
        path.unlink()


def test_a_named_profile_of_another_execution_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.json"
    save_profile(PROFILE, path)
    assert find_profile(CARD, POOL, str(path)) == PROFILE
    assert caplog.messages == []
    caplog.set_level(logging.WARNING)
    assert find_profile(find_model(None, execution=OTHERS["compile"]), POOL, str(path)) == PROFILE
    assert caplog.messages == [f"profile {path} is of float32, but tetriserve-tiny runs in float32,compile=regional"]
