"""Several models on the command line: names, ranks, and options of one of them; every contradiction is one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tetriserve import Engine
from tetriserve.cli import app
from tetriserve.config import EngineConfig, ExecutionConfig, LoraConfig, ModelConfig, PoolConfig, ServerConfig
from tetriserve.core.errors import ConfigError
from tetriserve.model_options import OPTIONS, model_configs

TWO = ("--model", "images=/m/flux", "--model", "video=/m/wan")
IMAGES, VIDEO = ModelConfig(name="images", path="/m/flux"), ModelConfig(name="video", path="/m/wan")

Configured = Callable[..., EngineConfig]


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env=env)


def only_line(result: Result) -> str:
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    return line.removeprefix("tetriserve: ")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TETRISERVE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Configured:
    """What an engine would be launched with."""
    engines: list[EngineConfig] = []

    def run_server(config: ServerConfig, launch: Callable[[], Any], **settings: Any) -> int:
        launch()
        return 0

    monkeypatch.setattr("tetriserve.server.run.run_server", run_server)
    monkeypatch.setattr("tetriserve.launch.launch", lambda config, progress: engines.append(config))

    def configured(*arguments: str | Path, env: dict[str, str] | None = None) -> EngineConfig:
        result = run(*arguments, env=env)
        assert result.exit_code == 0, result.stderr
        return engines[-1]

    return configured


def test_one_model_is_a_directory_or_the_bundled_one(configured: Configured) -> None:
    assert configured().models == (ModelConfig(),)
    assert configured("/m/flux").models == (ModelConfig(path="/m/flux"),)
    assert configured("--model", "images=/m/flux").models == (IMAGES,)


def test_models_and_their_ranks_come_from_options_environment_or_file(tmp_path: Path, configured: Configured) -> None:
    yaml, toml = tmp_path / "c.yaml", tmp_path / "c.toml"
    yaml.write_text("models: [images=/m/flux, video=/m/wan]\nranks: 8\nmodel-ranks: ['images=0-3', 'video=0,4-7']\n")
    toml.write_text(
        'models = ["images=/m/flux", "video=/m/wan"]\nranks = 8\nmodel-ranks = ["images=0-3", "video=0,4-7"]\n'
    )
    wanted = (replace(IMAGES, ranks=(0, 1, 2, 3)), replace(VIDEO, ranks=(0, 4, 5, 6, 7)))
    environment = {
        "TETRISERVE_MODELS": "images=/m/flux video=/m/wan", "TETRISERVE_MODEL_RANKS": "images=0-3 video=0,4-7",
        "TETRISERVE_RANKS": "8",
    }  # fmt: skip
    ranks = ("--ranks", "8", "--model-ranks", "images=0-3", "--model-ranks", "video=4-7,0")
    assert configured(*TWO, *ranks).models == configured(env=environment).models == wanted
    assert configured("--config", yaml).models == configured("--config", toml).models == wanted
    assert configured(*TWO).models == (IMAGES, VIDEO)
    assert configured("--model", "a=bundled", "--model", "b=./bundled").models == (
        ModelConfig(name="a"), ModelConfig(name="b", path="./bundled")
    )  # fmt: skip


def test_an_option_in_its_own_spelling_is_for_all_models_and_in_model_option_for_one(configured: Configured) -> None:
    engine = configured(
        *TWO, "--max-sequence-length", "128", "--compile", "--attention", "native",
        "--model-option", "video=max-sequence-length=256", "--model-option", "video=compile=off",
        "--model-option", "video=vae-tiling", "--model-option", "video=profile=w.json",
        "--model-option", "images=profile=a=b.json", "--model-option", "images=lora=sketch=l/s.safetensors",
        "--model-option", "images=lora=neon=l/n.safetensors", "--model-option", "images=served-model-name=flux",
        "--model-option", "images=adapter=flux", "--model-option", "images=attention=sage",
    )  # fmt: skip
    images, video = engine.models
    assert images == replace(
        IMAGES, max_sequence_length=128, profile="a=b.json", adapter="flux", served_model_names=("flux",),
        loras=(LoraConfig("sketch", "l/s.safetensors"), LoraConfig("neon", "l/n.safetensors")),
        execution=ExecutionConfig(compile=True, attention="sage"),
    )  # fmt: skip
    assert video == replace(
        VIDEO, max_sequence_length=256, profile="w.json", execution=ExecutionConfig(attention="native", vae_tiling=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/m/flux", *TWO], "model /m/flux stands beside --model images=/m/flux; leave one out"),
        (["--model", "/m/flux"], "model is '/m/flux'; write NAME=DIR, such as images=models/flux"),
        (["--model", "images="], "model is 'images='; write NAME=DIR, such as images=models/flux"),
        (["--model", "a=/x", "--model", "a=/y"], "model names 'a' twice; leave one out"),
        (["--model", "a b=/x"], "a model is called 'a b'; allowed: 1 to 64 of A-Z a-z 0-9 . _ -"),
        (["--model", f"{'a' * 65}=/x"], f"a model is called '{'a' * 65}'; allowed: 1 to 64 of A-Z a-z 0-9 . _ -"),
        (
            ["--model", "default=/x"],
            "a model is called 'default', by which clients mean the first; give it another name",
        ),
        (
            ["--model-ranks", "a=0"],
            "model-ranks is 'a=0', and no --model has a name; write --model NAME=DIR",
        ),
        (
            ["/x", "--model-option", "a=compile"],
            "model-option is 'a=compile', and no --model has a name; write --model NAME=DIR",
        ),
        ([*TWO, "--model-ranks", "x=0"], "model-ranks names 'x', which no --model does; allowed: images, video"),
        ([*TWO, "--model-ranks", "video"], "model-ranks is 'video'; write NAME=RANKS, such as video=0-3"),
        ([*TWO, "--model-ranks", "video=1-0"], "model-ranks of video is '1-0'; write ranks such as 0-3 or 0,2"),
        ([*TWO, "--model-ranks", "video=a"], "model-ranks of video is 'a'; write ranks such as 0-3 or 0,2"),
        ([*TWO, "--model-ranks", "video=0,"], "model-ranks of video is '0,'; write ranks such as 0-3 or 0,2"),
        ([*TWO, "--model-ranks", "video=0-2"], "model-ranks of video names rank 2; allowed: 0 to 1"),
        (
            [*TWO, "--model-ranks", "video=0", "--model-ranks", "video=1"],
            "model-ranks names 'video' twice; leave one out",
        ),
        (
            [*TWO, "--ranks", "4", "--model-ranks", "images=0", "--model-ranks", "video=1"],
            "ranks 2,3 hold no model; name them in model-ranks, or use fewer --ranks",
        ),
        (
            ["--model", "a=/x", "--model-ranks", "a=1"],
            "rank 0 holds no model; name them in model-ranks, or use fewer --ranks",
        ),
        (
            [*TWO, "--profile", "p.json"],
            "profile is 'p.json', and several models are served; say of which, such as "
            "--model-option images=profile=p.json",
        ),
        (
            [*TWO, "--lora", "s=s.safetensors"],
            "lora is 's=s.safetensors', and several models are served; say of which, such as "
            "--model-option images=lora=s=s.safetensors",
        ),
        (
            [*TWO, "--served-model-name", "flux"],
            "served-model-name is 'flux', and several models are served; say of which, such as "
            "--model-option images=served-model-name=flux",
        ),
        (
            [*TWO, "--model-option", "x=compile"],
            "model-option names 'x', which no --model does; allowed: images, video",
        ),
        ([*TWO, "--model-option", "compile"], "model-option is 'compile'; write NAME=OPTION, such as video=vae-tiling"),
        (
            [*TWO, "--model-option", "video=ranks=2"],
            f"model-option video=ranks is no option of a model; allowed: {', '.join(OPTIONS)}",
        ),
        ([*TWO, "--model-option", "video=compile=yes"], "model-option video=compile is 'yes'; allowed: on, off"),
        (
            [*TWO, "--model-option", "video=profile"],
            "model-option video=profile has no value; write model-option video=profile=VALUE",
        ),
        (
            [*TWO, "--model-option", "video=max-sequence-length=two"],
            "model-option video=max-sequence-length is 'two'; write a whole number",
        ),
        (
            [*TWO, "--model-option", "video=adapter=a", "--model-option", "video=adapter=b"],
            "model-option video=adapter is given twice; leave one out",
        ),
        (
            [*TWO, "--model-option", "video=lora=s"],
            "lora is 's'; write NAME=PATH, such as sketch=loras/sketch.safetensors",
        ),
        (
            [*TWO, "--remeasure", "--model-option", "video=profile=p.json"],
            "remeasure is set beside profile p.json, which would not be used; leave one out",
        ),
    ],
)
def test_a_contradiction_is_one_line(arguments: list[str], message: str) -> None:
    assert only_line(run(*arguments)) == message


def test_the_file_may_name_one_model_beside_options_for_several(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: [a=/x]\n")
    assert only_line(run("/m/flux", "--config", file)) == "model /m/flux stands beside --model a=/x; leave one out"


def test_several_models_need_names_of_their_own() -> None:
    for models, message in (
        ((), "no model is named; name at least one"),
        ((IMAGES, ModelConfig()), "2 models are served, and one has no name; give each a name of its own"),
        ((IMAGES, IMAGES), "two models are called 'images'; give each a name of its own"),
    ):
        with pytest.raises(ConfigError) as caught:
            EngineConfig(models=models)
        assert str(caught.value) == message
    pool = PoolConfig(num_ranks=2)
    assert EngineConfig(models=(replace(IMAGES, ranks=(1, 0, 1)),), pool=pool).models[0].ranks == (0, 1)


def test_without_names_the_common_options_are_the_model() -> None:
    common = ModelConfig(path="/x", profile="p.json")
    assert model_configs(common) == (common,)


def test_the_python_interface_takes_one_model_or_several() -> None:
    models = (replace(IMAGES, ranks=(0,)), VIDEO)
    assert Engine(models=models, ranks=2)._config.models == models
    assert Engine("/x", profile="p.json")._config.models == (ModelConfig(path="/x", profile="p.json"),)
    with pytest.raises(ConfigError) as caught:
        Engine("/x", models=models)
    assert str(caught.value) == ("models stands beside model, profile, adapter or loras; say these of each of models")
