"""Draws unseen prompts with a live engine, under one schedule after the other, and has the pictures judged."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from tetriserve.config import EngineConfig
from tetriserve.engine.intake import Generation
from tetriserve.engine.live import LiveEngine
from tetriserve.evaluation.prompts import Prompt, unseen_prompts
from tetriserve.evaluation.trials import Share, Trial, psnr, shares, try_prompt
from tetriserve.launch import StartProgress, launch
from tetriserve.profile.table import Profile

_NUM_FIRST_TRIALS = 12


@dataclass(frozen=True, kw_only=True)
class EvaluationSetting:
    """Under which prompts are tried. `num_steps`: None is the model's own number."""

    policy: str
    size: str
    num_steps: int | None
    num_objects: int


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """How the prompts of one setting went.

    num_steps: denoise steps of each picture.
    shares: right answers by question: objects, relations, background, sizes.
    psnr_db: lowest and median against the first policy's pictures; None for that policy's own.
    seconds: wall-clock time per picture, with several at a time.
    first_trials: some to look at.
    """

    setting: EvaluationSetting
    num_steps: int
    shares: dict[str, Share]
    psnr_db: tuple[float, float] | None
    seconds: float
    first_trials: list[Trial]


async def evaluate_all(
    configs: Mapping[str, EngineConfig],
    settings: Sequence[EvaluationSetting],
    num_prompts: int,
    seed: int,
    *,
    on_trial: Callable[[], None] = lambda: None,
) -> list[EvaluationRow]:
    """A row for each setting, each in an engine of `configs` by its policy; `on_trial` hears of every picture.

    Raises:
        ConfigError: a model or a policy cannot be served.
        InvalidRequest: a size or a number of steps is not allowed.
    """
    rows: list[EvaluationRow] = []
    references: dict[tuple[object, ...], list[Trial]] = {}
    profile: Profile | None = None
    for policy, config in configs.items():
        engine = (await launch(config, StartProgress(), profile=profile)).engine
        profile = engine.intake.cost.profile  # measured once for all of them
        try:
            for setting in (setting for setting in settings if setting.policy == policy):
                prompts = unseen_prompts(setting.num_objects, num_prompts, seed)
                start = time.monotonic()
                trials = await _try_all(engine, setting, prompts, on_trial)
                seconds = (time.monotonic() - start) / num_prompts
                rivals = references.setdefault((setting.size, setting.num_steps, setting.num_objects), trials)
                rows.append(
                    EvaluationRow(
                        setting=setting,
                        num_steps=setting.num_steps or engine.intake.card.default_num_steps,
                        shares=shares(trials),
                        psnr_db=None if rivals is trials else _psnr_range(rivals, trials),
                        seconds=seconds,
                        first_trials=trials[:_NUM_FIRST_TRIALS],
                    )
                )
        finally:
            await engine.stop()
    return rows


async def _try_all(
    engine: LiveEngine, setting: EvaluationSetting, prompts: Sequence[Prompt], on_trial: Callable[[], None]
) -> list[Trial]:
    """The prompts in their order, twice as many at a time as there are ranks: the schedule has something to choose."""
    places = asyncio.Semaphore(2 * len(engine.state.ranks))

    async def attempt(prompt: Prompt) -> Trial:
        generation = Generation(prompt=prompt.text, size=setting.size, seed=prompt.seed, num_steps=setting.num_steps)
        async with places:
            generated = await engine.generate(generation)
        trial = await asyncio.to_thread(lambda: try_prompt(prompt, Image.fromarray(generated.pixels)))
        on_trial()
        return trial

    return list(await asyncio.gather(*map(attempt, prompts)))


def _psnr_range(references: Sequence[Trial], trials: Sequence[Trial]) -> tuple[float, float]:
    values = [psnr(ours.image, reference.image) for ours, reference in zip(trials, references, strict=True)]
    return min(values), statistics.median(values)
