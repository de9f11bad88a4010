"""Runs tasks: loads what the rank lacks, computes, and leaves the result in the store."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from tetriserve.core.events import FailureKind, StartTask, TensorRef
from tetriserve.core.messages import RunTask, TaskDone, TaskError
from tetriserve.core.request import Request
from tetriserve.core.stages import ENCODE
from tetriserve.logs import fields
from tetriserve.models.adapter import Adapter, DenoiseLoop, Embeds
from tetriserve.models.card import ModelCard
from tetriserve.models.preview import fit_basis
from tetriserve.worker.failures import failure_kind
from tetriserve.worker.groups import Groups
from tetriserve.worker.store import TensorStore

logger = logging.getLogger(__name__)


class NonFiniteLatents(ArithmeticError):
    """A denoise task ended with NaN or infinite latents."""


@dataclass
class Resident:
    """What this rank holds of one request: embeddings, and latents as they were after `steps_done` steps."""

    embeds: Embeds | None = None
    latents: torch.Tensor | None = None
    steps_done: int = -1
    loop: DenoiseLoop | None = None


class Runner:
    """One rank's half of the executor. `num_steps` counts denoise steps since it started: a sign of progress."""

    def __init__(self, adapter: Adapter, groups: Groups, store: TensorStore, rank: int, device: str) -> None:
        self._adapter = adapter
        self._groups = groups
        self._store = store
        self._rank = rank
        self._device = device
        self._is_on_gpu = device.startswith("cuda")
        self._residents: dict[str, Resident] = {}
        self.num_steps = 0

    def run(self, message: RunTask) -> TaskDone | TaskError:
        """Do this rank's part of a task. Errors are answers: a failed task leaves the rank as it was before it."""
        start, started_at, cpu_before_s = message.start, time.monotonic(), time.thread_time()
        try:
            result = self._run_stage(message)
            text = self._adapter.count_text(start.request) if start.task.stage == ENCODE else None
            elapsed_s, cpu_s = time.monotonic() - started_at, time.thread_time() - cpu_before_s
            return TaskDone(start.task_id, elapsed_s, result, text, None if self._is_on_gpu else cpu_s)
        except Exception as error:  # the process boundary: whatever a model raises ends this one task
            kind = failure_kind(error, is_split=message.group is not None)
            if kind is FailureKind.STEP:
                image_id = start.request.request_id
                logger.exception("request %s: %s failed", image_id, start.task.stage, extra=fields(image_id=image_id))
            line = f"{start.task.stage} failed: {type(error).__name__}: {error}".splitlines()[0]
            return TaskError(start.task_id, kind, line, time.monotonic())

    def leave(self, group: str) -> None:
        """Release peers that wait for this rank in a collective of `group`."""
        self._adapter.use_mesh(None)
        self._groups.drop(group)

    def is_device_sound(self) -> bool:
        """Whether a failure was the task's alone: some CUDA errors spoil every later call of the process."""
        if not self._is_on_gpu:
            return True
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def forget(self, request_id: str) -> None:
        self._residents.pop(request_id, None)

    def warm(self, request: Request) -> None:
        """Run every stage once outside of any task, so that the first request does not pay for it."""
        embeds = self._adapter.encode(request)
        latents = self._adapter.denoise_loop(request, embeds, 0).step(self._adapter.initial_latents(request))
        self._adapter.decode(request, latents)

    def save_preview_basis(self, card: ModelCard) -> TensorRef:
        """Leave in the store what the server makes previews with."""
        return self._store.save(".preview-basis", {"basis": torch.from_numpy(fit_basis(self._adapter, card))})

    def _run_stage(self, message: RunTask) -> TensorRef | None:
        start = message.start
        with torch.no_grad():
            match start.task.stage:
                case "encode":
                    return self._encode(start)
                case "denoise":
                    return self._denoise(start, message.group)
                case "decode":
                    return self._decode(start)
                case unknown:
                    raise ValueError(f"this model has no stage {unknown!r}")

    def _encode(self, start: StartTask) -> TensorRef:
        embeds = self._adapter.encode(start.request)
        self._resident(start).embeds = embeds
        return self._store.save(f"{start.request.request_id}.embeds", embeds)

    def _denoise(self, start: StartTask, group: str | None) -> TensorRef | None:
        task, resident = start.task, self._resident(start)
        self._use_group(group, task.ranks)
        loop, latents = self._loop(start, resident), self._latents(start, resident)
        resident.loop = None  # a failed task must not leave a loop behind that stands somewhere in its middle
        for _ in range(task.num_steps):
            latents = loop.step(latents)
            self.num_steps += 1
        if not bool(torch.isfinite(latents).all()):
            raise NonFiniteLatents(f"latents are not finite after step {start.steps_done + task.num_steps}")
        steps_done = start.steps_done + task.num_steps
        resident.latents, resident.steps_done, resident.loop = latents, steps_done, loop
        if self._rank != task.ranks[0]:
            return None
        tensors = {"latents": latents, "noise_level": torch.tensor(loop.noise_level)}
        return self._store.save(f"{start.request.request_id}.latents.{steps_done}", tensors)

    def _decode(self, start: StartTask) -> TensorRef:
        pixels = self._adapter.decode(start.request, self._latents(start, self._resident(start)))
        return self._store.save(f"{start.request.request_id}.pixels", {"pixels": torch.from_numpy(pixels)})

    def _use_group(self, group: str | None, ranks: tuple[int, ...]) -> None:
        self._adapter.use_mesh(None if group is None else self._groups.get(group, ranks).mesh)

    def _resident(self, start: StartTask) -> Resident:
        return self._residents.setdefault(start.request.request_id, Resident())

    def _loop(self, start: StartTask, resident: Resident) -> DenoiseLoop:
        if resident.loop is not None and resident.steps_done == start.steps_done:
            return resident.loop
        if resident.embeds is None:
            assert start.embeds is not None, "denoise comes after encode"
            resident.embeds = self._store.load(start.embeds, self._device)
        return self._adapter.denoise_loop(start.request, resident.embeds, start.steps_done)

    def _latents(self, start: StartTask, resident: Resident) -> torch.Tensor:
        if resident.latents is not None and resident.steps_done == start.steps_done:
            return resident.latents
        if start.latents is None:
            return self._adapter.initial_latents(start.request)
        return self._store.load(start.latents, self._device)["latents"]
