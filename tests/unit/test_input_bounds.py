"""What users give is bounded: absurd numbers, endless files and bombs end in one line, and nothing waits or runs on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from typer.testing import CliRunner, Result

from tetriserve.cli import app
from tetriserve.core.stages import DENOISE
from tetriserve.files import read_bounded
from tetriserve.profile.bundled import open_profile
from tetriserve.profile.table import load_profile, save_profile

HUGE = 10**30
NEEDED = {"result_ttl": ["--journal", "j"], "width": ["--height", "64"], "height": ["--width", "64"]}
"""Without these an option is not looked at."""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("TETRISERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def only_line(result: Result) -> str:
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert len(line) < 500
    return line.removeprefix("tetriserve: ")


def number_options() -> Iterator[tuple[str, str, str]]:
    """Command, parameter and option of every number that the command line takes."""
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated and {int, float} & {hint.__origin__, *get_args(hint.__origin__)}:
                yield command.callback.__name__, name, f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(("command", "name", "option"), list(number_options()))
@pytest.mark.parametrize("value", [HUGE, -HUGE])
def test_every_number_option_has_a_range(command: str, name: str, option: str, value: int) -> None:
    line = only_line(run(command, option, value, *NEEDED.get(name, [])))
    assert "allowed:" in line or "it must be" in line
    assert line.split()[0] in (option.removeprefix("--"), "rate")  # --request-rate is --rate in seconds


def test_there_are_as_many_number_options_as_there_were() -> None:
    """The test above would prove nothing if typer named its types otherwise."""
    assert len(list(number_options())) > 40


@pytest.fixture(params=["pipe", "device", "too large", "directory", "not UTF-8"])
def unreadable(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A file, and the end of the line that is told of it. It is sparse where it is large."""
    path = tmp_path / "f.csv"
    match request.param:
        case "pipe":
            os.mkfifo(path)
            return path, "cannot be read: Not a regular file"
        case "device":
            return Path("/dev/zero"), "cannot be read: Not a regular file"
        case "too large":
            with path.open("wb") as file:
                file.truncate(2**40)
            return path, "bytes"
        case "directory":
            return tmp_path, "cannot be read: Is a directory"
        case _:
            path.write_bytes(b"a\xff")
            return path, "is not UTF-8 text: invalid start byte at byte 1"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["simulate", "--config"], "config file"),
        (["serve", "--port", "0", "--config"], "config file"),
        (["simulate", "--trace"], "trace"),
        (["plan", "--trace"], "trace"),
        (["simulate", "--profile"], "profile"),
        (["serve", "--port", "0", "--profile"], "profile"),
    ],
)
def test_every_file_of_a_user_is_a_regular_one_of_bounded_size(
    unreadable: tuple[Path, str], arguments: list[str], kind: str
) -> None:
    path, told = unreadable
    line = only_line(run(*arguments, path))
    assert line.startswith(f"{kind} {path} ")
    assert line.endswith(told)


def test_a_prompt_file_is_read_the_same_way(unreadable: tuple[Path, str]) -> None:
    from tetriserve.bench.prompts import load_prompts
    from tetriserve.core.errors import ConfigError

    path, told = unreadable
    with pytest.raises(ConfigError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"prompts {path} ")
    assert str(caught.value).endswith(told)


def test_a_file_of_exactly_the_bound_is_read_and_of_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcd")
    assert read_bounded(tmp_path / "f", 4) == b"abcd"
    with pytest.raises(OSError, match="Larger than 3 bytes"):
        read_bounded(tmp_path / "f", 3)


def test_a_name_that_no_file_can_have_is_an_error_like_others() -> None:
    with pytest.raises(OSError, match="A name cannot hold a zero byte"):
        read_bounded(Path("a\0b"), 1)


BOMB = "policies: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("c.yaml", BOMB, "cannot be parsed: it has an alias in line 2; write the value out"),
        ("c.yaml", "a: &a {b: 1}\nc:\n  <<: *a\n", "cannot be parsed: it has an alias in line 3; write the value out"),
        ("c.yaml", "[" * 60_000, "cannot be parsed: it nests lists in line 1; a value is one text or one list"),
        ("c.yaml", "a:\n" + "- " * 30_000, "cannot be parsed: it nests lists in line 2"),
        ("c.toml", "a = " + "[" * 60_000, "cannot be parsed: "),
        ("c.yaml", "requests: 0x" + "f" * 5000, "'requests' must be a text, a number, a switch, or a list of these"),
        ("c.toml", "requests = 0x" + "f" * 5000, "'requests' must be a text, a number, a switch, or a list of these"),
        ("c.yaml", "requests: " + "9" * 5000, "cannot be parsed: "),
        ("c.yaml", "mix: {a: b}", "'mix' must be a text, a number, a switch, or a list of these"),
        ("c.toml", "policies = [['fcfs']]", "'policies' must be a text, a number, a switch, or a list of these"),
    ],
)
def test_bombs_in_a_config_file_are_one_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    assert told in only_line(run("simulate", "--config", tmp_path / name))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policies", f"tetriserve:step_granularity={'9' * 5000}"],
        ["--policies", f"exhaustive:nodes={'9' * 5000}"],
        ["--cache", f"{'9' * 5000}:0.3"],
        ["--arrivals", "gamma:cv=5e-324"],
        ["--arrivals", "step:factor=1e308"],
        ["--arrivals", "on-off:on_s=5e-324"],
        ["--mix", "256x256:1e308,512x512:1e308"],
        ["--mix", "skewed:1e308"],
    ],
)
def test_numbers_within_other_options_are_bounded_too(arguments: list[str]) -> None:
    result = run("simulate", *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("seconds", [5e-324, 1e308, 1e400, 10**4000])
def test_seconds_of_a_profile_are_bounded(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "p.json"
    save_profile(open_profile("flux.1-dev-8xh100"), path)
    document = json.loads(path.read_text())
    document["rows"][1]["seconds"] = seconds
    path.write_text(json.dumps(document))
    line = only_line(run("simulate", "--profile", path))
    assert "rows[1].seconds is " in line
    assert line.endswith("it must be a number of seconds from 1e-06 to 10000")


@pytest.mark.parametrize("seconds", [1e-6, 1e4])
def test_the_bounds_of_a_profile_can_be_simulated(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "p.json"
    save_profile(open_profile("flux.1-dev-8xh100"), path)
    document = json.loads(path.read_text())
    for row in document["rows"]:
        if row["stage"] == DENOISE:
            row["seconds"] = seconds
    path.write_text(json.dumps(document))
    assert load_profile(path).rows_of(DENOISE)[0].seconds == seconds
    result = run("simulate", "--profile", path, "--requests", "5", "--seeds", "1", "--policies", "all")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "line", ["1e308,256,256,28", f"0,{10**7},256,28", "0,256,256,1000000000", f"0,256,{'9' * 5000},28"]
)
def test_numbers_of_a_trace_are_bounded(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"arrival_s,height,width,num_steps\n{line}\n")
    assert "line 2: " in only_line(run("simulate", "--trace", path))
