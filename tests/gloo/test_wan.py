"""Wan's own rules: two transformers, histories of schedulers, options of a video, and files made while decoding."""

from __future__ import annotations

import dataclasses
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings that quote prompts are silent
from tests.families.case import FamilyCase
from tests.families.wan import WAN, WAN_5B, WAN_A14B, WAN_A14B_FROM_IMAGE, WAN_FROM_IMAGE
from tests.gloo.test_families import Tiny, all_stages, built, denoise, linked, picture, seeing
from tetriserve.config import LoraConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Request, Shape, VideoOptions
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.models.adapter import Member, Tensors
from tetriserve.models.checkpoint import read_card
from tetriserve.models.family import Guidance
from tetriserve.models.lora import with_loras
from tetriserve.models.registry import family_of, load_adapter, stages_of
from tetriserve.models.wan.adapter import WanAdapter

FPS = 12.0


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda case: built(case, tmp_path_factory.mktemp(case.name)))


def adapter_of(tiny: Tiny) -> WanAdapter:
    adapter = tiny.adapter()
    assert isinstance(adapter, WanAdapter)
    return adapter


def steps(adapter: WanAdapter, member: Member, num_steps: int) -> Tensors:
    """What a task of so many steps leaves, which the member then has as a rank would."""
    [left] = adapter.run(DENOISE, [member], num_steps, lambda: None)
    member.states = {**member.states, DENOISE: left.tensors}
    member.steps_done += num_steps
    return left.tensors


@pytest.mark.parametrize("case", [WAN, WAN_A14B], ids=lambda case: case.name)
def test_a_task_that_is_run_again_gives_the_same_bits_whatever_its_rank_remembers(
    tinies: Any, case: FamilyCase
) -> None:
    tiny = tinies(case)
    adapter, request = adapter_of(tiny), tiny.guided(num_steps=6)
    member = Member(request, 0, {ENCODE: adapter.encode(request)})
    before = steps(adapter, member, 2)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    first = steps(adapter, member, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())
    # Once more with the loop that has gone on, as after a failure elsewhere in the team.
    member.states, member.steps_done = {**member.states, DENOISE: before}, 2
    again = steps(adapter, member, 2)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    # And with a loop that stands at this step, while another rank's way there was another one.
    others = {name: tensor * 1.01 if tensor.ndim == 5 else tensor for name, tensor in before.items()}
    results = []
    for memo in (member.memo, {}):
        member.states, member.steps_done = {**member.states, DENOISE: before}, 2
        member.memo = memo
        steps(adapter, member, 1)
        member.states, member.steps_done = {**member.states, DENOISE: others}, 2
        if memo:
            member.memo["loop"].go_to(2, before)
        results.append(steps(adapter, member, 2)["latents"])
    assert torch.equal(*results)
    assert not torch.equal(results[0], first["latents"])


def test_the_last_task_leaves_the_latents_without_the_history(tinies: Any) -> None:
    tiny = tinies(WAN)
    adapter, request = adapter_of(tiny), tiny.request(num_steps=4)
    member = Member(request, 0, {ENCODE: adapter.encode(request)})
    names = [name for name in steps(adapter, member, 3) if name.startswith("scheduler/")]
    assert sum("model_outputs/" in name for name in names) == 2
    assert {*steps(adapter, member, 1)} == {"latents", "noise_level"}


def options(request: Request, **fields: float) -> Request:
    return dataclasses.replace(request, video=VideoOptions(FPS, **fields))


def test_a_request_has_its_own_boundary_second_guidance_and_shift(tinies: Any) -> None:
    tiny = tinies(WAN_A14B)
    adapter, plain = adapter_of(tiny), tiny.guided(num_steps=5)
    pipeline = tiny.pipeline()
    default = pipeline.scheduler
    results = [denoise(adapter, plain)]
    for fields in ({"guidance_scale_2": 2.0}, {"boundary_ratio": 0.5}, {"flow_shift": 9.0}):
        request = options(plain, **fields)
        pipeline.register_to_config(boundary_ratio=fields.get("boundary_ratio", 0.875))
        pipeline.scheduler = type(default).from_config(default.config, flow_shift=fields.get("flow_shift", 3.0))
        results.append(denoise(adapter, request))
        assert torch.equal(results[-1], tiny.called(request, "latent")), fields
    pipeline.register_to_config(boundary_ratio=0.875)
    pipeline.scheduler = default
    assert len({result.sum().item() for result in results}) == len(results)


def test_a_second_guidance_is_nothing_to_a_model_of_one_transformer(tinies: Any) -> None:
    tiny = tinies(WAN)
    request = tiny.guided(num_steps=3)
    given = options(request, guidance_scale_2=1.0, boundary_ratio=0.5)
    assert torch.equal(denoise(adapter_of(tiny), request), denoise(adapter_of(tiny), given))


def test_each_of_two_transformers_makes_the_steps_of_its_noise_levels(tinies: Any) -> None:
    tiny = tinies(WAN_A14B)
    adapter, request = adapter_of(tiny), tiny.guided(num_steps=8)
    made: list[str] = []
    handles = [
        getattr(adapter.pipeline, name).register_forward_pre_hook(lambda *_, name=name: made.append(name))
        for name in ("transformer", "transformer_2")
    ]
    denoise(adapter, request)
    for handle in handles:
        handle.remove()
    _, timesteps = adapter.schedule(request)
    num_first = sum(int(time) >= 875 for time in timesteps)
    assert 0 < num_first < 8
    assert made == ["transformer"] * 2 * num_first + ["transformer_2"] * 2 * (8 - num_first)


def test_members_before_and_behind_the_boundary_share_a_batch(tinies: Any) -> None:
    tiny = tinies(WAN_A14B)
    adapter = adapter_of(tiny)
    requests = [tiny.guided(num_steps=8, seed=seed) for seed in range(2)]
    members = [Member(request, 0, {ENCODE: adapter.encode(request)}) for request in requests]
    steps(adapter, members[1], 5)
    lefts = adapter.run(DENOISE, members, 3, lambda: None)
    for member, left in zip(members, lefts, strict=True):
        member.states = {**member.states, DENOISE: left.tensors}
        member.steps_done += 3
    steps(adapter, members[0], 5)
    for member in members:
        difference = (member.states[DENOISE]["latents"] - denoise(adapter, member.request)).abs().max()
        assert difference < 1e-4


def test_flow_matching_by_euler_has_the_bits_of_the_pipeline(tinies: Any, tmp_path: Path) -> None:
    path = linked(tinies(WAN).card.path, tmp_path / "euler")
    for name in ("scheduler", "model_index.json"):
        (path / name).unlink()
    (path / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((tinies(WAN).card.path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (path / "model_index.json").write_text(json.dumps(index))
    tiny = Tiny(WAN, read_card(path))
    adapter, request = adapter_of(tiny), tiny.guided(num_steps=4)
    latents = denoise(adapter, request)
    assert torch.equal(latents, tiny.called(request, "latent"))
    assert not torch.equal(latents, denoise(adapter, options(request, flow_shift=5.0)))
    member = Member(request, 0, {ENCODE: adapter.encode(request)})
    while member.steps_done < 4:
        member.memo.clear()
        steps(adapter, member, 1)
    assert torch.equal(member.states[DENOISE]["latents"], latents)


def test_two_transformers_that_see_a_picture_have_the_bits_of_the_pipeline(tinies: Any) -> None:
    tiny = tinies(WAN_A14B_FROM_IMAGE)
    image, request = picture(123, 301), tiny.guided(num_steps=4)
    theirs = tiny.called(request, "pil", image=Image.fromarray(image))
    ours = all_stages(adapter_of(tiny), seeing(tiny.card, request, [image]), image)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("num_frames", [1, 5, 13])
@pytest.mark.parametrize("case", [WAN, WAN_5B], ids=lambda case: case.name)
def test_any_number_of_frames_has_the_bits_of_the_pipeline(tinies: Any, case: FamilyCase, num_frames: int) -> None:
    tiny = tinies(case)
    request = tiny.guided(num_steps=2, shape=Shape(64, 64, num_frames))
    ours = all_stages(adapter_of(tiny), request)
    assert ours.shape == (num_frames, 64, 64, 3)
    assert np.array_equal(ours, tiny.called(request, "pil"))


def test_a_first_frame_stays_as_it_was_given(tinies: Any) -> None:
    tiny = tinies(WAN_5B)
    adapter, image = adapter_of(tiny), picture(64, 96)
    request = seeing(tiny.card, tiny.request(num_steps=3), [image])
    encoded = {**adapter.encode(request), **adapter.encode_images(request, [torch.from_numpy(image)])}
    loop, latents = adapter.denoise_loop(request, encoded, 0), adapter.initial_latents(request)
    for _ in range(3):
        latents = loop.step(latents)
    assert torch.equal(latents[:, :, :1], encoded["condition"])
    assert encoded["condition"].shape[2] == 1 < latents.shape[2]


def test_a_text_length_beside_a_picture_leaves_the_picture_where_the_transformer_finds_it(tinies: Any) -> None:
    tiny = tinies(WAN_FROM_IMAGE)
    adapter = adapter_of(tiny)
    short = adapter.encode(tiny.request(prompt="a red circle", max_sequence_length=16))["prompt_embeds"]
    full = adapter.encode(tiny.request(prompt="a red circle"))["prompt_embeds"]
    assert short.shape == full.shape
    assert (short - full).abs().max() < 1e-5
    assert short[0, :4].abs().min() > 0
    assert not short[0, 16:].any()


def test_decode_leaves_the_files_of_the_frames(tinies: Any) -> None:
    tiny = tinies(WAN)
    adapter = adapter_of(tiny)
    request = options(tiny.request(num_steps=2, shape=Shape(64, 96, 13)))
    latents = denoise(adapter, request)
    member = Member(request, 0, {DENOISE: {"latents": latents}})
    [left] = adapter.run(DECODE, [member], 0, lambda: None)
    assert all(tensor.dtype == torch.uint8 and tensor.ndim == 1 for tensor in left.tensors.values())
    frames = adapter.decode(request, latents)
    with av.open(io.BytesIO(left.tensors["video"].numpy().tobytes())) as container:
        [stream] = container.streams
        assert (stream.codec_context.name, stream.average_rate, stream.width, stream.height) == ("h264", FPS, 96, 64)
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert shown.shape == frames.shape
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs((shown - frames.astype(float)) @ luma).mean() < 8  # colours are kept at half the resolution
    thumbnail = Image.open(io.BytesIO(left.tensors["thumbnail"].numpy().tobytes()))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (96, 64))
    assert np.abs((np.asarray(thumbnail) - frames[0].astype(float)) @ luma).mean() < 8
    [again] = adapter.run(DECODE, [member], 0, lambda: None)
    assert torch.equal(again.tensors["video"], left.tensors["video"])


def test_frames_leave_the_decoder_a_latent_frame_at_a_time(tinies: Any) -> None:
    tiny = tinies(WAN)
    adapter, calls = adapter_of(tiny), []
    handle = adapter.pipeline.vae.decoder.register_forward_hook(lambda *_: calls.append(None))
    frames = adapter.frames(adapter.initial_latents(tiny.request(shape=Shape(64, 64, 9))))
    lengths = []
    for piece in frames:
        lengths.append(len(piece))
        assert len(calls) == len(lengths)
    handle.remove()
    assert lengths == [1, 4, 4]


def test_with_tiling_frames_are_those_of_the_vae_in_tiles(tinies: Any) -> None:
    tiny = tinies(WAN)
    tiled = load_adapter(dataclasses.replace(tiny.card, execution=Execution("float32", tiling="vae")), "cpu")
    assert isinstance(tiled, WanAdapter)
    pipeline = tiny.pipeline()
    request = tiny.request(shape=Shape(32, 272, 5))
    latents = tiled.initial_latents(request)
    pipeline.vae.enable_tiling()
    with torch.no_grad():
        mean, deviation = (
            torch.tensor(each).view(1, -1, 1, 1, 1)
            for each in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
        )
        video = pipeline.vae.decode(latents / (1.0 / deviation) + mean, return_dict=False)[0]
    pipeline.vae.disable_tiling()
    theirs = np.stack(pipeline.video_processor.postprocess_video(video, output_type="pil")[0])
    pieces = [*tiled.frames(latents)]
    assert max(map(len, pieces)) == 4
    assert np.array_equal(np.concatenate(pieces), theirs)
    assert not np.array_equal(theirs, adapter_of(tiny).decode(request, latents))


def test_two_transformers_are_served_without_loras(tinies: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lora is set, but wan-2.2-a14b\S* has two transformers and is served without"
    ):
        with_loras(tinies(WAN_A14B).card, [LoraConfig("ink", str(tmp_path / "ink.safetensors"))])


def test_cards_tell_what_a_video_may_be(tinies: Any) -> None:
    cards = {case.name: tinies(case).card for case in (WAN, WAN_A14B, WAN_5B, WAN_FROM_IMAGE)}
    facts = {
        name: (str(card.sizes[0]), card.size_multiple, card.max_frames, card.default_fps, card.has_boundary)
        for name, card in cards.items()
    }
    assert facts == {
        "wan-2.1": ("832x480x81", 16, 161, 16.0, False),
        "wan-2.2-a14b": ("832x480x81", 16, 161, 16.0, True),
        "wan-2.2-ti2v-5b": ("1280x704x121", 32, 241, 24.0, False),
        "wan-2.1-i2v": ("832x480x81", 16, 161, 16.0, False),
    }
    pictures = {name: (card.min_images, card.max_images, card.default_strength) for name, card in cards.items()}
    assert pictures["wan-2.1"] == pictures["wan-2.2-a14b"] == (0, 0, None)
    assert (pictures["wan-2.2-ti2v-5b"], pictures["wan-2.1-i2v"]) == ((0, 1, None), (1, 1, None))
    for card in cards.values():
        assert (card.makes_videos, card.frame_step, card.has_flow_shift, card.has_previews) == (True, 4, True, False)
        assert all((shape.frames - 1) % 4 == 0 and shape.frames <= card.max_frames for shape in card.sizes)
    tokens = {name: family_of(card).num_tokens(card, card.sizes[0]) for name, card in cards.items()}
    assert (tokens["wan-2.1"], tokens["wan-2.2-ti2v-5b"]) == (32_760, 27_280)
    stages = [
        stage.kind for stage in seeing(cards["wan-2.2-ti2v-5b"], tinies(WAN_5B).request(), [picture(64, 64)]).stages
    ]
    assert stages == [ENCODE, ENCODE_IMAGE, DENOISE, DECODE]
    assert stages_of(cards["wan-2.1"], Shape(64, 64, 5), 3, Guidance(5.0))[1].num_passes == 2
    assert stages_of(cards["wan-2.1"], Shape(64, 64, 5), 3, Guidance(1.0))[1].num_passes == 1
