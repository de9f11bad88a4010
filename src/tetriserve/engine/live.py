"""Drives the controller in real time: events from clients and workers in, commands to the executor out."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import assert_never

from tetriserve.control.admission import check_room
from tetriserve.control.controller import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.errors import RequestFailed, ShuttingDown
from tetriserve.core.events import (
    Cancelled,
    CloseCancelled,
    Command,
    Event,
    FailRequest,
    FinishRequest,
    ForgetRequest,
    Run,
    StartTask,
    Submitted,
    TaskFailed,
    TaskFinished,
    TimerFired,
    WakeAt,
    WorkerJoined,
)
from tetriserve.core.forecast import Forecast, Quote
from tetriserve.core.memory import HeldAlike, held_alike, held_of
from tetriserve.core.plan import State
from tetriserve.core.request import Request
from tetriserve.engine.intake import Generation, Intake, check_ids
from tetriserve.engine.models import ServedModels
from tetriserve.engine.observers import Observer, Observers, Occurred, Stopped
from tetriserve.engine.outlook import Outlook
from tetriserve.engine.outputs import read_output
from tetriserve.engine.pictures import PictureEntrance
from tetriserve.engine.previews import PreviewReader
from tetriserve.engine.progress import (
    Accept,
    Admitted,
    Generated,
    GeneratedImage,
    GeneratedVideo,
    Progress,
    Watcher,
    first_progress,
    unheard,
)
from tetriserve.engine.tasks import TaskBook
from tetriserve.executor.protocol import Executor
from tetriserve.logs import fields
from tetriserve.workload.outcome import Outcome, Status

logger = logging.getLogger(__name__)


class LiveEngine:
    """The engine on one event loop. `executor` is started already; `intakes` hold the rules of admission, one for each
    model.

    foresight: looks ahead for quotes and forecasts.
    policy_name: the policy as the operator named it.
    observer: observes from the first event on; events replayed through an equal controller give the same commands.
    failure: why the engine cannot go on; None while it can.
    """

    def __init__(
        self,
        controller: Controller,
        executor: Executor,
        intakes: Sequence[Intake],
        foresight: Foresight,
        *,
        max_queue: int,
        policy_name: str,
        observer: Observer | None = None,
    ) -> None:
        self.controller = controller
        self.models = ServedModels(tuple(intakes))
        self.previews = PreviewReader(executor, {intake.card.key: intake.card for intake in intakes})
        self._executor = executor
        self._entrance = PictureEntrance(executor.states)
        self.policy_name = policy_name
        self._max_queue = max_queue
        self._outlook = Outlook(foresight, controller, lambda: self.now)
        self._observers = Observers()
        self.subscribe(self._outlook.observe)
        if observer is not None:
            self.subscribe(observer)
        self._tasks = TaskBook()
        self._clients: dict[str, Admitted] = {}
        self._open: dict[str, Request] = {}
        self._readings: dict[str, asyncio.Task[Generated]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._seeds = random.SystemRandom()
        self._origin = time.monotonic()
        self._is_draining = False
        self.failure: str | None = None
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def start(self) -> None:
        """Take over the executor's ranks. Call on the event loop that everything else will run on."""
        self._executor.subscribe(self.handle)
        for rank in sorted(self._executor.ranks):
            self.handle(WorkerJoined(rank))

    async def stop(self, timeout_s: float = 0.0) -> None:
        """Admit nothing more, wait up to `timeout_s` for what was accepted, then end the workers."""
        self._is_draining = True
        if self._clients:
            try:
                await asyncio.wait_for(self._is_empty.wait(), timeout_s)
            except TimeoutError:
                logger.warning("%d requests were not finished within %g s", len(self._clients), timeout_s)
        self._executor.subscribe(lambda event: None)  # tasks that still end start no others
        if self._timer is not None:
            self._timer.cancel()
        self._abandon(ShuttingDown("the server shut down before the image was finished"))
        for reading in self._readings.values():
            reading.cancel()
        self._observers.tell(Stopped())
        await self._executor.stop()

    def subscribe(self, observer: Observer) -> None:
        """Tell `observer` all that happens from now on; see `engine.observers`."""
        self._observers.add(observer)

    @property
    def intake(self) -> Intake:
        """Of the first model."""
        return self.models.first

    @property
    def open_requests(self) -> tuple[Request, ...]:
        """Those admitted and without an outcome: waiting, running, or cancelled while their last task runs."""
        return tuple(self._open.values())

    @property
    def num_observer_errors(self) -> int:
        return self._observers.num_errors

    @property
    def now(self) -> float:
        """Seconds since the engine started."""
        return time.monotonic() - self._origin

    @property
    def state(self) -> State:
        return self.controller.state

    @property
    def memory(self) -> tuple[HeldAlike, ...]:
        """What the ranks that are up hold of the models, by role."""
        return held_alike(self._executor.memory)

    def memory_of(self, model: str) -> tuple[HeldAlike, ...]:
        """As `memory`, of the model with this key alone."""
        return held_alike(held_of(self._executor.memory, model))

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be admitted and run."""
        return not self._is_draining and self.failure is None and bool(self.state.ranks)

    async def generate(self, generation: Generation) -> GeneratedImage:
        """One image. Cancelling the call cancels the request, which frees its ranks within one task.

        Raises:
            InvalidRequest, QueueFull, DeadlineInfeasible, ShuttingDown: not admitted.
            RequestFailed: admitted, but it ended without an image.
        """
        return (await self.generate_all([generation]))[0]

    async def generate_all(
        self, generations: Sequence[Generation], watch: Watcher | None = None
    ) -> list[GeneratedImage]:
        """Several images, admitted together or not at all; when one fails, the others are cancelled.

        `watch` hears of their progress, from their admission on, and of each image as soon as it is there.

        Raises: as `generate`.
        """
        return [made for made in await self._make(generations, watch) if isinstance(made, GeneratedImage)]

    async def generate_video(self, generation: Generation) -> GeneratedVideo:
        """As `generate`, of what is a video; its files are in memory."""
        (made,) = await self._make([generation], None)
        assert isinstance(made, GeneratedVideo)
        return made

    async def _make(self, generations: Sequence[Generation], watch: Watcher | None) -> list[Generated]:
        clients = await self.admit(generations, watch)
        try:
            return list(await asyncio.gather(*(client.made for client in clients)))
        finally:
            self.leave(clients)

    async def admit(
        self, generations: Sequence[Generation], watch: Watcher | None = None, accept: Accept | None = None
    ) -> list[Admitted]:
        """Requests that run from now on, whoever waits for them; all or none. See `generate_all` for `watch`.

        `accept` is awaited when nothing speaks against them. Something may have come up by the time it returns.

        Raises:
            InvalidRequest, QueueFull, DeadlineInfeasible, ShuttingDown: not admitted.
            RequestFailed: the engine has failed.
        """
        requests = self._requests(generations)
        self._check_room(len(requests))
        arriving = [Submitted(request) for request in requests]
        check_ids(requests, self.state, self._readings)
        pictures = [generation.images for generation in generations]
        async with self._entrance.brought(arriving, pictures, self._open.values()) as arriving:
            if not any(generation.reject_infeasible for generation in generations):
                return await self._accept(arriving, watch, accept)
            async with self._outlook.turn(requests):
                quote = await self._outlook.promise(requests)
                promised = [
                    replace(event, promised_finish_s=expected.finish_s)
                    for event, expected in zip(arriving, quote.requests, strict=True)
                ]
                return await self._accept(promised, watch, accept)

    def resume(self, arriving: Sequence[Submitted], watch: Watcher | None = None) -> list[Admitted]:
        """As `admit`, for requests that were accepted in an earlier life: there is room for them however many wait.

        Raises:
            ShuttingDown, RequestFailed: the engine runs nothing any more.
        """
        self._check_serving()
        return self._submit(arriving, watch)

    def leave(self, clients: Sequence[Admitted]) -> None:
        """Nobody waits for these: those that are not finished are cancelled. What runs of them ends with its task."""
        for client in clients:
            if not client.made.done() or client.made.cancelled():
                self._leave(client)

    async def quote(self, generations: Sequence[Generation]) -> Quote:
        """What could be promised to these images if they were asked for now, together. Nothing is admitted.

        Raises:
            InvalidRequest, ShuttingDown: they would not be admitted.
            QueueFull: too many ask.
        """
        requests = self._requests(generations)
        async with self._outlook.turn():
            return await self._outlook.quote(requests)

    async def forecast(self) -> Forecast:
        """What becomes of what is there; shared by all who ask, and up to a second old."""
        return await self._outlook.forecast()

    def handle(self, event: Event) -> None:
        """Feed one event to the controller and carry out what it answers.

        Errors of observers are theirs alone.
        """
        if self.failure is not None:
            return
        now = self.now
        self._observers.tell(Occurred(event, now))
        with self._guarded(type(event).__name__):
            match event:
                case Submitted(request):
                    self._open[request.request_id] = request
                case TaskFinished() | TaskFailed():
                    self._end_task(event, now)
            for command in self.controller.handle(event, now):
                self._carry_out(command, now)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """An error within is a defect of the policy or of ours, after which the books cannot be trusted: everyone who
        waits is told, and the engine reports `failure` until it is restarted.
        """
        try:
            yield
        except BaseException as error:  # a library's panic is no Exception
            logger.critical("the engine failed on %s", what, exc_info=True)
            self.failure = f"the scheduler failed: {type(error).__name__}: {error}"
            self._abandon(RequestFailed(self.failure))
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise

    def _end_task(self, event: TaskFinished | TaskFailed, now: float) -> None:
        ended = self._tasks.end(event, now)
        for work, result in zip_longest(ended.work, ended.results):
            num_steps = 0 if result is None else result.num_steps
            self._tell_client(
                Progress(
                    request=work.request,
                    stage=ended.run.task.stage,
                    steps_done=work.trajectory.steps_done + num_steps,
                    degree=0,
                    latents=result.left if num_steps else None,
                )
            )
        self._observers.tell(ended)

    async def _accept(
        self, arriving: Sequence[Submitted], watch: Watcher | None, accept: Accept | None
    ) -> list[Admitted]:
        self._check_room(len(arriving))
        if accept is not None:
            await accept(arriving)
            self._check_room(len(arriving))
        return self._submit(arriving, watch)

    def _requests(self, generations: Sequence[Generation]) -> list[Request]:
        self._check_serving()
        now, cost = self.now, self.controller.cost
        return [
            self._model_of(generation).request(
                generation, request_id=uuid.uuid4().hex, seed=self._seeds.getrandbits(32), now=now, cost=cost
            )
            for generation in generations
        ]

    def _model_of(self, generation: Generation) -> Intake:
        num_images = len(generation.images)
        return self.models.called(generation.model, makes_videos=generation.is_video, num_images=num_images)

    def _check_serving(self) -> None:
        if self._is_draining:
            raise ShuttingDown("the server is shutting down")
        if self.failure is not None:
            raise RequestFailed(self.failure)

    def _check_room(self, num_more: int) -> None:
        self._check_serving()
        check_room(self.state, num_more, self._max_queue)

    def _submit(self, arriving: Sequence[Submitted], watch: Watcher | None) -> list[Admitted]:
        check_ids([event.request for event in arriving], self.state, self._readings)
        loop = asyncio.get_running_loop()
        clients = [
            Admitted(event.request, loop.create_future(), unheard if watch is None else partial(watch, number))
            for number, event in enumerate(arriving)
        ]
        for client, event in zip(clients, arriving, strict=True):
            self._clients[event.request.request_id] = client
            self._is_empty.clear()
            self._observers.call(client.tell, first_progress(event))
            self.handle(event)
        return clients

    def _leave(self, client: Admitted) -> None:
        request_id = client.request.request_id
        if self._clients.pop(request_id, None) is None:
            return
        client.made.cancel()
        self._note_empty()
        self.handle(Cancelled(request_id))

    def _abandon(self, error: Exception) -> None:
        """Tell everyone who still waits that there will be no image."""
        for client in self._clients.values():
            if not client.made.done():
                client.made.set_exception(error)
        for request in [*self._open.values()]:
            waiting = self._clients.get(request.request_id)
            status = Status.CANCELLED if waiting is None or waiting.made.cancelled() else Status.FAILED
            self._report(self._outcome(request, status, (), request.deadline_s, str(error)))
        self._clients.clear()
        self._note_empty()

    def _carry_out(self, command: Command, now: float) -> None:
        match command:
            case StartTask():
                self._tasks.start(command, now, self.controller.cost)
                task = command.task
                for work in command.work:
                    steps_done = work.trajectory.steps_done
                    self._tell_client(
                        Progress(request=work.request, stage=task.stage, steps_done=steps_done, degree=task.degree)
                    )
                self._executor.start_task(command)
            case WakeAt(time_s):
                self._wake_at(time_s)
            case FinishRequest():
                self._finish(command)
            case FailRequest():
                self._fail(command)
            case CloseCancelled(request, runs, predicted_finish_s):
                self._report(self._outcome(request, Status.CANCELLED, runs, predicted_finish_s))
            case ForgetRequest(request_id):
                if request_id not in self._readings:  # else when its output has been read
                    self._executor.forget(request_id)
            case _:
                assert_never(command)

    def _finish(self, command: FinishRequest) -> None:
        request_id = command.request.request_id
        outcome = self._outcome(command.request, Status.FINISHED, command.runs, command.predicted_finish_s)
        client = self._clients.get(request_id)
        if client is None or client.made.done():
            self._clients.pop(request_id, None)
            self._report(outcome)
            self._note_empty()
            return
        reading = asyncio.create_task(read_output(self._executor.states, command.output, outcome))
        self._readings[request_id] = reading
        reading.add_done_callback(partial(self._hand_over, command))

    def _hand_over(self, command: FinishRequest, reading: asyncio.Task[Generated]) -> None:
        """Give the client what was read of its request's output, and have the request's state dropped."""
        request, request_id = command.request, command.request.request_id
        del self._readings[request_id]
        error = None if reading.cancelled() else reading.exception()
        if reading.cancelled() or request_id not in self._open:
            return  # the engine has given it up meanwhile
        with self._guarded("a finished output"):
            self._executor.forget(request_id)
            if isinstance(error, RequestFailed):
                logger.error(
                    "request %s: its output is lost", request_id, exc_info=error, extra=fields(image_ids=request_id)
                )
                self._fail(FailRequest(request, command.runs, command.predicted_finish_s, str(error), error.kind))
                return
            made = reading.result()
            client = self._clients.pop(request_id, None)
            if client is not None and not client.made.done():
                client.made.set_result(made)
                self._observers.call(client.tell, made)
            self._report(made.outcome)
            self._note_empty()

    def _fail(self, command: FailRequest) -> None:
        request = command.request
        client = self._clients.pop(request.request_id, None)
        if client is not None and not client.made.done():
            client.made.set_exception(RequestFailed(command.message, command.kind))
        self._report(self._outcome(request, Status.FAILED, command.runs, command.predicted_finish_s, command.message))
        self._note_empty()

    def _tell_client(self, progress: Progress) -> None:
        client = self._clients.get(progress.request.request_id)
        if client is not None:
            self._observers.call(client.tell, progress)

    def _outcome(
        self, request: Request, status: Status, runs: tuple[Run, ...], predicted_finish_s: float, message: str = ""
    ) -> Outcome:
        return Outcome(
            request=request, status=status, runs=runs, predicted_finish_s=predicted_finish_s,
            finish_s=self.now, message=message,
        )  # fmt: skip

    def _report(self, outcome: Outcome) -> None:
        self._open.pop(outcome.request.request_id, None)
        self._observers.tell(outcome)

    def _wake_at(self, time_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, time_s - self.now)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.handle, TimerFired())

    def _note_empty(self) -> None:
        if not self._clients:
            self._is_empty.set()
