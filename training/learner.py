"""The training loop that all parts share: a time budget, the learning rate's course, averaged weights, checkpoints."""

from __future__ import annotations

import copy
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, distributed, nn

from training.muon import Muon, split

_REPORT_STEPS = 50
_SAVE_STEPS = 250
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, stable, decay: a stable run can be continued at will, and decayed whenever a result is wanted.

    minutes: wall-clock time of this run.
    decay: the last part of the run over which the learning rate falls to zero; 0 keeps it, to be resumed later.
    """

    learning_rate: float
    minutes: float
    warmup_steps: int = 100
    decay: float = 0.0

    def rate(self, step: int, elapsed: float) -> float:
        """The learning rate at `step` (counted over all runs), `elapsed` (0 to 1) into this run."""
        falling = min(1.0, (1.0 - elapsed) / self.decay) if self.decay else 1.0
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * falling


class Learner(Generic[_Module]):
    """A module that is being trained, with its optimizers and averaged weights: all that a checkpoint holds.

    module, average: as trained, and its moving average over about `horizon` steps, which is what is exported.
    num_steps: done so far, over all runs.
    facts: what was measured of the average when it was last saved.
    """

    def __init__(
        self, path: Path, module: _Module, blocks: list[nn.Module], *, horizon: int, weight_decay: float = 0.0
    ) -> None:
        """Continue the checkpoint `path` if there is one. Muon trains the matrices in `blocks`, AdamW all else."""
        weights, others = split(module, blocks)
        self.module = module
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.num_steps = 0
        self.facts: dict[str, float] = {}
        self._path, self._horizon = path, horizon
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(weights, weight_decay=weight_decay),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True),
        ]
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        if path.exists():
            self._load()

    def keep(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Leave these rows (a mask over the first axis) as they are now, whatever gradients and weight decay say."""
        self._kept.append((parameter, rows, parameter.detach()[rows].clone()))

    def train(
        self,
        schedule: Schedule,
        loss_terms: Callable[[], dict[str, Tensor]],
        measure: Callable[[], dict[str, float]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Minimise the sum of `loss_terms` until the time is used up; `measure` gives the checkpoints' facts.

        Under `torchrun` each process has batches of its own, and what is reported is the first one's.
        """
        start = clock()
        recent: deque[Tensor] = deque(maxlen=_REPORT_STEPS)
        while (elapsed := _agreed((clock() - start) / (60 * schedule.minutes))) < 1.0:
            rate = schedule.rate(self.num_steps, elapsed)
            terms = loss_terms()
            self._step(torch.stack(list(terms.values())).sum(), rate)
            recent.append(torch.stack([value.detach() for value in terms.values()]))
            if self.num_steps % _REPORT_STEPS == 0 and is_first():
                means = zip(terms, torch.stack(list(recent)).mean(0).tolist(), strict=True)
                said = ", ".join(f"{name} {mean:.4f}" for name, mean in means)
                print(f"step {self.num_steps}, {clock() - start:.0f} s, rate {rate:.1e}: {said}", flush=True)
            if self.num_steps % _SAVE_STEPS == 0 and is_first():
                self.save(measure())
        if is_first():
            self.save(measure())

    def _step(self, loss: Tensor, rate: float) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for parameter, rows, values in self._kept:
                parameter[rows] = values
        # Young averages reach back over the last quarter only: the first steps are far from where the run ends.
        weight = 1.0 / min(1 + self.num_steps / 4, self._horizon)
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.module.parameters(), strict=True):
                ours.lerp_(theirs, weight)
        self.num_steps += 1

    def _load(self) -> None:
        checkpoint = load(self._path, next(self.module.parameters()).device)
        self.module.load_state_dict(checkpoint["model"])
        self.average.load_state_dict(checkpoint["average"])
        for optimizer, state in zip(self._optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.num_steps, self.facts = checkpoint["step"], checkpoint["facts"]

    def save(self, facts: dict[str, float]) -> None:
        """Write the checkpoint, with what was measured of the average."""
        self.facts = facts
        content = {"step": self.num_steps, "facts": facts}
        states = {"model": self.module.state_dict(), "average": self.average.state_dict()}
        save(self._path, content | states | {"optimizers": [each.state_dict() for each in self._optimizers]})


def is_first() -> bool:
    """Whether this is the process that reports and saves."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _agreed(elapsed: float) -> float:
    """The first process's clock: all stop after the same step."""
    if not distributed.is_initialized():
        return elapsed
    clock = torch.tensor(elapsed)
    distributed.broadcast(clock, 0)
    return clock.item()


def _average_gradients(module: nn.Module) -> None:
    """In one exchange for all of them: of so small a model none is worth overlapping with the backward pass."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` is always a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """What `save` wrote to `path`."""
    return torch.load(path, map_location=device, weights_only=True)  # type: ignore[no-any-return]  # noqa: TID251
