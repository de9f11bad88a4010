"""A server whose ranks are timers: the real HTTP side, engine, policies and quotes; tasks only take their time.

For `overload.py --timers`: what others run on the same machine slows real ranks down, and timers hardly. Prints its
URL. Tasks vary by a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/server"))

from fake_engine import CARD, FakeExecutor

from tetriserve.config import ServerConfig
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.cost import task_s
from tetriserve.core.events import StartTask, TaskFinished
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine import Intake, Jobs, LiveEngine
from tetriserve.models.card import ModelCard
from tetriserve.models.flux.facts import FLUX
from tetriserve.policies import make_policy
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.table import Profile, Row
from tetriserve.server import run_server

NOISE = 0.1
SPEEDUPS = {1: 1.0, 2: 1.6}
STEP_S = {128: 0.04, 256: 0.16}


def profile_of(
    card: ModelCard, step_s: Mapping[int, float], speedups: Mapping[int, float], *, encode_s: float, decode_s: float
) -> Profile:
    """Made up: `step_s` by side at degree 1, faster at other degrees by `speedups`; one decode time for all sides."""
    return Profile(
        model=card.name, hardware="timers", execution=Execution("float32"), source="made up", created="2026-01-01",
        switch_s=0.001,
        rows=(
            Row(stage=ENCODE, seconds=encode_s),
            *(
                Row(
                    stage=DENOISE, height=side, width=side, tokens=FLUX.num_tokens(card, Shape(side, side)),
                    degree=degree, seconds=seconds / speedup,
                )
                for side, seconds in step_s.items()
                for degree, speedup in speedups.items()
            ),
            *(Row(stage=DECODE, height=side, width=side, seconds=decode_s) for side in step_s),
        ),
    )  # fmt: skip


PROFILE = profile_of(CARD, STEP_S, SPEEDUPS, encode_s=0.04, decode_s=0.2)


class TimedExecutor(FakeExecutor):
    def __init__(self, cost: ProfileCost, seed: int) -> None:
        super().__init__()
        self._cost = cost
        self._dice = random.Random(seed)

    async def _run(self, command: StartTask) -> None:
        task, request = command.task, command.work[0].request
        takes_s = task_s(self._cost, task, request)
        takes_s *= max(0.5, self._dice.gauss(1, NOISE))
        await asyncio.sleep(takes_s)
        left = self.leave(f"{request.request_id}.{task.stage}", task.stage, request)
        self._on_event(TaskFinished.planned(command, takes_s, left))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--max-queue", type=int, required=True)
    options = parser.parse_args()
    cost = ProfileCost(PROFILE, lambda shape: CARD.valid_degrees(tuple(SPEEDUPS)))
    new_policy = partial(make_policy, options.policy, cost, num_ranks=2, shapes=PROFILE.shapes)

    async def launch() -> Jobs:
        engine = LiveEngine(
            Controller(new_policy(), cost),
            TimedExecutor(cost, seed=0),
            [Intake(card=CARD, cost=cost)],
            Foresight(new_policy),
            max_queue=options.max_queue,
            policy_name=options.policy,
        )
        engine.start()
        return Jobs(engine)

    return run_server(ServerConfig(port=options.port), launch, on_ready=lambda url, engine: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(main())
