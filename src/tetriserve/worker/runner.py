"""Runs tasks: loads what the rank lacks, computes, and leaves the result in the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Set

import torch

from tetriserve.core.events import FailureKind, Result, StartTask, TensorRef, Work
from tetriserve.core.messages import RunTask, TaskDone, TaskError
from tetriserve.core.models import of_model
from tetriserve.core.request import Request
from tetriserve.core.stages import INPUT
from tetriserve.core.states import StateGone
from tetriserve.logs import fields
from tetriserve.models.adapter import Adapter, Left, Member, Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.preview import fit_basis
from tetriserve.worker.failures import failure_kind, is_memory_error, is_starved
from tetriserve.worker.residents import Residents
from tetriserve.worker.store import TensorStore
from tetriserve.worker.team.shm import ShmTeam

logger = logging.getLogger(__name__)

_LOOK_S = 0.05


class DeviceLost(Exception):
    """The rank's device failed in a way that only a fresh process can mend."""


class NonFinite(ArithmeticError):
    """A task with steps ended with NaN or infinite values."""


class Runner:
    """One rank's half of the executor. `num_steps` counts steps since it started, and parts of shared decodes: signs of
    progress.

    adapters: of the models that the rank serves, by their keys.
    resident_bytes: see `Residents`.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        team: ShmTeam,
        store: TensorStore,
        rank: int,
        device: str,
        resident_bytes: int,
    ) -> None:
        self._adapters = adapters
        self._team = team
        self._store = store
        self._rank = rank
        self._device = device
        self._is_on_gpu = device.startswith("cuda")
        self._residents = Residents(resident_bytes)
        self.num_steps = 0

    def run(self, message: RunTask) -> TaskDone | TaskError:
        """Do this rank's part of a task. Errors are answers: a failed task leaves the rank as it was before it.

        The other members are freed before the answer is given: this rank is idle from then on.

        Raises:
            DeviceLost: the process is of no more use, and the task has no answer.
        """
        start, started_at, cpu_before_s = message.start, time.monotonic(), time.thread_time()
        try:
            results, others_cpu_s = self._run_recovering(message)
            elapsed_s, cpu_s = time.monotonic() - started_at, time.thread_time() - cpu_before_s + others_cpu_s
            return TaskDone(start.task_id, elapsed_s, results, None if self._is_on_gpu else cpu_s)
        except Exception as error:  # the process boundary: whatever a model raises ends this one task
            failed_at = time.monotonic()
            kind = self._failure_kind(error)
            if kind is FailureKind.STEP:
                names = ",".join(start.task.members)
                logger.exception("request %s: %s failed", names, start.task.stage, extra=fields(image_ids=names))
            line = f"{start.task.stage} failed: {type(error).__name__}: {error}".splitlines()[0]
        # The error is gone by now, and with it what its frames refer to: a group's connections among them.
        if start.task.degree > 1:
            self._team.abort()
        if self._is_on_gpu:
            self._check_device(line)
        return TaskError(start.task_id, kind, line, failed_at)

    def forget(self, request_id: str) -> None:
        self._residents.forget(request_id)

    def warm(
        self, request: Request, *, lacks: Set[str] = frozenset(), gives: Set[str] = frozenset(), timeout_s: float = 0.0
    ) -> None:
        """Run every stage once outside of any task, so that the first request does not pay for it.

        Args:
            lacks: kinds of stage that this rank cannot run: it waits for what another rank has left of them.
            gives: kinds of stage that other ranks lack.
            timeout_s: how long to wait; after that the rank serves without having run what follows.
        """
        black = [torch.zeros(each.height, each.width, 3, dtype=torch.uint8) for each in request.images]
        states: dict[str, Tensors] = {INPUT: {str(number): each for number, each in enumerate(black)}}
        for stage in request.stages:
            if stage.kind in lacks:
                others = self._await(_warm_up_key(request, stage.kind), timeout_s)
                if others is None:
                    logger.warning(
                        "no rank has left what %s makes; the first tasks of this rank will be slow", stage.kind
                    )
                    return
                states[stage.kind] = others
                continue
            member = Member(request, 0, states)
            [left] = self._adapter_of(request).run(stage.kind, [member], min(1, stage.num_steps), lambda: None)
            states[stage.kind] = left.tensors
            if stage.kind in gives:
                self._store.save(_warm_up_key(request, stage.kind), left.tensors)

    def _await(self, key: str, timeout_s: float) -> Tensors | None:
        """What another rank leaves in the store under `key`; None if that takes too long."""
        give_up_at = time.monotonic() + timeout_s
        while time.monotonic() < give_up_at:
            try:
                return self._store.load(TensorRef(key, 0), self._device)
            except StateGone:
                time.sleep(_LOOK_S)  # at the start, before tasks come; heartbeats have a thread of their own
        return None

    def save_preview_basis(self, card: ModelCard) -> TensorRef:
        """Leave in the store what the server makes previews of this model with."""
        key = ".preview-basis" + (f".{card.key}" if card.key else "")
        return self._store.save(key, {"basis": torch.from_numpy(fit_basis(of_model(self._adapters, card.key), card))})

    def _run_task(self, message: RunTask) -> tuple[tuple[Result, ...], float]:
        """What it leaves of each member, empty if another rank leads; and what other threads spent: `Left.cpu_s`."""
        start, task = message.start, message.start.task
        adapter = self._adapter_of(start.work[0].request)
        if task.degree > 1:
            self._team.enter(task.ranks, message.token)
        adapter.use_team(self._team if task.degree > 1 else None)
        members = [self._member(work) for work in start.work]
        on_step = self._count_step if task.degree == 1 else self._count_shared_step
        with torch.no_grad():
            lefts = adapter.run(task.stage, members, task.num_steps, on_step, joins_passes=start.joins_passes)
        if task.num_steps:
            for work, left in zip(start.work, lefts, strict=True):
                _check_finite(work, left)
        results = [self._leave(start, work, left) for work, left in zip(start.work, lefts, strict=True)]
        self._residents.evict(keep=task.members)
        return tuple([result for result in results if result is not None]), sum(left.cpu_s for left in lefts)

    def _run_recovering(self, message: RunTask) -> tuple[tuple[Result, ...], float]:
        """Once more where the device was short of memory, after what can be computed again was freed.

        With other members it is for the controller to start the task again.
        """
        try:
            return self._run_task(message)
        except Exception as error:
            if not self._is_on_gpu or not is_memory_error(error):
                raise
            if message.start.task.degree > 1:
                self._free_memory()
                raise
        # The error is gone by now, and with it the tensors of its frames.
        self._free_memory()
        logger.warning("the device was short of memory; the task is run again")
        return self._run_task(message)

    def _free_memory(self) -> None:
        self._residents.clear()
        torch.cuda.empty_cache()

    def _failure_kind(self, error: Exception) -> FailureKind:
        kind = failure_kind(error)
        is_of_device = self._is_on_gpu and is_memory_error(error) and not is_starved()
        return FailureKind.LOST if is_of_device else kind  # the process can go on, and the task be tried elsewhere

    def _check_device(self, failure: str) -> None:
        """That a failure was the task's alone: some CUDA errors spoil every later call of the process."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"{failure}; {error}".splitlines()[0]) from error

    def _adapter_of(self, request: Request) -> Adapter:
        return of_model(self._adapters, request.model)

    def _count_step(self) -> None:
        self.num_steps += 1

    def _count_shared_step(self) -> None:
        """A decode may go without an exchange for long: its members look here whether one of them is lost."""
        self._count_step()
        self._team.check()

    def _member(self, work: Work) -> Member:
        """With the states that this rank holds, and the others from the store."""
        resident = self._residents.of(work.request.request_id)
        for stage, ref in work.states.items():
            if resident.key(stage) != ref.key:
                resident.hold(stage, ref.key, self._store.load(ref, self._device))
        return Member(work.request, work.steps_done, resident.tensors, resident.memo)

    def _leave(self, start: StartTask, work: Work, left: Left) -> Result | None:
        """Keep what the task left; on the leader, in the store too."""
        request, stage = work.request, start.task.stage
        steps_done = work.steps_done + left.num_steps
        key = f"{request.request_id}.{stage}.{steps_done}.{start.task_id}"
        is_output = left.is_stage_over and work.stage_index == len(request.stages) - 1
        if not is_output:
            self._residents.of(request.request_id).hold(stage, key, left.tensors)
        if self._rank != start.task.ranks[0]:
            return None
        return Result(self._store.save(key, left.tensors), left.num_steps, left.is_stage_over, left.text)


def _warm_up_key(request: Request, kind: str) -> str:
    """Where ranks leave what others need to run the stages of this model once."""
    return ".warm-up" + (f".{request.model}" if request.model else "") + f".{kind}"


def _check_finite(work: Work, left: Left) -> None:
    for name, tensor in left.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFinite(f"{name} are not finite after step {work.steps_done + left.num_steps}")
