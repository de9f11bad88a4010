"""The body of a worker process: load, warm, then one message after the other until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from tetriserve.core.errors import TetriServeError
from tetriserve.core.memory import Component, RankMemory
from tetriserve.core.messages import (
    Forget,
    FromWorker,
    Heartbeat,
    PreviewBasis,
    Ready,
    RunTask,
    StartFailed,
    Stop,
    ToWorker,
)
from tetriserve.core.request import Request
from tetriserve.logs import set_up_logging
from tetriserve.models.registry import dummy_request
from tetriserve.worker.lifeline import hold
from tetriserve.worker.parent import follow_server
from tetriserve.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from tetriserve.models.adapter import Adapter
    from tetriserve.models.card import ModelCard
    from tetriserve.worker.team.shm import ShmTeam

logger = logging.getLogger(__name__)


class ExecutorGone(Exception):
    """The other end of the pipe is closed: nobody is left to work for, or to tell."""


class Pipe:
    """The way to the executor and back. The task thread and the heartbeat thread both send."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """Raises ExecutorGone."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError as error:
            raise ExecutorGone from error

    def receive(self) -> ToWorker:
        """The next message, waited for. Raises ExecutorGone."""
        try:
            message: ToWorker = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ExecutorGone from error
        return message


def worker_main(spec: WorkerSpec, connection: Connection, lifeline: Connection) -> None:
    """Entry point of the process. Ends when told to, or when the executor's end of the pipe closes."""
    follow_server()
    hold(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the server decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _name_process(spec.rank)
    set_up_logging("info", spec.pool.log_format, rank=spec.rank)
    pipe = Pipe(connection)
    try:
        _serve(spec, pipe)
    except ExecutorGone:
        pass
    except TetriServeError as error:
        pipe.send(StartFailed(str(error)))
    except Exception as error:  # the process boundary: an operator gets one line, the log has the rest
        logger.debug("worker failed", exc_info=True)
        pipe.send(StartFailed(f"worker {spec.rank} failed: {type(error).__name__}: {error}".splitlines()[0]))
    finally:
        # Torch's own teardown may wait for peers of half-dead groups.
        os._exit(0)


def _name_process(rank: int) -> None:
    """So that `ps` and `top` tell ranks apart; names may have 15 characters. Without /proc there is none."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"ts-rank-{rank}")


def _serve(spec: WorkerSpec, pipe: Pipe) -> None:
    import torch

    import tetriserve.models.preload  # noqa: F401  a worker that was not forked has to load it
    from tetriserve.models.checkpoint import check_unchanged
    from tetriserve.models.registry import load_adapter
    from tetriserve.worker.runner import DeviceLost, Runner
    from tetriserve.worker.store import TensorStore
    from tetriserve.worker.weights import share_weights

    torch.set_num_threads(spec.pool.num_threads)
    if spec.device.startswith("cuda"):
        assert not torch.cuda._is_in_bad_fork(), "the fork server has initialised CUDA"
        torch.cuda.set_device(spec.device)
    runner: Runner | None = None
    num_steps = lambda: 0 if runner is None else runner.num_steps  # noqa: E731
    threading.Thread(target=_beat, args=(pipe, num_steps, spec.pool.heartbeat_s), daemon=True).start()
    team = _team_of(spec)
    adapters: dict[str, Adapter] = {}
    for place, card in spec.held.items():
        check_unchanged(card)
        adapter = load_adapter(card, spec.device, spec.adapter, has_text_encoders=spec.has_text_encoders(card))
        if spec.device == "cpu":
            share_weights(adapter.weights, spec.region, place)
        adapters[card.key] = adapter
    runner = Runner(adapters, team, TensorStore(spec.store), spec.rank, spec.device, spec.pool.resident_bytes)
    with torch.no_grad():
        for card in spec.held.values():
            runner.warm(
                _warm_up_request(card),
                lacks=spec.lacks(card),
                gives=spec.gives(card),
                timeout_s=spec.pool.start_timeout_s / 2,
            )
    shown = [card for card in spec.held.values() if spec.shows(card)]
    bases = tuple(PreviewBasis(card.key, runner.save_preview_basis(card)) for card in shown)
    pipe.send(Ready(bases, _memory_of(adapters)))
    while True:
        message = pipe.receive()
        match message:
            case RunTask():
                try:
                    pipe.send(runner.run(message))
                except DeviceLost as error:
                    logger.error("the device is lost: %s", error)
                    return  # a fresh process takes this rank
            case Forget(request_id):
                runner.forget(request_id)
            case Stop():
                return
            case _:
                assert_never(message)


def _memory_of(adapters: Mapping[str, Adapter]) -> RankMemory:
    components = tuple(
        Component(name, num_bytes, key)
        for key, adapter in adapters.items()
        for name, num_bytes in adapter.held_bytes().items()
    )
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        num_pages = 0
    return RankMemory(components, num_pages * resource.getpagesize())


def _beat(pipe: Pipe, num_steps: Callable[[], int], every_s: float) -> None:
    stopped = threading.Event()
    while not stopped.wait(every_s):
        try:
            pipe.send(Heartbeat(num_steps()))
        except ExecutorGone:
            os._exit(0)  # the other thread may be stuck, in a collective or a driver


def _team_of(spec: WorkerSpec) -> ShmTeam:
    from tetriserve.worker.team.groups import GroupTeam
    from tetriserve.worker.team.shm import ShmTeam

    pool = spec.pool
    if pool.collectives == "shm":
        return ShmTeam(spec.region, spec.rank)
    return GroupTeam(spec.region, spec.rank, pool.backend, spec.store, pool.group_timeout_s, pool.max_groups)


def _warm_up_request(card: ModelCard) -> Request:
    smallest = min(card.sizes, key=lambda shape: shape.num_pixels)
    return dummy_request(card, smallest, "warm-up", 1, [smallest] if card.max_images else [])
