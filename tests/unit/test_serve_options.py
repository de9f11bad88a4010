"""Who may use the server and how it logs, as the operator says it: options, environment, file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tetriserve.cli import app
from tetriserve.config import (
    AccessConfig,
    ApiConfig,
    EngineConfig,
    ExecutionConfig,
    JournalConfig,
    LoraConfig,
    ServerConfig,
)
from tetriserve.core.errors import ConfigError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TETRISERVE_"):
            monkeypatch.delenv(name)


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env=env)


def only_line(result: Result) -> str:
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    return line.removeprefix("tetriserve: ")


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerConfig]:
    """What the server would be run with."""
    configs: list[ServerConfig] = []

    def run_server(config: ServerConfig, *arguments: Any, **settings: Any) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr("tetriserve.server.run.run_server", run_server)

    def configured(*arguments: str | Path, env: dict[str, str] | None = None) -> ServerConfig:
        result = run(*arguments, env=env)
        assert result.exit_code == 0, result.stderr
        return configs[-1]

    return configured


def test_by_default_the_server_is_for_this_machine_and_needs_no_key(configured: Callable[..., ServerConfig]) -> None:
    assert configured() == ServerConfig(host="127.0.0.1", access=AccessConfig())


def test_keys_come_from_options_environment_or_file(tmp_path: Path, configured: Callable[..., ServerConfig]) -> None:
    listed, single, toml = tmp_path / "listed.yaml", tmp_path / "single.yaml", tmp_path / "c.toml"
    listed.write_text("api-key: [one, two]\ncors_origin: [https://a.example]\n")
    single.write_text("api_key: one\nguard-metrics: true\n")
    toml.write_text('api-key = ["one", "two"]\n')
    assert configured("--api-key", "one", "--api-key", "two").access.api_keys == ("one", "two")
    assert configured(env={"TETRISERVE_API_KEY": "one two"}).access.api_keys == ("one", "two")
    assert configured("--config", listed).access == AccessConfig(
        api_keys=("one", "two"), cors_origins=("https://a.example",)
    )
    assert configured("--config", single).access == AccessConfig(api_keys=("one",), guard_metrics=True)
    assert configured("--config", toml).access.api_keys == ("one", "two")
    assert configured("--config", listed, env={"TETRISERVE_API_KEY": "three"}).access.api_keys == ("three",)


def test_limits_reach_the_server(configured: Callable[..., ServerConfig]) -> None:
    access = configured("--rate-limit", "60", env={"TETRISERVE_MAX_CONCURRENCY": "4"}).access
    assert (access.rate_limit, access.max_concurrency) == (60, 4)


def test_how_requests_are_read_comes_from_options_environment_or_file(
    tmp_path: Path, configured: Callable[..., ServerConfig]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("compat: strict\nurl-ttl: 60\npreview_size: 128\n")
    assert configured().api == ApiConfig(compat="lenient", url_ttl_s=3600.0, preview_side=256)
    assert configured("--config", file).api == ApiConfig(compat="strict", url_ttl_s=60.0, preview_side=128)
    api = configured("--config", file, "--compat", "lenient", env={"TETRISERVE_URL_TTL": "0"}).api
    assert api == ApiConfig(compat="lenient", url_ttl_s=0.0, preview_side=128)
    assert only_line(run("--compat", "loose")) == "compat is 'loose'; allowed: lenient, strict"


@pytest.mark.parametrize("value", ["", "  "])
def test_a_key_that_did_not_arrive_does_not_open_the_server(value: str) -> None:
    line = only_line(run(env={"TETRISERVE_API_KEY": value}))
    assert line == "TETRISERVE_API_KEY is empty; set it to a key, or unset it to serve everyone"


@pytest.mark.parametrize("content", ["api-key:\n", "api-key: []\n"])
def test_a_key_set_to_nothing_in_a_file_does_not_open_the_server(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert only_line(run("--config", path)).endswith(
        "sets 'api_key' to nothing; give it a value, or leave the line out"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", ""], "api-key 1 is empty; allowed: "),
        (["--api-key", "good", "--api-key", "my secret"], "api-key 2 holds a space or a character outside ASCII; "),
        (["--rate-limit", "0"], "rate-limit is 0; allowed: 1 to 1000000"),
        (["--max-concurrency", "0"], "max-concurrency is 0; allowed: 1 to 1000000"),
        (["--guard-metrics"], "guard-metrics is set without a key to ask for; add --api-key"),
        (["--cors-origin", "here"], "cors-origin is 'here'; write an origin such as https://example.org, or *"),
        (["--served-model-name", ""], "served-model-name is ''; allowed: 1 to 200 printable characters"),
        (["--served-model-name", "a\nb"], "served-model-name is 'a\\nb'; allowed: 1 to 200 printable characters"),
        (["--journal", "j", "--result-ttl", "0"], "result-ttl is 0; allowed: 0.001 to 3.16224e+07"),
        (["--otlp-traces-endpoint", "https://c/v1/traces?token=secret"], "otlp-traces-endpoint has a query, which"),
        (["--attention", "fa2"], "attention is 'fa2'; allowed: default, native, native_flash, native_cudnn, "),
        (["--quantization", "int4"], "quantization is 'int4'; allowed: default, fp8"),
        (["--log-format", "xml"], "log-format is 'xml'; allowed: text, json"),
        (
            ["--otlp-traces-endpoint", "grpc://user:secret@collector:4318"],
            "otlp-traces-endpoint is no URL of HTTP; write one such as http://localhost:4318/v1/traces",
        ),
    ],
)
def test_a_mistake_is_one_line_without_the_key(arguments: list[str], message: str) -> None:
    line = only_line(run(*arguments))
    assert line.startswith(message)
    assert "secret" not in line


@pytest.mark.parametrize(
    "content",
    ["api-key: [my-secret\nport: 1", "api-key: 'my-secret\n", "api-key: my-secret: x\n", "\tapi-key: my-secret"],
)
def test_a_file_that_cannot_be_parsed_is_not_quoted(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    line = only_line(run("--config", path))
    assert "cannot be parsed: " in line
    assert " in line " in line
    assert "secret" not in line


def test_keys_are_in_no_help_and_no_log_of_the_start(
    configured: Callable[..., ServerConfig], caplog: pytest.LogCaptureFixture
) -> None:
    env = {"TETRISERVE_API_KEY": "my-secret"}
    with caplog.at_level(logging.DEBUG):
        assert "my-secret" not in repr(configured(env=env))
    assert "secret" not in run("--help", env=env).stdout
    assert "secret" not in caplog.text


def test_the_model_has_as_many_names_as_are_given_and_one_length_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[EngineConfig] = []

    def run_server(config: ServerConfig, launch: Callable[[], Any], **settings: Any) -> int:
        launch()
        return 0

    monkeypatch.setattr("tetriserve.server.run.run_server", run_server)
    monkeypatch.setattr("tetriserve.launch.launch", lambda config, progress: engines.append(config))
    file = tmp_path / "c.yaml"
    file.write_text("served-model-name: [flux, b/c]\nmax-sequence-length: 256\n")
    for arguments in (
        (),
        ("--served-model-name", "flux", "--served-model-name", "b/c", "--max-sequence-length", "256"),
        ("--config", file),
    ):
        assert run(*arguments).exit_code == 0
    assert [(engine.models[0].served_model_names, engine.models[0].max_sequence_length) for engine in engines] == [
        ((), None), (("flux", "b/c"), 256), (("flux", "b/c"), 256)
    ]  # fmt: skip


def test_the_journal_comes_from_options_environment_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[EngineConfig] = []

    def run_server(config: ServerConfig, launch: Callable[[], Any], **settings: Any) -> int:
        launch()
        return 0

    monkeypatch.setattr("tetriserve.server.run.run_server", run_server)
    monkeypatch.setattr("tetriserve.launch.launch", lambda config, progress: engines.append(config))
    file = tmp_path / "c.yaml"
    file.write_text("journal: /var/lib/j\nresult-ttl: 60\n")
    for arguments, env in (
        ((), {}),
        (("--journal", "/var/lib/j"), {}),
        (("--journal", "/var/lib/j", "--result-ttl", "60"), {}),
        ((), {"TETRISERVE_JOURNAL": "/var/lib/j", "TETRISERVE_RESULT_TTL": "60"}),
        (("--config", file), {}),
    ):
        assert run(*arguments, env=env).exit_code == 0
    kept = JournalConfig(directory="/var/lib/j", result_ttl_s=60.0)
    assert [engine.journal for engine in engines] == [
        None, JournalConfig(directory="/var/lib/j", result_ttl_s=3600.0), kept, kept, kept
    ]  # fmt: skip


def test_how_the_model_is_run_comes_from_options_environment_or_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[EngineConfig] = []

    def run_server(config: ServerConfig, launch: Callable[[], Any], **settings: Any) -> int:
        launch()
        return 0

    monkeypatch.setattr("tetriserve.server.run.run_server", run_server)
    monkeypatch.setattr("tetriserve.launch.launch", lambda config, progress: engines.append(config))
    file = tmp_path / "c.yaml"
    file.write_text(
        "compile: true\nattention: sage\nquantization: fp8\nvae-tiling: true\noffload-text-encoders: true\n"
    )
    options = ["--compile", "--attention", "sage", "--quantization", "fp8", "--vae-tiling", "--offload-text-encoders"]
    environment = {"TETRISERVE_COMPILE": "1", "TETRISERVE_ATTENTION": "sage", "TETRISERVE_QUANTIZATION": "fp8"}
    environment |= {"TETRISERVE_VAE_TILING": "1", "TETRISERVE_OFFLOAD_TEXT_ENCODERS": "1"}
    assert run().exit_code == run(*options).exit_code == run("--config", file).exit_code == 0
    assert run(env=environment).exit_code == 0
    told = ExecutionConfig(
        attention="sage", compile=True, quantization="fp8", vae_tiling=True, offload_text_encoders=True
    )
    assert [engine.models[0].execution for engine in engines] == [ExecutionConfig(), told, told, told]


def test_a_profile_is_measured_of_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    async def measure_profile(*arguments: Any) -> None:
        told.extend(arguments[-3:])
        raise ConfigError("enough")

    monkeypatch.setattr("tetriserve.launch.measure_profile", measure_profile)
    options = ["--compile", "--attention", "native_math", "--vae-tiling", "--adapter", "generic"]
    result = CliRunner().invoke(app, ["profile", *options, "--lora", "a=b.safetensors"])
    assert only_line(result) == "enough"
    execution = ExecutionConfig(compile=True, attention="native_math", vae_tiling=True)
    assert told == [execution, "generic", (LoraConfig("a", "b.safetensors"),)]


def test_encoder_ranks_come_from_options_environment_or_file_and_go_with_offloading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[EngineConfig] = []

    def run_server(config: ServerConfig, launch: Callable[[], Any], **settings: Any) -> int:
        launch()
        return 0

    monkeypatch.setattr("tetriserve.server.run.run_server", run_server)
    monkeypatch.setattr("tetriserve.launch.launch", lambda config, progress: engines.append(config))
    file = tmp_path / "c.toml"
    file.write_text("ranks = 4\nencoder-ranks = 1\n")
    assert run("--ranks", "4").exit_code == run("--config", file).exit_code == 0
    assert run("--ranks", "4", "--encoder-ranks", "1", "--offload-text-encoders").exit_code == 0
    assert run("--ranks", "4", env={"TETRISERVE_ENCODER_RANKS": "1"}).exit_code == 0
    assert [engine.pool.encoder_ranks for engine in engines] == [None, 1, 1, 1]
    assert [engine.models[0].execution.offload_text_encoders for engine in engines] == [False, False, True, False]


@pytest.mark.parametrize("value", ["two", "1.5", ""])
def test_encoder_ranks_that_are_no_number_are_refused(value: str) -> None:
    result = run("--encoder-ranks", value)
    assert result.exit_code == 2
    assert "--encoder-ranks" in result.stderr and "integer" in result.stderr


def test_loras_come_from_options_environment_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[EngineConfig] = []

    def run_server(config: ServerConfig, launch: Callable[[], Any], **settings: Any) -> int:
        launch()
        return 0

    monkeypatch.setattr("tetriserve.server.run.run_server", run_server)
    monkeypatch.setattr("tetriserve.launch.launch", lambda config, progress: engines.append(config))
    file = tmp_path / "c.yaml"
    file.write_text("lora: [a=x.safetensors, b/2=y]\n")
    assert run().exit_code == run("--lora", "a=x.safetensors", "--lora", "b/2=y").exit_code == 0
    assert run(env={"TETRISERVE_LORA": "a=x.safetensors b/2=y"}).exit_code == run("--config", file).exit_code == 0
    told = (LoraConfig("a", "x.safetensors"), LoraConfig("b/2", "y"))
    assert [engine.models[0].loras for engine in engines] == [(), told, told, told]
    assert only_line(run("--lora", "a")) == "lora is 'a'; write NAME=PATH, such as sketch=loras/sketch.safetensors"
