"""The command line: quick to start, one line for each mistake, and a fixed order of who overrides whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from tetriserve import __version__
from tetriserve.cli import app


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TETRISERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TETRISERVE_PORT", "0")  # tests run beside each other


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def only_line(result: Result) -> str:
    """The one line that a failing command leaves on stderr."""
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("tetriserve: ")
    return line.removeprefix("tetriserve: ")


def test_the_command_line_and_its_help_load_no_heavy_library() -> None:
    code = (
        "import sys; from tetriserve.cli import app\n"
        "try: app(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'fastapi', 'uvicorn', 'numpy', 'PIL', 'yaml'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--default-slo-scale" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("command", ["serve", "profile"])
def test_without_docstrings_there_is_no_transformers_and_one_line_says_so(command: str) -> None:
    code = f"from tetriserve.cli import app; app(['{command}'])"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "tetriserve: python -OO removes docstrings, which transformers reads; use -O, and unset PYTHONOPTIMIZE=2"
    ]


def test_simulations_need_no_docstrings() -> None:
    code = "from tetriserve.cli import app; app(['simulate', '--requests', '2', '--seeds', '1', '--format', 'json'])"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)


def test_help_lists_the_commands_and_version_is_the_packages() -> None:
    listed = run("--help").stdout
    assert all(command in listed for command in ("serve", "profile", "--version"))
    assert run("--version").stdout == f"tetriserve {__version__}\n"


@pytest.mark.parametrize("command", ["serve", "profile"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent"], "/nonexistent is not a directory; give a directory that holds a diffusers pipeline"),
        (["--degrees", "a,b"], "degrees is 'a,b'; write whole numbers with commas, such as 1,2,4"),
        (["--degrees", "2"], "degrees is 2; it must contain 1, at which encode and decode run"),
        (["--ranks", "2", "--degrees", "1,4"], "degrees is 1,4 with 2 ranks; use --ranks 4 or degrees of at most 2"),
        (["--ranks", "0"], "ranks is 0; allowed: 1 to 1024"),
        (["--ranks", "2", "--encoder-ranks", "0"], "encoder-ranks is 0; allowed: 1 to 2"),
        (["--ranks", "2", "--encoder-ranks", "3"], "encoder-ranks is 3; allowed: 1 to 2"),
        (["--encoder-ranks", "-1"], "encoder-ranks is -1; allowed: 1 to 2"),
        (["--device", "tpu"], "device is 'tpu'; allowed: cpu, cuda"),
        (["--threads", "0"], "threads is 0; allowed: 1 to 1024"),
        (["--max-batch", "0"], "max-batch is 0; allowed: 1 to 64"),
        (["--log-level", "loud"], "log-level is 'loud'; allowed: debug, info, warning, error"),
        (["--config", "/nonexistent.yaml"], "config file /nonexistent.yaml cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_a_failing_exit_code(
    command: str, arguments: list[str], message: str
) -> None:
    assert only_line(run(command, *arguments)) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "guesswork"], "unknown policy 'guesswork'; choose one of: "),
        (["--port", "70000"], "port is 70000; allowed: 0 to 65535"),
        (["--max-queue", "0"], "max-queue is 0; allowed: 1 to 1000000"),
        (["--max-losses", "-1"], "max-losses is -1; allowed: 0 to 1000"),
        (["--default-slo-scale", "-1"], "default-slo-scale is -1; allowed: 0.001 to 1e+06"),
        (["--heartbeat-timeout", "0"], "heartbeat-timeout is 0; allowed: 0.001 to 604800"),
        (["--shutdown-timeout", "-1"], "shutdown-timeout is -1; allowed: 0 to 604800"),
        (["--remeasure", "--profile", "p.json"], "remeasure is set beside profile p.json, which would not be used"),
    ],
)
def test_a_server_that_cannot_be_is_one_line(arguments: list[str], message: str) -> None:
    assert only_line(run("serve", *arguments)).startswith(message)


def test_an_impossible_size_to_measure_is_one_line() -> None:
    assert only_line(run("profile", "--sizes", "512")).startswith("--sizes: size '512' is not of the form WIDTHxHEIGHT")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", "ranks: 2\nrank: 3\n", "sets 'rank'; allowed: adapter, attention, collectives, compile, degrees, "),
        (
            "c.toml",
            'model_name = "x"',
            "sets 'model_name'; allowed: adapter, attention, collectives, compile, degrees, ",
        ),
        ("c.yaml", "ranks: [1, 2\npolicy: x: y\n", "cannot be parsed: "),
        ("c.yaml", "\tranks: 2", "cannot be parsed: "),
        ("c.toml", "ranks = = 2", "cannot be parsed: "),
        ("c.yaml", "- ranks\n- 2\n", "must hold option names and values"),
        ("c.yaml", "just words", "must hold option names and values"),
        ("c.yaml", "ranks: \udcff", "is not UTF-8 text"),
        ("c.toml", "ranks = '\udcff'", "is not UTF-8 text"),
        ("c.yaml", "ranks: " + "[" * 1500, "cannot be parsed: "),
        ("c.toml", "ranks = " + "[" * 5000, "cannot be parsed: "),
        ("c.yaml", "ranks: !!python/object/apply:os.system ['exit 3']", "cannot be parsed: "),
        ("c.yaml", "ranks: &a [*a]\n? [b]\n: c", "cannot be parsed: "),
    ],
)
def test_a_bad_config_file_is_one_line_with_its_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, errors="surrogateescape")
    line = only_line(run("profile", "--config", path))
    assert str(path) in line
    assert message in line


def num_ranks(result: Result) -> int:
    """The ranks that a command run with `--degrees 1,64` was given, out of its complaint."""
    words = only_line(result).split()
    assert words[:4] == ["degrees", "is", "1,64", "with"]
    return int(words[4])


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_the_command_line_overrides_the_environment_which_overrides_the_file_which_overrides_the_default(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"c.{suffix}"
    path.write_text("ranks: 3\ndegrees: [1, 64]\n" if suffix == "yaml" else 'ranks = 3\ndegrees = "1,64"\n')
    env = {"TETRISERVE_RANKS": "4"}
    assert num_ranks(run("profile", "--degrees", "1,64")) == 2
    assert num_ranks(run("profile", "--config", path)) == 3
    assert num_ranks(run("profile", "--config", path, env=env)) == 4
    assert num_ranks(run("profile", "--config", path, "--ranks", "5", env=env)) == 5
    assert num_ranks(run("profile", env={"TETRISERVE_CONFIG": str(path)})) == 3


def test_a_config_file_may_spell_options_with_dashes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("log-level: loud\n")
    assert only_line(run("serve", "--config", path)).startswith("log-level is 'loud'")


def test_the_installed_command_fails_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr == f"tetriserve: {tmp_path} has no model_index.json; give the top directory of a diffusers " + (
        "pipeline, not one of its parts\n"
    )


settings_of_a_file = st.dictionaries(
    st.sampled_from(["ranks", "device", "threads", "start-timeout", "log_level", "model", "profile", "sizes", "out"])
    | st.text(max_size=5),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers() | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    max_size=3,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=settings_of_a_file.map(lambda values: json.dumps(values | {"degrees": "1,x"})) | st.text(max_size=30))
def test_whatever_a_config_file_holds_the_command_ends_with_2_and_no_traceback(tmp_path: Path, content: str) -> None:
    """`degrees` is wrong in every file that could be right: nothing is ever started."""
    path = tmp_path / "any.yaml"
    path.write_text(content, errors="surrogatepass")
    result = run("profile", "--config", path, env={"TETRISERVE_DEGREES": "1,x"})
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
