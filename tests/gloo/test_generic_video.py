"""`--adapter generic`: pipelines that make videos, each against its own call."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import AdaptiveProjectedGuidance, FlowMatchEulerDiscreteScheduler

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings that quote prompts are silent
from tests.families import generic_video as tiny
from tests.families import generic_video_others as others
from tests.gloo.test_families import linked
from tests.gloo.test_generic import Ranks, Tiny, calls
from tetriserve.core.errors import CheckpointError
from tetriserve.core.events import Work
from tetriserve.core.execution import Execution
from tetriserve.core.request import MP4, Request, Shape, VideoOptions
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.models.adapter import Member, Tensors
from tetriserve.models.checkpoint import read_card
from tetriserve.models.generic.adapter import GenericAdapter
from tetriserve.models.generic.call import PipelineCall
from tetriserve.models.generic.selftest import problem_of
from tetriserve.models.registry import load_adapter
from tetriserve.models.video_file import VideoWriter

SERVED = {
    "animatediff": others.animatediff,
    "anyflow": others.anyflow,
    "cogvideox": tiny.cogvideox,
    "cogvideox-dpm": tiny.cogvideox_dpm,
    "hunyuan-video": tiny.hunyuan_video,
    "hunyuan-video-1.5": tiny.hunyuan_video_15,
    "kandinsky5": others.kandinsky5,
    "latte": others.latte,
    "ltx": tiny.ltx,
    "ltx2": tiny.ltx2,
    "mochi": tiny.mochi,
    "motif-video": others.motif_video,
    "wan-2.2-a14b": tiny.wan,
}
if HAS_FTFY := find_spec("ftfy") is not None:
    SERVED["skyreels-v2"] = others.skyreels_v2
SIDES = {"ltx2": (64, 96), "mochi": (32, 32)}
"""Others than 32x64: the first has margins in its decoder, the second takes time."""
GUIDED_BY_COMPONENT = ("hunyuan-video-1.5", "motif-video")
FRAMES = {"latte": "video_length"}
RATES = {"ltx": "frame_rate", "ltx2": "frame_rate"}
"""How calls name frames, and frames per second, where they are told them."""


class TinyVideo(Tiny):
    """Its requests are of videos."""

    def given(self) -> dict[str, Any]:
        if self.name != "kandinsky5":
            return {}
        # Its class is that of a processor, whose part for pictures the checkpoint does not have.
        return {"tokenizer": transformers.AutoTokenizer.from_pretrained(self.card.path / "tokenizer")}

    def request(self, **fields: Any) -> Request:
        return super().request(**{"media_type": MP4, "video": VideoOptions(self.card.default_fps), **fields})

    @cache  # noqa: B019
    def called(self, request: Request, dtype: str = "float32", output_type: str = "pil") -> np.ndarray:
        """The pipeline's own frames (N, H, W, 3), told what the request says and nothing else."""
        pipeline, said = self.pipeline(dtype), dict[str, Any]()
        if self.name in GUIDED_BY_COMPONENT:
            pipeline.guider = pipeline.guider.new(guidance_scale=request.guidance_scale)
        else:
            said["guidance_scale"] = request.guidance_scale
        if request.negative_prompt is not None:
            said["negative_prompt"] = request.negative_prompt
        if self.name == "hunyuan-video":
            said["true_cfg_scale"] = request.true_cfg_scale
        if request.max_sequence_length is not None:
            said["max_sequence_length"] = request.max_sequence_length
        if self.name in RATES:
            assert request.video is not None
            said[RATES[self.name]] = request.video.fps
        [frames] = pipeline(
            prompt=request.prompt, height=request.shape.height, width=request.shape.width,
            num_inference_steps=request.num_steps, generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type=output_type, **{FRAMES.get(self.name, "num_frames"): request.shape.frames}, **said,
        ).frames  # fmt: skip
        return np.stack(frames)

    def file(self, request: Request) -> bytes:
        """The file of the pipeline's own frames."""
        assert request.video is not None
        return file_of(self.called(request), request.video.fps)


def file_of(frames: np.ndarray, fps: float) -> bytes:
    writer = VideoWriter(*frames.shape[1:3], fps)
    writer.add(frames)
    return writer.finish().video


@pytest.fixture(scope="module", params=list(SERVED))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyVideo:
    return built(request.param, tmp_path_factory.mktemp("generic"))


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory: pytest.TempPathFactory) -> TinyVideo:
    return built("ltx2", tmp_path_factory.mktemp("generic"))


@pytest.fixture(scope="module")
def motif_video(tmp_path_factory: pytest.TempPathFactory) -> TinyVideo:
    return built("motif-video", tmp_path_factory.mktemp("generic"))


def built(name: str, folder: Path) -> TinyVideo:
    path = folder / name
    SERVED[name](path)
    card = read_card(path, "generic")
    frames = 1 + card.frame_step * (2 if card.frame_step < 6 else 1)
    size = Shape(*SIDES.get(name, (32, 64)), frames)
    return TinyVideo(name, dataclasses.replace(card, execution=Execution("float32"), sizes=(size,)))


def stages_of(adapter: GenericAdapter, request: Request, last: str = DECODE) -> dict[str, Tensors]:
    """What each stage to `last` leaves, by one task of each."""
    member, stages = Member(request, 0, {}), (ENCODE, DENOISE, DECODE)
    for stage in stages[: stages.index(last) + 1]:
        [left] = adapter.run(stage, [member], request.num_steps if stage == DENOISE else 0, lambda: None)
        assert left.is_stage_over
        member.states = {**member.states, stage: left.tensors}
        member.steps_done = left.num_steps
    return {**member.states}


def frames_of(adapter: GenericAdapter, request: Request, states: dict[str, Tensors]) -> np.ndarray:
    """All that decoding draws of the states, which the files do not have bit for bit."""
    call = PipelineCall(
        adapter.pipeline, adapter.card, request, adapter.device, encoded=states[ENCODE], stepped=states[DENOISE],
        steps_done=request.num_steps,
    )  # fmt: skip
    return np.stack([np.array(picture) for picture in call.pictures()])


def variety(tiny: TinyVideo) -> dict[str, Request]:
    short = {"max_sequence_length": 32} if tiny.card.num_text_tokens else {}
    rain = {"negative_prompt": "rain on a window", "true_cfg_scale": 3.0}
    return {
        "guided": tiny.request(),
        "not guided, another rate, short text": tiny.request(guidance_scale=1.0, video=VideoOptions(12.5), **short),
        "two steps, negative and odd prompt": tiny.request(
            num_steps=2, seed=123456789, prompt="東京\n\U0001f600 %s {x} " * 30, **rain
        ),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frames_have_the_bits_of_the_pipeline(served: TinyVideo, dtype: str) -> None:
    adapter = served.adapter(dtype)
    requests = variety(served) if dtype == "float32" else {"guided": served.request()}
    for name, request in requests.items():
        states, expected = stages_of(adapter, request), served.called(request, dtype)
        assert expected.shape == (request.shape.frames, request.shape.height, request.shape.width, 3)
        assert np.array_equal(frames_of(adapter, request, states), expected), name
        assert expected.std() > 1, f"{name}: a video of one colour shows nothing"
        assert request.video is not None
        assert states[DECODE].keys() == {"video", "thumbnail"}
        assert states[DECODE]["video"].numpy().tobytes() == file_of(expected, request.video.fps), name


def test_prompts_seeds_and_guidance_matter(served: TinyVideo) -> None:
    requests = [served.request(), served.request(prompt="a tan square"), served.request(seed=8)]
    requests.append(served.request(guidance_scale=2.5))
    latents = [stages_of(served.adapter(), request, DENOISE)[DENOISE]["latents"] for request in requests]
    for index, first in enumerate(latents):
        assert not any(torch.equal(first, second) for second in latents[index + 1 :])


def test_requests_that_take_turns_and_move_between_ranks_at_any_step_end_as_the_pipelines(
    served: TinyVideo, tmp_path: Path
) -> None:
    ranks = Ranks([served.adapter(number=number) for number in range(2)], tmp_path)
    dice = random.Random(5)
    requests = [
        served.request(request_id="a"),
        served.request(request_id="b", prompt="a tan square", seed=8, guidance_scale=1.0),
    ]
    works = {request.request_id: Work(request, 0, 0, {}) for request in requests}
    for request_id in works:
        works[request_id] = ranks.run(works[request_id], ENCODE, rank=dice.randrange(2))
    while waiting := [one for one in works.values() if one.stage_index == 1]:
        work = dice.choice(waiting)
        works[work.request.request_id] = ranks.run(work, DENOISE, 1, rank=dice.randrange(2))
    for request in requests:
        ended = ranks.run(works[request.request_id], DECODE, rank=dice.randrange(2))
        assert video_of(ranks, ended) == served.file(request), request.request_id


def test_a_request_resumed_after_any_step_in_a_fresh_rank_ends_as_the_undisturbed_one(
    served: TinyVideo, tmp_path: Path
) -> None:
    request = served.request()
    expected = served.file(request)
    ranks = Ranks([served.adapter(number=number) for number in range(2)], tmp_path)
    works = [ranks.run(Work(request, 0, 0, {}), ENCODE)]
    for _ in range(request.num_steps):
        works.append(ranks.run(works[-1], DENOISE, 1))
    last = ranks.store.load(works[-1].states[DENOISE], "cpu")
    for steps_done, work in enumerate(works):
        ranks.runners[1].forget("r")
        if left := request.num_steps - steps_done:
            work = ranks.run(work, DENOISE, left, rank=1)
            state = ranks.store.load(work.states[DENOISE], "cpu")
            assert all(torch.equal(last[name], state[name]) for name in last if "latents" in name), steps_done
            ranks.runners[1].forget("r")  # decode goes on from the state, too
        assert video_of(ranks, ranks.run(work, DECODE, rank=1)) == expected, steps_done


def video_of(ranks: Ranks, work: Work) -> bytes:
    return ranks.store.load(work.states[DECODE], "cpu")["video"].numpy().tobytes()


def test_the_copy_of_a_scheduler_that_makes_sound_is_part_of_the_state(ltx2: TinyVideo) -> None:
    state = stages_of(ltx2.adapter(), ltx2.request(), DENOISE)[DENOISE]
    assert state["latents"].shape != state["copies/1/latents"].shape
    for prefix in ("", "copies/1/"):
        assert int(state[prefix + "scheduler/_step_index:int"]) == 3
    assert "no sound: what the pipeline makes of it is left out" in ltx2.card.limits


def test_the_guidance_of_a_request_leaves_the_component_as_it_is(motif_video: TinyVideo) -> None:
    adapter = motif_video.adapter()
    before = {**vars(adapter.pipeline.guider)}
    stages_of(adapter, motif_video.request(guidance_scale=2.0), DENOISE)
    assert vars(adapter.pipeline.guider) == before and before["guidance_scale"] == 8.0
    card = motif_video.card
    assert (card.has_guidance, card.guides_by_passes, card.default_guidance_scale) == (True, True, 8.0)


def test_a_video_of_another_length_fails_its_request_alone(motif_video: TinyVideo) -> None:
    adapter, request = motif_video.adapter(), motif_video.request()
    states = stages_of(adapter, request, DENOISE)
    other = dataclasses.replace(request, shape=Shape(32, 64, 12))
    with pytest.raises(RuntimeError, match="the pipeline drew a video of 64x32x9 where 64x32x12 was asked for"):
        adapter.run(DECODE, [Member(other, 3, states)], 0, lambda: None)
    assert calls() == []
    [left] = adapter.run(DECODE, [Member(request, 3, states)], 0, lambda: None)
    assert left.tensors["video"].numpy().tobytes() == motif_video.file(request)


# What the self-test refuses.


def problem(tiny: TinyVideo, change: Any, **fields: Any) -> str:
    """Of a pipeline that was changed after it was loaded."""
    pipeline = tiny.pipeline.__wrapped__(tiny, "float32")
    change(pipeline)
    return problem_of(pipeline, dataclasses.replace(tiny.card, **fields), torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pipeline: None, ""),
        (
            lambda pipeline: pipeline.register_modules(
                guider=AdaptiveProjectedGuidance(guidance_scale=6.0, adaptive_projected_guidance_momentum=-0.5)
            ),
            "after step 2, latents of a call that goes on from the state after step 1 are others",
        ),
        (
            lambda pipeline: setattr(
                pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
            ),
            "after step 2, latents of a call that goes on from the state after step 1 are others",
        ),
        (
            lambda pipeline: setattr(pipeline, "vae_scale_factor_temporal", 2),
            "it raises RuntimeError: the pipeline drew a video of 64x32x9 where 64x32x5 was asked for",
        ),
    ],
    ids=["nothing", "momentum-of-a-guider", "noise-of-no-seed", "more-frames"],
)
def test_the_self_test_says_in_one_line_what_cannot_be_served(motif_video: TinyVideo, change: Any, said: str) -> None:
    found = problem(motif_video, change)
    assert re.fullmatch(said, found), found
    assert calls() == []


@pytest.mark.parametrize(
    ("build", "said"),
    [
        pytest.param(
            others.skyreels_v2,
            "NameError: name 'ftfy' is not defined; is a package of that name missing?",
            marks=pytest.mark.skipif(HAS_FTFY, reason="the package is there"),
        ),
        (others.easyanimate, "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_pipelines_that_fail_by_themselves_are_refused_in_one_line(build: Any, said: str, tmp_path: Path) -> None:
    build(tmp_path)
    card = read_card(tmp_path, "generic")
    card = dataclasses.replace(card, execution=Execution("float32"), sizes=(Shape(32, 64, 5),))
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        load_adapter(card, "cpu")
    assert "\n" not in str(caught.value)


# What its card says.


def test_the_card_says_what_the_call_takes(served: TinyVideo, tmp_path: Path) -> None:
    card = read_card(served.card.path, "generic")
    expected = {
        "animatediff": (50, 7.5, 0, 1, 16, 16.0),
        "anyflow": (50, 1.0, 512, 4, 16, 16.0),
        "cogvideox": (50, 6.0, 0, 8, 16, 8.0),
        "cogvideox-dpm": (50, 6.0, 0, 8, 16, 8.0),
        "hunyuan-video": (50, 6.0, 256, 4, 16, 24.0),
        "hunyuan-video-1.5": (50, 6.0, 0, 4, 16, 24.0),
        "kandinsky5": (50, 5.0, 512, 4, 16, 24.0),
        "latte": (50, 7.5, 0, 15, 16, 8.0),
        "ltx": (50, 3.0, 128, 8, 32, 25.0),
        "ltx2": (30, 3.0, 1024, 8, 32, 24.0),
        "mochi": (64, 4.5, 256, 6, 16, 30.0),
        "motif-video": (50, 8.0, 512, 4, 16, 24.0),
        "skyreels-v2": (50, 6.0, 512, 4, 16, 24.0),
        "wan-2.2-a14b": (50, 5.0, 512, 4, 16, 16.0),
    }
    found = (card.default_num_steps, card.default_guidance_scale, card.num_text_tokens)
    assert (*found, card.frame_step, card.size_multiple, card.default_fps) == expected[served.name]
    assert card.makes_videos and card.has_negative_prompt and card.valid_degrees((1, 2, 4)) == (1,)
    assert not card.can_batch and not card.has_previews
    assert card.guides_by_passes == (served.name != "hunyuan-video")
    assert len(card.limits) == 8 if served.name == "ltx2" else 7


def test_components_that_are_no_classes_of_diffusers_are_refused(ltx2: TinyVideo, tmp_path: Path) -> None:
    path = linked(ltx2.card.path, tmp_path / "other")
    index = json.loads((path / "model_index.json").read_text())
    assert index["connectors"][0] == "ltx2"
    (path / "model_index.json").unlink()
    (path / "model_index.json").write_text(json.dumps(index | {"connectors": ["ltx3", "LTX2TextConnectors"]}))
    with pytest.raises(CheckpointError, match="allowed: classes of diffusers and transformers"):
        read_card(path, "generic")
