"""The FLUX adapter against `FluxPipeline` itself."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings that quote prompts are silent
from tetriserve.core.errors import CheckpointError
from tetriserve.core.events import TextCount
from tetriserve.core.execution import Execution
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, image_stages
from tetriserve.models.adapter import Member
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.models.registry import load_adapter

REQUEST = Request(
    request_id="r",
    prompt="a red circle on a blue background",
    shape=Shape(256, 256),
    stages=image_stages(3),
    seed=7,
    arrival_s=0.0,
    deadline_s=10.0,
)
NEGATIVE = dataclasses.replace(REQUEST, stages=image_stages(3, 2), negative_prompt="blurry", true_cfg_scale=3.0)
CASES = {
    "square": REQUEST,
    "one step": dataclasses.replace(REQUEST, stages=image_stages(1), seed=123456789),
    "no prompt": dataclasses.replace(REQUEST, prompt=""),
    "wide": dataclasses.replace(REQUEST, shape=Shape(height=256, width=320)),
    "negative prompt": NEGATIVE,
    "wide, empty negative prompt": dataclasses.replace(NEGATIVE, shape=Shape(256, 320), negative_prompt=""),
    "negative prompt without scale": dataclasses.replace(NEGATIVE, stages=image_stages(3), true_cfg_scale=1.0),
}


@pytest.fixture(scope="module")
def card(bundled_dir: Path) -> ModelCard:
    return read_card(bundled_dir)


@pytest.fixture(scope="module")
def adapter(card: ModelCard) -> FluxAdapter:
    adapter = load_adapter(card, "cpu")
    assert isinstance(adapter, FluxAdapter)
    return adapter


def plain_pipeline(path: Path, dtype: torch.dtype) -> Any:
    from diffusers import FluxPipeline

    pipeline: Any = FluxPipeline.from_pretrained(path, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(bundled_dir: Path) -> Any:
    return plain_pipeline(bundled_dir, torch.float32)


def call_pipeline(pipeline: Any, request: Request, output_type: str, length: int = 40) -> Any:
    return pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        true_cfg_scale=request.true_cfg_scale,
        height=request.shape.height,
        width=request.shape.width,
        num_inference_steps=request.num_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        max_sequence_length=length,
        output_type=output_type,
    ).images


def denoise(adapter: FluxAdapter, request: Request) -> torch.Tensor:
    latents = adapter.initial_latents(request)
    loop = adapter.denoise_loop(request, adapter.encode(request), 0)
    for _ in range(request.num_steps):
        latents = loop.step(latents)
    return latents


@pytest.mark.parametrize("case", CASES)
def test_latents_and_pixels_are_those_of_the_pipeline(adapter: FluxAdapter, pipeline: Any, case: str) -> None:
    request = CASES[case]
    latents = denoise(adapter, request)
    assert torch.equal(latents, call_pipeline(pipeline, request, "latent"))
    pixels = adapter.decode(request, latents)
    assert (pixels.shape, pixels.dtype) == ((request.shape.height, request.shape.width, 3), np.uint8)
    assert np.array_equal(pixels, np.asarray(call_pipeline(pipeline, request, "pil")[0]))


def test_half_precision_is_that_of_the_pipeline(card: ModelCard) -> None:
    adapter = FluxAdapter(dataclasses.replace(card, execution=Execution("bfloat16")), "cpu")
    latents = denoise(adapter, NEGATIVE)
    pipeline = plain_pipeline(card.path, torch.bfloat16)
    assert latents.dtype == torch.bfloat16
    assert torch.equal(latents, call_pipeline(pipeline, NEGATIVE, "latent"))
    assert np.array_equal(adapter.decode(NEGATIVE, latents), np.asarray(call_pipeline(pipeline, NEGATIVE, "pil")[0]))


@pytest.mark.parametrize("change", [{"use_flow_sigmas": True}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}])
def test_the_noise_levels_are_those_of_the_pipeline_whatever_the_scheduler_is_set_to(
    card: ModelCard, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = shutil.copytree(card.path, tmp_path / "model")
    file = path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    request = dataclasses.replace(REQUEST, shape=Shape(64, 64))
    latents = denoise(FluxAdapter(read_card(path), "cpu"), request)
    assert torch.equal(latents, call_pipeline(plain_pipeline(path, torch.float32), request, "latent"))


@pytest.mark.parametrize("length", [8, 40, 77])
def test_the_length_of_texts_is_that_of_the_request_as_in_the_pipeline(
    adapter: FluxAdapter, pipeline: Any, length: int
) -> None:
    request = dataclasses.replace(NEGATIVE, shape=Shape(64, 64), max_sequence_length=length)
    assert adapter.encode(request)["prompt_embeds"].shape[1] == length
    assert torch.equal(denoise(adapter, request), call_pipeline(pipeline, request, "latent", length))


def test_texts_are_counted_with_their_ends_and_what_is_cut_is_told_not_logged(
    adapter: FluxAdapter, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, length, expected in (
        (5, None, TextCount(6, False)),
        (39, None, TextCount(40, True)),  # 41 with CLIP's two ends, of which it holds 40
        (38, None, TextCount(39, False)),
        (60, None, TextCount(61, True)),
        (7, 8, TextCount(8, False)),
        (8, 8, TextCount(9, True)),
    ):
        request = dataclasses.replace(REQUEST, prompt="red " * words, max_sequence_length=length)
        adapter.encode(request)
        assert adapter.count_text(request) == expected
    assert caplog.records == []
    assert "red" not in "".join(capfd.readouterr())


def test_a_loop_resumed_before_any_step_ends_as_the_undisturbed_one(adapter: FluxAdapter) -> None:
    request = dataclasses.replace(NEGATIVE, stages=image_stages(4, 2))
    embeds = adapter.encode(request)
    states = [adapter.initial_latents(request)]
    loop = adapter.denoise_loop(request, embeds, 0)
    for _ in range(request.num_steps):
        states.append(loop.step(states[-1]))
    for steps_done in range(request.num_steps):
        resumed = adapter.denoise_loop(request, embeds, steps_done)
        latents = states[steps_done].clone()
        for _ in range(request.num_steps - steps_done):
            latents = resumed.step(latents)
        assert torch.equal(latents, states[-1]), steps_done


def test_interleaved_loops_do_not_disturb_each_other(adapter: FluxAdapter) -> None:
    requests = (REQUEST, dataclasses.replace(CASES["wide"], stages=image_stages(5)))
    latents = [adapter.initial_latents(request) for request in requests]
    loops = [adapter.denoise_loop(request, adapter.encode(request), 0) for request in requests]
    for index in (1, 0, 1, 1, 0, 1, 0, 1):
        latents[index] = loops[index].step(latents[index])
    for request, result in zip(requests, latents, strict=True):
        assert torch.equal(result, denoise(adapter, request))


def run_task(adapter: FluxAdapter, members: Sequence[Member], num_steps: int, *, joins_passes: bool = False) -> None:
    """The members take in what the task leaves."""
    lefts = adapter.run(DENOISE, members, num_steps, lambda: None, joins_passes=joins_passes)
    for member, left in zip(members, lefts, strict=True):
        member.states = {**member.states, DENOISE: left.tensors}
        member.steps_done += left.num_steps
        assert left.is_stage_over == (member.steps_done == member.request.num_steps)


@pytest.mark.parametrize("base", [REQUEST, NEGATIVE, CASES["wide"]], ids=["square", "negative prompt", "wide"])
def test_members_that_join_and_leave_a_batch_at_any_step_get_the_latents_of_a_single_run(
    adapter: FluxAdapter, base: Request
) -> None:
    passes = base.stepped.num_passes
    requests = [
        dataclasses.replace(
            base,
            prompt=f"a {colour} circle",
            seed=seed,
            guidance_scale=1.0 + seed,
            stages=image_stages(3 + seed, passes),
        )
        for seed, colour in enumerate(("red", "blue", "green", "yellow"))
    ]
    members = [Member(request, 0, {ENCODE: adapter.encode(request)}) for request in requests]
    dice = random.Random(3)
    while open_members := [member for member in members if member.steps_done < member.request.num_steps]:
        together = dice.sample(open_members, dice.randint(1, len(open_members)))
        if dice.random() < 0.2:
            together[0].memo.clear()  # as on a rank that has not seen it yet
        most = min(member.request.num_steps - member.steps_done for member in together)
        run_task(adapter, together, dice.randint(1, most), joins_passes=dice.random() < 0.5)
    for member in members:
        expected = denoise(adapter, member.request)
        difference = (member.states[DENOISE]["latents"] - expected).abs().max().item()
        assert difference < 1e-4, difference


def test_a_task_that_fails_in_the_middle_leaves_its_members_as_they_were(adapter: FluxAdapter) -> None:
    request = dataclasses.replace(REQUEST, stages=image_stages(4))
    member = Member(request, 0, {ENCODE: adapter.encode(request)})
    run_task(adapter, [member], 1)
    stops = iter((None, RuntimeError("stop")))

    def stop() -> None:
        if (error := next(stops)) is not None:
            raise error

    with pytest.raises(RuntimeError, match="stop"):
        adapter.run(DENOISE, [member], 3, stop)
    run_task(adapter, [member], 3)
    assert torch.equal(member.states[DENOISE]["latents"], denoise(adapter, request))


def test_what_an_earlier_request_of_the_same_id_left_on_a_rank_is_not_taken_up(adapter: FluxAdapter) -> None:
    earlier = dataclasses.replace(REQUEST, shape=Shape(64, 64))
    memo: dict[str, Any] = {}
    for request in (earlier, dataclasses.replace(earlier, prompt="a tan square"), REQUEST):
        member = Member(request, 0, {ENCODE: adapter.encode(request)}, memo)
        run_task(adapter, [member], 3)
        assert torch.equal(member.states[DENOISE]["latents"], denoise(adapter, request))


def test_a_step_leaves_its_argument_as_it_was_and_returns_an_ordinary_tensor(adapter: FluxAdapter) -> None:
    before = adapter.initial_latents(REQUEST)
    copy = before.clone()
    after = adapter.denoise_loop(REQUEST, adapter.encode(REQUEST), 0).step(before)
    assert torch.equal(before, copy)
    assert not torch.equal(after, before)
    after.add_(1)
    assert type(after) is torch.Tensor
    assert not after.is_inference()
    assert not after.requires_grad


def test_seeds_and_prompts_matter(adapter: FluxAdapter) -> None:
    other_seed = dataclasses.replace(REQUEST, seed=8)
    assert not torch.equal(adapter.initial_latents(REQUEST), adapter.initial_latents(other_seed))
    prompts = ("a red circle", "a blue circle", "東京", "大阪", "")
    embeds = [adapter.encode(dataclasses.replace(REQUEST, prompt=prompt)) for prompt in prompts]
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        distances = [(a[name] - b[name]).abs().max().item() for i, a in enumerate(embeds) for b in embeds[:i]]
        assert min(distances) > 1e-3
    other_prompt = dataclasses.replace(REQUEST, prompt="a blue circle")
    assert (denoise(adapter, REQUEST) - denoise(adapter, other_prompt)).abs().max() > 1e-4


def test_embeds_of_a_negative_prompt_come_only_with_two_passes(adapter: FluxAdapter) -> None:
    names = {"prompt_embeds", "pooled_prompt_embeds"}
    assert set(adapter.encode(REQUEST)) == names
    assert set(adapter.encode(CASES["negative prompt without scale"])) == names
    embeds = adapter.encode(NEGATIVE)
    assert set(embeds) == names | {f"negative_{name}" for name in names}
    assert embeds["prompt_embeds"].shape == embeds["negative_prompt_embeds"].shape == (1, 40, 128)


def test_a_checkpoint_that_diffusers_cannot_load_is_a_checkpoint_error(card: ModelCard, tmp_path: Path) -> None:
    spoilt = shutil.copytree(card.path, tmp_path / "spoilt")
    config = json.loads((spoilt / "transformer/config.json").read_text())
    (spoilt / "transformer/config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(
        CheckpointError, match=r"transformer cannot be loaded: .*context_embedder.bias expected shape"
    ) as caught:
        load_adapter(dataclasses.replace(card, path=spoilt), "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="tiny cannot be loaded: module diffusers has no attribute Other"):
        load_adapter(dataclasses.replace(card, pipeline_class="Other"), "cpu")
