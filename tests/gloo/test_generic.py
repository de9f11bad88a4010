"""`--adapter generic`: pipelines that no family knows, each against its own call."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.models import attention_dispatch
from torch import nn

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings that quote prompts are silent
from tests.families import generic as tiny
from tests.gloo.test_families import linked
from tests.waiting import HANG_S
from tetriserve import Engine
from tetriserve.config import PoolConfig
from tetriserve.core.errors import CheckpointError, ConfigError
from tetriserve.core.events import FailureKind, StartTask, Work
from tetriserve.core.execution import Execution
from tetriserve.core.messages import RunTask, TaskDone, TaskError
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.launch import find_model
from tetriserve.models.adapter import Member
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.execution import compile_blocks
from tetriserve.models.family import Guidance
from tetriserve.models.generic.adapter import GenericAdapter
from tetriserve.models.generic.selftest import problem_of
from tetriserve.models.ranks import pool_of
from tetriserve.models.registry import family_of, load_adapter
from tetriserve.profile import Profile, Row, save_profile
from tetriserve.server.openai import _model_object
from tetriserve.worker.runner import Runner
from tetriserve.worker.store import TensorStore

SERVED = {
    "sana": tiny.sana,
    "pixart-sigma": tiny.pixart_sigma,
    "lumina2": tiny.lumina2,
    "hidream": tiny.hidream,
    "aura-flow": tiny.aura_flow,
    "cogview3": tiny.cogview3,
    "cogview3-dpm": tiny.cogview3_dpm,
    "stable-diffusion": tiny.stable_diffusion,
    "sd3": tiny.stable_diffusion_3,
    "flux": tiny.flux,
}
PROMPT = "a red circle on a blue background"


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    name: str
    card: ModelCard

    @cache  # noqa: B019  a module has few
    def adapter(self, dtype: str = "float32", number: int = 0) -> GenericAdapter:
        """Each number is another load, as in another process."""
        execution = dataclasses.replace(self.card.execution, dtype=dtype)
        adapter = load_adapter(dataclasses.replace(self.card, execution=execution), "cpu")
        assert isinstance(adapter, GenericAdapter)
        return adapter

    @cache  # noqa: B019
    def pipeline(self, dtype: str) -> Any:
        index = json.loads((self.card.path / "model_index.json").read_text())
        given = self.given()
        absent = dict.fromkeys([*given, *(name for name, entry in index.items() if entry == [None, None])])
        pipeline_class = getattr(diffusers, self.card.pipeline_class)
        pipeline = pipeline_class.from_pretrained(self.card.path, dtype=getattr(torch, dtype), **absent)
        pipeline.register_modules(**given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def given(self) -> dict[str, Any]:
        """Components that the pipeline cannot load by itself here."""
        return {}

    def request(self, *, num_steps: int = 3, guidance_scale: float | None = None, **fields: Any) -> Request:
        card = self.card
        guidance = Guidance(card.default_guidance_scale if guidance_scale is None else guidance_scale,
                            fields.get("negative_prompt"), fields.get("true_cfg_scale", 1.0))  # fmt: skip
        fields = {"request_id": "r", "prompt": PROMPT, "shape": card.sizes[0], "seed": 7, **fields}
        stages = family_of(card).stages(card, num_steps, guidance)
        return Request(**fields, guidance_scale=guidance.scale, stages=stages, arrival_s=0.0, deadline_s=10.0)

    def called(self, request: Request, dtype: str = "float32", output_type: str = "pil") -> Any:
        """By the pipeline, told what the request says and nothing else."""
        said: dict[str, Any] = {"guidance_scale": request.guidance_scale}
        if request.negative_prompt is not None:
            said["negative_prompt"] = request.negative_prompt
        if self.name == "flux":
            said["true_cfg_scale"] = request.true_cfg_scale
        if request.max_sequence_length is not None:
            said["max_sequence_length"] = request.max_sequence_length
        images = self.pipeline(dtype)(
            prompt=request.prompt, height=request.shape.height, width=request.shape.width,
            num_inference_steps=request.num_steps, generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type=output_type, **said,
        ).images  # fmt: skip
        return images if output_type == "latent" else np.asarray(images[0])


@pytest.fixture(scope="module", params=list(SERVED))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return built(request.param, tmp_path_factory.mktemp("generic"))


@pytest.fixture(scope="module")
def lumina2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return built("lumina2", tmp_path_factory.mktemp("generic"))


def built(name: str, folder: Path) -> Tiny:
    path = folder / name
    fields = {**SERVED, "sana-sprint": tiny.sana_sprint}[name](path)
    (path / "tetriserve.json").write_text(json.dumps({"dtype": "float32", **fields}))
    return Tiny(name, read_card(path, "generic"))


class Ranks:
    """Ranks of one pool, each with its own load of the model, that share a store; tasks are of single requests."""

    def __init__(self, adapters: list[GenericAdapter], directory: Path, resident_bytes: int = 2**30) -> None:
        self.runners = [
            Runner({"": adapter}, cast(Any, None), TensorStore(directory), rank, "cpu", resident_bytes)
            for rank, adapter in enumerate(adapters)
        ]
        self.store = TensorStore(directory)
        self._num_tasks = 0

    def run(self, work: Work, stage: str, num_steps: int = 0, rank: int = 0) -> Work:
        done = self.answer(work, stage, num_steps, rank)
        assert isinstance(done, TaskDone), done
        (result,) = done.results
        after = work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        return Work(work.request, after.stage_index, after.stage_steps_done, {**work.states, stage: result.left})

    def answer(self, work: Work, stage: str, num_steps: int = 0, rank: int = 0) -> TaskDone | TaskError:
        self._num_tasks += 1
        start = StartTask(self._num_tasks, Task((work.request.request_id,), stage, (rank,), num_steps), (work,))
        return self.runners[rank].run(RunTask(start, self._num_tasks))

    def pixels(self, work: Work) -> np.ndarray:
        return self.store.load(work.states[DECODE], "cpu")["pixels"].numpy()


def made(adapter: GenericAdapter, request: Request) -> tuple[torch.Tensor, np.ndarray]:
    """The last latents and the pixels, by one task of each stage."""
    member = Member(request, 0, {})
    for stage in (ENCODE, DENOISE, DECODE):
        [left] = adapter.run(stage, [member], request.num_steps if stage == DENOISE else 0, lambda: None)
        assert left.is_stage_over
        member.states = {**member.states, stage: left.tensors}
        member.steps_done = left.num_steps
    return member.states[DENOISE]["latents"], member.states[DECODE]["pixels"].numpy()


def variety(tiny: Tiny) -> dict[str, Request]:
    requests = {
        "guided": tiny.request(),
        "not guided": tiny.request(guidance_scale=1.0),
        "one step": tiny.request(num_steps=1, seed=123456789),
        "no prompt": tiny.request(prompt=""),
        "long prompt": tiny.request(prompt="red " * 400),
        "odd prompt": tiny.request(prompt="東京\n\U0001f600 %s {x}"),
    }
    if tiny.card.has_negative_prompt:
        requests["negative prompt"] = tiny.request(negative_prompt="rain on a window", true_cfg_scale=3.0)
    if tiny.card.num_text_tokens:
        requests["short text"] = tiny.request(max_sequence_length=32)
    return requests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures_have_the_bits_of_the_pipeline(served: Tiny, dtype: str) -> None:
    requests = variety(served)
    if dtype == "float32" and served.card.sizes[0].height < 512:
        requests["default steps"] = served.request(num_steps=served.card.default_num_steps)
    for name, request in requests.items():
        latents, pixels = made(served.adapter(dtype), request)
        assert np.array_equal(pixels, served.called(request, dtype)), name
        assert pixels.std() > 1, f"{name}: a picture of one colour shows nothing"
        if name == "guided":
            theirs = served.called(request, dtype, "latent")
            assert torch.equal(latents.to(theirs.dtype), theirs)  # CogView3 rounds what its scheduler returns


def test_prompts_seeds_and_guidance_matter(served: Tiny) -> None:
    requests = [served.request(), served.request(prompt="a tan square"), served.request(seed=8)]
    requests.append(served.request(guidance_scale=2.5))
    pictures = [made(served.adapter(), request)[1] for request in requests]
    for index, first in enumerate(pictures):
        assert not any(np.array_equal(first, second) for second in pictures[index + 1 :])


def test_requests_that_take_turns_and_move_between_ranks_at_any_step_end_as_the_pipelines(
    served: Tiny, tmp_path: Path
) -> None:
    ranks = Ranks([served.adapter(number=number) for number in range(2)], tmp_path)
    dice = random.Random(5)
    requests = [
        served.request(request_id="a", num_steps=4),
        served.request(request_id="b", num_steps=3, prompt="a tan square", seed=8, guidance_scale=1.0),
    ]
    works = {request.request_id: Work(request, 0, 0, {}) for request in requests}
    for request_id in works:
        works[request_id] = ranks.run(works[request_id], ENCODE, rank=dice.randrange(2))
    while waiting := [one for one in works.values() if one.stage_index == 1]:
        work = dice.choice(waiting)
        works[work.request.request_id] = ranks.run(work, DENOISE, 1, rank=dice.randrange(2))
    for request in requests:
        ended = ranks.run(works[request.request_id], DECODE, rank=dice.randrange(2))
        assert np.array_equal(ranks.pixels(ended), served.called(request)), request.request_id


def test_a_request_resumed_after_any_step_in_a_fresh_rank_ends_as_the_undisturbed_one(
    served: Tiny, tmp_path: Path
) -> None:
    request = served.request(num_steps=4)
    expected = served.called(request)
    ranks = Ranks([served.adapter(number=number) for number in range(2)], tmp_path)
    works = [ranks.run(Work(request, 0, 0, {}), ENCODE)]
    for _ in range(request.num_steps):
        works.append(ranks.run(works[-1], DENOISE, 1))
    for steps_done, work in enumerate(works):
        ranks.runners[1].forget("r")
        if left := request.num_steps - steps_done:
            work = ranks.run(work, DENOISE, left, rank=1)
            ranks.runners[1].forget("r")  # decode goes on from the state, too
        assert np.array_equal(ranks.pixels(ranks.run(work, DECODE, rank=1)), expected), steps_done


def calls() -> list[str]:
    """Names of the threads of calls."""
    return [each.name for each in threading.enumerate() if each.name.startswith("tetriserve-call-")]


def half_way(ranks: Ranks, request: Request) -> Work:
    return ranks.run(ranks.run(Work(request, 0, 0, {}), ENCODE), DENOISE, 1)


def test_a_call_ends_its_thread_when_its_request_is_forgotten_evicted_or_drawn(lumina2: Tiny, tmp_path: Path) -> None:
    assert calls() == []  # the self-test has left none
    ranks = Ranks([lumina2.adapter()], tmp_path)
    half_way(ranks, lumina2.request(request_id="a"))
    assert calls() == ["tetriserve-call-a"]
    ranks.runners[0].forget("a")
    assert calls() == []
    ended = ranks.run(half_way(ranks, lumina2.request(request_id="b")), DENOISE, 2)
    assert calls() == ["tetriserve-call-b"]
    ranks.run(ended, DECODE)
    assert calls() == []
    small = Ranks([lumina2.adapter()], tmp_path, resident_bytes=1)
    for name in "cd":
        half_way(small, lumina2.request(request_id=name))
    assert calls() == ["tetriserve-call-d"]  # of the last task, nothing is evicted
    small.runners[0].forget("d")


def test_no_more_calls_pause_than_the_adapter_allows(
    lumina2: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tetriserve.models.generic.adapter._MAX_CALLS", 2)
    ranks = Ranks([lumina2.adapter()], tmp_path)
    requests = [lumina2.request(request_id=name, seed=seed) for seed, name in enumerate("abc")]
    works = [half_way(ranks, request) for request in requests]
    assert calls() == ["tetriserve-call-b", "tetriserve-call-c"]
    for work, request in zip(works, requests, strict=True):
        ended = ranks.run(ranks.run(work, DENOISE, 2), DECODE)
        assert np.array_equal(ranks.pixels(ended), lumina2.called(request))
        assert len(calls()) <= 2
        ranks.runners[0].forget(request.request_id)
    assert calls() == []


def test_a_step_that_fails_fails_its_task_alone_and_can_be_made_again(
    lumina2: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = lumina2.adapter()
    ranks = Ranks([adapter], tmp_path)
    request = lumina2.request(request_id="a")
    other = half_way(ranks, lumina2.request(request_id="b", seed=8))
    work = half_way(ranks, request)
    forward = type(adapter.pipeline.transformer).forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("nothing can be divided by it")

    monkeypatch.setattr(adapter.pipeline.transformer, "forward", failing)
    ranks.runners[0].forget("a")  # a call that pauses has the former forward
    failed = ranks.answer(work, DENOISE, 2)
    assert isinstance(failed, TaskError)
    assert (failed.kind, failed.message) == (
        FailureKind.STEP, "denoise failed: ZeroDivisionError: nothing can be divided by it",
    )  # fmt: skip
    assert calls() == ["tetriserve-call-b"]
    monkeypatch.undo()
    assert type(adapter.pipeline.transformer).forward is forward
    for each in (work, other):
        ended = ranks.run(ranks.run(each, DENOISE, 2), DECODE)
        assert np.array_equal(ranks.pixels(ended), lumina2.called(each.request))
    assert calls() == []


def test_a_task_reports_its_steps_and_the_time_of_its_thread(lumina2: Tiny) -> None:
    adapter = lumina2.adapter()
    member = Member(lumina2.request(), 0, {})
    [left] = adapter.run(ENCODE, [member], 0, lambda: None)
    assert left.text is None and left.cpu_s > 0
    member.states = {ENCODE: left.tensors}
    steps: list[None] = []
    before_s = time.process_time()
    [left] = adapter.run(DENOISE, [member], 2, lambda: steps.append(None))
    assert len(steps) == left.num_steps == 2
    assert 0 < left.cpu_s <= time.process_time() - before_s
    assert not left.is_stage_over


def test_members_of_a_task_come_one_after_the_other(lumina2: Tiny) -> None:
    adapter = lumina2.adapter()
    members = [Member(lumina2.request(request_id=str(seed), seed=seed), 0, {}) for seed in range(3)]
    for stage, num_steps in ((ENCODE, 0), (DENOISE, 3), (DECODE, 0)):
        for member, left in zip(members, adapter.run(stage, members, num_steps, lambda: None), strict=True):
            member.states = {**member.states, stage: left.tensors}
            member.steps_done = left.num_steps
    for member in members:
        assert np.array_equal(member.states[DECODE]["pixels"].numpy(), lumina2.called(member.request))


# What the self-test refuses.


def problem(tiny: Tiny, change: Any, **fields: Any) -> str:
    """Of a pipeline that was changed after it was loaded."""
    pipeline = tiny.pipeline.__wrapped__(tiny, "float32")
    change(pipeline)
    return problem_of(pipeline, dataclasses.replace(tiny.card, **fields), torch.device("cpu"))


def with_scheduler(scheduler: Any) -> Any:
    return lambda pipeline: setattr(pipeline, "scheduler", scheduler)


class Remembering(FlowMatchEulerDiscreteScheduler):
    """Adds a little of the last prediction, which it keeps where no state finds it."""

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = self.__dict__.setdefault("kept", type("Kept", (), {"last": 0})())
        model_output, kept.last = model_output + 0.1 * kept.last, model_output
        return super().step(model_output, *args, **kwargs)


class SharedMomentum(nn.Module):
    """Stands for a guider: adds a little of the last prediction, whichever request that was of."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = 0

    def add(self, module: nn.Module, args: object, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        before = 0 if isinstance(self.last, int) or self.last.shape != output[0].shape else self.last
        self.last = output[0]
        return (output[0] + 0.1 * before,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pipeline: None, ""),
        (
            with_scheduler(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)),
            "after step 2, latents of a call that goes on from the state after step 1 are others",
        ),
        (
            with_scheduler(Remembering()),
            "after step 2, latents of a call that goes on from the state after step 1 are others",
        ),
        (
            lambda pipeline: pipeline.transformer.register_forward_hook(SharedMomentum().add),
            "after step 2, latents of a call that goes on .* are others",
        ),
        (
            lambda pipeline: nn.init.zeros_(pipeline.text_encoder.embed_tokens.weight),
            "its text encoders do not tell 'a red circle' and 'a tan square' apart",
        ),
        (
            lambda pipeline: nn.init.constant_(next(pipeline.transformer.parameters()), float("nan")),
            "latents are not finite after step 1",
        ),
    ],
    ids=["nothing", "noise-of-no-seed", "hidden-state", "shared-state", "void-encoder", "not-finite"],
)
def test_the_self_test_says_in_one_line_what_cannot_be_served(lumina2: Tiny, change: Any, said: str) -> None:
    found = problem(lumina2, change)
    assert re.fullmatch(said, found), found
    assert "\n" not in found and calls() == []


def test_a_refused_pipeline_ends_the_start_in_one_line(tmp_path: Path) -> None:
    path = built("lumina2", tmp_path).card.path
    file = path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stochastic_sampling": True}))
    with pytest.raises(CheckpointError, match="Lumina2Pipeline fails the self-test of --adapter generic: ") as caught:
        load_adapter(read_card(path, "generic"), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)])
def test_schedulers_that_step_more_often_than_asked_for_are_refused(scheduler: Any, tmp_path: Path) -> None:
    found = problem(built("pixart-sigma", tmp_path), with_scheduler(scheduler))
    assert found == "it raises RuntimeError: the schedule has more than the 3 steps that were asked for"


def test_a_pipeline_of_one_number_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Intermediate timesteps for SCM is not supported"):
        load_adapter(built("sana-sprint", tmp_path).card, "cpu")


def test_a_pipeline_that_draws_another_size_is_refused(tmp_path: Path) -> None:
    """HiDream draws as many pixels as it was trained for, whatever it is asked for."""
    hidream = built("hidream", tmp_path)
    card = dataclasses.replace(hidream.card, sizes=(Shape(64, 64),))
    with pytest.raises(CheckpointError, match="a picture of 128x128 where 64x64 was asked for"):
        load_adapter(card, "cpu")


# What its card says.


def test_the_card_says_what_the_call_takes(served: Tiny) -> None:
    card = served.card
    expected: Mapping[str, tuple[int, float, int, bool, int]] = {
        "sana": (20, 4.5, 300, True, 64),
        "pixart-sigma": (20, 4.5, 300, True, 16),
        "lumina2": (30, 4.0, 256, True, 16),
        "hidream": (50, 5.0, 128, True, 16),
        "aura-flow": (50, 3.5, 256, True, 16),
        "cogview3": (50, 5.0, 224, True, 16),
        "cogview3-dpm": (50, 5.0, 224, True, 16),
        "stable-diffusion": (50, 7.5, 0, True, 16),
        "sd3": (28, 7.0, 256, True, 16),
        "flux": (28, 3.5, 512, True, 16),
    }
    found = (card.default_num_steps, card.default_guidance_scale, card.num_text_tokens, card.has_negative_prompt)
    assert (*found, card.size_multiple) == expected[served.name]
    assert card.guides_by_passes == (served.name != "flux")
    assert card.valid_degrees((1, 2, 4)) == (1,) and not card.can_batch and not card.has_previews
    assert pool_of(card, PoolConfig(num_ranks=2, max_batch=8)).max_batch == 1
    assert len(card.limits) == 5


def test_the_default_size_is_the_pipelines_own(tmp_path: Path) -> None:
    sizes = {}
    for name in ("sana", "pixart-sigma", "aura-flow", "lumina2"):
        path = built(name, tmp_path).card.path
        (path / "tetriserve.json").unlink()
        sizes[name] = str(read_card(path, "generic").sizes[0])
    assert sizes == {"sana": "1024x1024", "pixart-sigma": "256x256", "aura-flow": "1024x1024", "lumina2": "64x64"}


def test_adapters_are_named_and_the_wrong_one_is_refused(lumina2: Tiny, tmp_path: Path) -> None:
    path = lumina2.card.path
    with pytest.raises(CheckpointError, match="no adapter serves pipeline class 'Lumina2Pipeline'.*--adapter generic"):
        find_model(str(path))
    with pytest.raises(CheckpointError, match="adapter 'flux' serves FluxPipeline, not 'Lumina2Pipeline'"):
        find_model(str(path), adapter="flux")
    with pytest.raises(ConfigError, match="adapter is 'magic'; allowed: flux, .*sd3, .*generic"):
        find_model(str(path), adapter="magic")
    assert find_model(str(path), adapter="generic").family == "generic"
    flux = built("flux", tmp_path).card.path
    assert (find_model(str(flux)).family, find_model(str(flux), adapter="flux").family) == ("flux", "flux")
    assert find_model(str(flux)).fingerprint != find_model(str(flux), adapter="generic").fingerprint


@pytest.mark.parametrize(
    ("pipeline_class", "said"),
    [
        ("NoPipeline", "diffusers has no class 'NoPipeline'; code that models bring is never run"),
        ("../../etc/passwd", "diffusers has no class"),
        ("WanImageToVideoPipeline", "the call of WanImageToVideoPipeline needs 'image'"),
        ("LTXConditionPipeline", "the call of LTXConditionPipeline takes 'strength'"),
        ("StableDiffusion3Img2ImgPipeline", "the call of StableDiffusion3Img2ImgPipeline takes 'strength'"),
        ("StableAudioPipeline", "the call of StableAudioPipeline does not take 'height'"),
    ],
)
def test_classes_that_make_no_picture_of_a_text_are_refused_before_anything_is_loaded(
    lumina2: Tiny, tmp_path: Path, pipeline_class: str, said: str
) -> None:
    path = linked(lumina2.card.path, tmp_path / "other")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").unlink()
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline_class}))
    with pytest.raises(CheckpointError, match=said) as caught:
        read_card(path, "generic")
    assert "\n" not in str(caught.value)


def test_components_are_checked_as_for_other_families(lumina2: Tiny, tmp_path: Path) -> None:
    path = linked(lumina2.card.path, tmp_path / "spoilt")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").unlink()
    for change, said in (
        ({"transformer": ["mine", "Model"]}, "allowed: classes of diffusers and transformers"),
        ({"scheduler": [None, None]}, "scheduler is .null, null.; Lumina2Pipeline needs it"),
        ({"transformer": [None, None]}, "names neither transformer nor unet"),
    ):
        (path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(CheckpointError, match=said):
            read_card(path, "generic")
    (path / "model_index.json").write_text(json.dumps(index))
    folder = linked(lumina2.card.path / "transformer", tmp_path / "transformer")
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:-1])
    (path / "transformer").unlink()
    folder.rename(path / "transformer")
    with pytest.raises(CheckpointError, match="transformer.*is truncated"):
        read_card(path, "generic")


def test_options_of_execution_that_a_model_has_no_choice_of_are_refused_in_one_line(tmp_path: Path) -> None:
    sana = built("sana", tmp_path).card
    execution = Execution("float32", attention="native")
    with pytest.raises(ConfigError, match="attention is 'native', but .* SanaPipeline has no choice") as caught:
        load_adapter(dataclasses.replace(sana, execution=execution), "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="Linear names no repeated blocks"):
        compile_blocks(nn.Linear(2, 2))
    stable_diffusion = built("stable-diffusion", tmp_path).card
    with pytest.raises(ConfigError, match="takes a transformer, but StableDiffusionPipeline has none") as caught:
        load_adapter(dataclasses.replace(stable_diffusion, execution=execution), "cpu")
    with pytest.raises(ConfigError, match="max-sequence-length is 7, but StableDiffusionPipeline takes none"):
        find_model(str(stable_diffusion.path), 7, adapter="generic")


def test_the_attention_that_is_asked_for_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flux = built("flux", tmp_path)
    adapter = load_adapter(
        dataclasses.replace(flux.card, execution=Execution("float32", attention="native_math")), "cpu"
    )
    backends = attention_dispatch._AttentionBackendRegistry._backends
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    used: list[torch.Size] = []

    def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        used.append(query.shape)
        return native_math(query, *args, **kwargs)

    native_math = backends[name]
    monkeypatch.setitem(backends, name, attend)
    made(cast(GenericAdapter, adapter), flux.request())
    num_blocks = 4
    assert len(used) == 3 * num_blocks


def test_an_engine_serves_it_on_several_ranks_and_says_what_it_cannot_do(lumina2: Tiny, tmp_path: Path) -> None:
    profile = Profile(
        model="lumina2", fingerprint="", hardware="any", execution=Execution("float32"), source="made up", created="",
        switch_s=0.001, move_s=0.001, team_s=0.0,
        rows=(
            Row(stage=ENCODE, seconds=0.1),
            Row(stage=DENOISE, height=64, width=64, degree=1, tokens=16, seconds=0.1),
            Row(stage=DECODE, height=64, width=64, seconds=0.1),
        ),
    )  # fmt: skip
    save_profile(profile, tmp_path / "profile.json")
    requests = {seed: lumina2.request(num_steps=5, seed=seed) for seed in range(4)}
    pictures: dict[int, np.ndarray] = {}
    with Engine(str(lumina2.card.path), ranks=2, profile=str(tmp_path / "profile.json"), adapter="generic") as engine:

        def draw(seed: int) -> None:
            picture = engine.generate(PROMPT, size="64x64", seed=seed, num_steps=5, slo_s=HANG_S)
            pictures[seed] = np.asarray(picture.image)

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
        assert engine._live is not None
        said = _model_object(engine._live, engine._live.models.first, 0)
    assert said.limits == list(lumina2.card.limits) and said.degrees == {"64x64": [1]}
    for seed, request in requests.items():
        assert np.array_equal(pictures[seed], lumina2.called(request))
