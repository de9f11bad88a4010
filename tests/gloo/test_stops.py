"""Real commands that are stopped, or whose fork server is stopped, at bad moments: they end, and leave nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.processes import find_fork_server, find_processes, find_workers, store_directory
from tests.waiting import HANG_S

SHUTDOWN_S = 3


class Command:
    """`tetriserve ...` as the leader of a session of its own, so that all its processes can be found."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log_file = folder / "stderr"
        command = [sys.executable, "-c", "from tetriserve.cli import main; main()", *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TETRISERVE_")}
        environment["XDG_CACHE_HOME"] = str(folder)
        with self.log_file.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment, cwd=folder, start_new_session=True)
        self.pid = self.process.pid
        self._store: Path | None = None

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def fork_server(self) -> int | None:
        return find_fork_server(self.pid)

    @property
    def workers(self) -> dict[int, int]:
        return find_workers(self.pid)

    def until(self, is_so: Callable[[], object]) -> None:
        """Wait for it while the command lives."""
        ends_at = time.monotonic() + HANG_S
        while not is_so():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < ends_at, self.log
            time.sleep(0.01)

    def until_logged(self, text: str) -> None:
        self.until(lambda: text in self.log)
        self._store = store_directory(self.pid)

    def press_ctrl_c(self) -> None:
        """It reaches the whole terminal."""
        os.killpg(self.pid, signal.SIGINT)

    def exit_code(self) -> int:
        """Of the command, once nothing is left of it."""
        code = self.process.wait(HANG_S)
        assert "still not stopped" not in self.log, "only the last resort has ended it"
        ends_at = time.monotonic() + HANG_S
        while left := list(find_processes(self.pid)):
            assert time.monotonic() < ends_at, left
            time.sleep(0.01)
        return code

    def has_left_its_store(self) -> bool:
        assert self._store is not None
        return self._store.exists()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def run(*arguments: str) -> Command:
        commands.append(Command(tmp_path, *arguments))
        return commands[-1]

    yield run
    for command in commands:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        command.process.wait()


@pytest.fixture
def serve(run: Callable[..., Command], profile_path: str) -> Callable[..., Command]:
    options = ("--port", "0", "--ranks", "2", "--heartbeat-timeout", "2", "--shutdown-timeout", str(SHUTDOWN_S))
    return lambda *more: run("serve", *options, "--profile", profile_path, *more)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_workers_start_is_one_line_and_128_plus_its_number(
    serve: Callable[..., Command], number: signal.Signals
) -> None:
    command = serve()
    command.until_logged("starting 2 workers")
    command.until(lambda: command.fork_server)
    os.killpg(command.pid, number) if number is signal.SIGINT else command.process.send_signal(number)
    assert command.exit_code() == 128 + number
    assert command.log.splitlines()[1:] == [command.log.splitlines()[-1]], command.log
    assert command.log.endswith(f"stopped by {number.name} while starting\n")
    assert not command.has_left_its_store()


def test_a_fork_server_stopped_at_the_start_does_not_hold_up_sigterm(serve: Callable[..., Command]) -> None:
    command = serve()
    command.until_logged("starting 2 workers")
    command.until(lambda: command.fork_server)
    os.kill(command.fork_server or 0, signal.SIGSTOP)
    command.process.terminate()
    assert command.exit_code() == 128 + signal.SIGTERM
    assert "Traceback" not in command.log


def test_a_fork_server_that_dies_at_the_start_ends_it_with_one_line(serve: Callable[..., Command]) -> None:
    command = serve()
    command.until_logged("starting 2 workers")
    command.until(lambda: command.fork_server)
    os.kill(command.fork_server or 0, signal.SIGKILL)
    assert command.exit_code() == 2
    assert command.log.splitlines()[1:] == ["tetriserve: workers cannot be started: the fork server ended"]
    assert not command.has_left_its_store()


def test_a_stopped_fork_server_is_replaced_when_a_worker_is_needed(serve: Callable[..., Command]) -> None:
    command = serve()
    command.until_logged("is ready at")
    stopped, before = command.fork_server, command.workers
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    os.kill(before[1], signal.SIGKILL)
    command.until(
        lambda: command.fork_server not in (None, stopped) and command.workers.get(1) not in (None, before[1])
    )
    assert "the fork server did not answer within 2 s, and was ended" in command.log
    assert command.workers[0] == before[0], "the other rank has gone on"
    command.process.terminate()
    assert command.exit_code() == 0
    assert not command.has_left_its_store()


def test_a_stopped_fork_server_does_not_hold_up_the_stop(serve: Callable[..., Command]) -> None:
    command = serve("--heartbeat-timeout", "100")
    command.until_logged("is ready at")
    os.kill(command.fork_server or 0, signal.SIGSTOP)
    for pid in command.workers.values():
        os.kill(pid, signal.SIGKILL)
    command.until_logged("lost rank 1")
    command.process.terminate()
    assert command.exit_code() == 0
    assert "Traceback" not in command.log
    assert not command.has_left_its_store()


def test_stopped_workers_and_a_stopped_fork_server_end_with_a_killed_server(serve: Callable[..., Command]) -> None:
    command = serve("--heartbeat-timeout", "100")
    command.until_logged("is ready at")
    os.kill(command.workers[1], signal.SIGSTOP)
    os.kill(command.fork_server or 0, signal.SIGSTOP)
    command.process.kill()
    assert command.exit_code() == -signal.SIGKILL


@pytest.mark.parametrize("name", ["serve", "profile", "evaluate"])
def test_a_signal_while_a_profile_is_measured_is_one_line(run: Callable[..., Command], name: str) -> None:
    arguments = {"serve": ("--port", "0", "--remeasure"), "profile": (), "evaluate": ("--remeasure",)}
    command = run(name, "--ranks", "2", *arguments[name])
    command.until(lambda: list((store_directory(command.pid) or Path("/nowhere")).glob("profile-*")))
    command.until_logged("")
    command.press_ctrl_c()
    assert command.exit_code() == 128 + signal.SIGINT
    *others, last = filter(None, command.log.splitlines())
    assert "stopped by SIGINT" in last
    said = [line for line in others if not line.startswith("  ")]
    assert all(" hold " in line for line in said), "what ranks hold is said as they are ready"
    assert not command.has_left_its_store()
