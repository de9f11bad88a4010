"""Every family against its pipeline: one suite; a new family is a module in `tests/families` and a line here."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings that quote prompts are silent
from tests.families.case import FamilyCase, call_pipeline
from tests.families.flux import FLUX, FLUX_KONTEXT
from tests.families.flux2 import FLUX2_DEV, FLUX2_KLEIN, FLUX2_KLEIN_BASE
from tests.families.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS
from tests.families.sd3 import SD3, SD3_WITHOUT_T5
from tests.families.wan import WAN, WAN_5B, WAN_A14B, WAN_FROM_IMAGE
from tests.families.z_image import Z_IMAGE, Z_IMAGE_TURBO
from tests.ranks import meet, results_of
from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import MP4, Request, Shape, VideoOptions
from tetriserve.core.stages import DENOISE, ENCODE, ENCODE_IMAGE, INPUT, from_images
from tetriserve.models.adapter import Member, Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.diffusion import DiffusionAdapter
from tetriserve.models.execution import BACKENDS, compile_blocks, transformers_of
from tetriserve.models.family import Guidance
from tetriserve.models.preview import PATCH, Latents, fit_basis, project
from tetriserve.models.registry import family_of, load_adapter, stages_of
from tetriserve.worker.team.shm import ShmTeam

CASES = {
    case.name: case
    for case in (
        FLUX, FLUX_KONTEXT, FLUX2_DEV, FLUX2_KLEIN, FLUX2_KLEIN_BASE, QWEN_IMAGE, QWEN_IMAGE_EDIT,
        QWEN_IMAGE_EDIT_PLUS, SD3, SD3_WITHOUT_T5, WAN, WAN_A14B, WAN_5B, WAN_FROM_IMAGE, Z_IMAGE, Z_IMAGE_TURBO,
    )
}  # fmt: skip
NAMES = list(CASES)
TOLERANCE = 1e-4
PROMPT = "a red circle on a blue background"
NUM_RANKS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """A family's checkpoint as it was built, and its adapter in float32."""

    case: FamilyCase
    card: ModelCard

    def with_dtype(self, dtype: str) -> ModelCard:
        return dataclasses.replace(self.card, execution=Execution(dtype))

    @cache  # noqa: B019  the suite has few, and for all of its time
    def adapter(self, dtype: str = "float32") -> DiffusionAdapter:
        adapter = load_adapter(self.with_dtype(dtype), "cpu")
        assert isinstance(adapter, DiffusionAdapter)
        return adapter

    def pipeline(self, dtype: str = "float32", name: str | None = None) -> Any:
        """`name`: of another class than the checkpoint's."""
        return self._pipeline(dtype, name)

    @cache  # noqa: B019
    def _pipeline(self, dtype: str, name: str | None) -> Any:
        return self.bare_pipeline(dtype, name)

    def bare_pipeline(self, dtype: str = "float32", name: str | None = None) -> Any:
        """A pipeline of its own."""
        pipeline_class = getattr(diffusers, name or self.card.pipeline_class)
        given = self.case.given(self.card.path)
        absent = dict.fromkeys((*self.case.absent, *given))
        dtypes = {"default": getattr(torch, dtype)} | dict.fromkeys(self.case.in_float32, torch.float32)
        pipeline: Any = pipeline_class.from_pretrained(self.card.path, dtype=dtypes, **absent)
        pipeline.register_modules(**given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def request(self, *, num_steps: int = 3, **fields: Any) -> Request:
        return request_of(self.card, num_steps=num_steps, **fields)

    def guided(self, **fields: Any) -> Request:
        assert self.case.guided is not None
        return self.request(**{**self.case.guided, **fields})

    def requests(self, **fields: Any) -> list[Request]:
        """One of one pass and, where the family has them, one of two."""
        requests = [self.request(**fields)]
        return requests if self.case.guided is None else [*requests, self.guided(**fields)]

    def called(self, request: Request, output_type: str, dtype: str = "float32", **options: Any) -> Any:
        length = request.max_sequence_length or self.card.num_text_tokens
        name = self.case.picture_pipeline if "image" in options else None
        return call_pipeline(self.case, self.pipeline(dtype, name), request, length, output_type, **options)


def request_of(card: ModelCard, *, num_steps: int = 3, **fields: Any) -> Request:
    guidance = Guidance(
        fields.setdefault("guidance_scale", card.one_pass_scale),
        fields.get("negative_prompt"),
        fields.get("true_cfg_scale", 1.0),
    )
    fields = {"request_id": "r", "prompt": PROMPT, "shape": small(card), "seed": 7, **fields}
    if card.makes_videos:
        fields = {"media_type": MP4, "video": VideoOptions(card.default_fps), **fields}
    stages = family_of(card).stages(card, num_steps, guidance)
    return Request(**fields, stages=stages, arrival_s=0.0, deadline_s=10.0)


def small(card: ModelCard) -> Shape:
    return Shape(64, 96, 9 if card.makes_videos else 1)


def odd(card: ModelCard) -> Shape:
    """Of tokens that 4 ranks cannot share evenly; of a video, frames and latent frames neither."""
    if not card.makes_videos:
        return Shape(80, 112)
    return Shape(3 * card.size_multiple, 5 * card.size_multiple, 1 + 2 * card.frame_step)


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return built(CASES[request.param], tmp_path_factory.mktemp(request.param))


def built(case: FamilyCase, path: Path) -> Tiny:
    case.build(path)
    options = {"dtype": "float32", "max_sequence_length": case.num_text_tokens}
    (path / "tetriserve.json").write_text(json.dumps(options))
    return Tiny(case, read_card(path))


def denoise(adapter: DiffusionAdapter, request: Request) -> torch.Tensor:
    latents = adapter.initial_latents(request)
    loop = adapter.denoise_loop(request, encoded_of(adapter, request), 0)
    for _ in range(request.num_steps):
        latents = loop.step(latents)
    return latents


def variety(tiny: Tiny) -> dict[str, Request]:
    default = {"num_steps": tiny.card.default_num_steps}
    requests = {
        "fewest steps": tiny.request(num_steps=tiny.card.min_num_steps, seed=123456789),
        "no prompt": tiny.request(prompt=""),
        "long prompt": tiny.request(prompt="red " * 700),
        "odd prompt": tiny.request(prompt="東京\n\x00\U0001f600 %s {x}"),
        "odd size": tiny.request(shape=odd(tiny.card)),
    }
    if not tiny.card.makes_videos:  # guidance, which takes two passes, has them
        requests["default steps"] = tiny.request(**default)
    if tiny.case.guided is not None:
        requests |= {
            "guided": tiny.guided(),
            "guided, default steps": tiny.guided(**default),
            "guided, odd size, no prompt": tiny.guided(shape=odd(tiny.card), prompt=""),
        }
        if tiny.card.has_negative_prompt:
            requests["guided, empty negative prompt"] = tiny.guided(negative_prompt="")
            requests["guided, longer negative prompt"] = tiny.guided(negative_prompt="rain on a window " * 3)
    return requests | {name: tiny.request(**fields) for name, fields in tiny.case.extra.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_degree_1_has_the_bits_of_the_pipeline(tiny: Tiny, dtype: str) -> None:
    if tiny.card.min_images:
        return  # the pipeline insists on pictures, with which another test compares
    adapter = tiny.adapter(dtype)
    for name, request in variety(tiny).items():
        latents = denoise(adapter, request)
        pixels = adapter.decode(request, latents)
        with torch.no_grad():
            theirs = tiny.case.as_latents(adapter, request, latents)
        assert latents.isfinite().all(), name
        assert torch.equal(theirs, tiny.called(request, "latent", dtype)), name
        frames = (request.shape.frames,) if tiny.card.makes_videos else ()
        assert (pixels.shape, pixels.dtype) == ((*frames, request.shape.height, request.shape.width, 3), np.uint8)
        assert np.array_equal(pixels, np.asarray(tiny.called(request, "pil", dtype))), name
        assert pixels.std() > 1, f"{name}: a picture of one colour shows nothing"


def test_another_kernel_of_attention_is_used_and_gives_the_bits_of_the_pipeline_with_it(tiny: Tiny) -> None:
    request = tiny.request(prompt="a red square " * 20) if tiny.case.guided is None else tiny.guided(prompt="red " * 40)
    card = dataclasses.replace(tiny.card, execution=Execution("float32", attention="native_math"))
    adapter = load_adapter(card, "cpu")
    assert isinstance(adapter, DiffusionAdapter)
    attentions = [each for each in adapter.pipeline.transformer.modules() if hasattr(each, "processor")]
    assert {each.processor._attention_backend for each in attentions} == {BACKENDS["native_math"]}
    latents = denoise(adapter, request)
    assert (latents - denoise(tiny.adapter(), request)).abs().max() < TOLERANCE
    transformers = transformers_of(tiny.pipeline())
    if tiny.card.min_images:
        return  # its pipeline draws nothing without a picture; the transformer is another family's, too
    modules = [each for transformer in transformers for each in transformer.modules()]
    if any(hasattr(getattr(each, "processor", None), "_attention_backend") for each in modules):
        for transformer in transformers:
            transformer.set_attention_backend(BACKENDS["native_math"].value)
        theirs = tiny.called(request, "latent")
        for transformer in transformers:
            transformer.reset_attention_backend()
        with torch.no_grad():
            assert torch.equal(tiny.case.as_latents(tiny.adapter(), request, latents), theirs)


def test_blocks_are_compiled_whole(tiny: Tiny) -> None:
    request = tiny.requests(num_steps=2)[-1]
    adapter, graphs = load_adapter(tiny.card, "cpu"), CompileCounter()
    assert isinstance(adapter, DiffusionAdapter)
    torch._dynamo.reset()
    for transformer in transformers_of(adapter.pipeline):
        compile_blocks(transformer, graphs)
    difference = (denoise(adapter, request) - denoise(tiny.adapter(), request)).abs().max().item()
    assert difference < TOLERANCE
    assert graphs.frame_count > 0


def starting_from(request: Request, image: np.ndarray, skipped_steps: int) -> Request:
    """As intake makes it of a picture and a strength."""
    stages = [
        dataclasses.replace(stage, num_steps=stage.num_steps and stage.num_steps - skipped_steps)
        for stage in request.stages
    ]
    return dataclasses.replace(
        request, stages=from_images(stages, 1), skipped_steps=skipped_steps, images=(Shape(*image.shape[:2]),)
    )


def all_stages(adapter: DiffusionAdapter, request: Request, *images: np.ndarray) -> np.ndarray:
    """The picture or the video's frames, by one task a stage and by one a step."""
    pictures = {str(number): torch.from_numpy(image) for number, image in enumerate(images)}
    member = Member(request, 0, {INPUT: pictures})
    for stage in request.stages:
        member.steps_done = 0
        for _ in range(stage.num_steps or 1):
            [left] = adapter.run(stage.kind, [member], min(1, stage.num_steps), lambda: None)
            member.states = {**member.states, stage.kind: left.tensors}
            member.steps_done += left.num_steps
    if "video" in left.tensors:  # files of what cannot be had from them bit for bit
        return adapter.decode(request, member.states[DENOISE]["latents"])
    return left.tensors["pixels"].numpy()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(colours.repeat(8, 0).repeat(8, 1)[:height, :width])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_starts_from_a_picture_has_the_bits_of_the_image_to_image_pipeline(tiny: Tiny, dtype: str) -> None:
    case, adapter, card = tiny.case, tiny.adapter(dtype), tiny.card
    if case.image_to_image is None:
        assert card.default_strength is None
        return
    pipeline = getattr(diffusers, case.image_to_image)(**tiny.pipeline(dtype).components)
    pipeline.set_progress_bar_config(disable=True)
    for request in tiny.requests(num_steps=5):
        for image, strength, skipped_steps in (
            (picture(64, 96), 1.0, 0),
            (picture(50, 70, 1), 0.6, 2),
            (picture(200, 90, 2), 0.25, 3),
        ):
            given = Image.fromarray(image)
            if not case.resizes:
                given = given.resize((request.shape.width, request.shape.height), Image.Resampling.LANCZOS)
            theirs = pipeline(
                **case.call(pipeline, request, card.num_text_tokens),
                image=given,
                strength=strength,
                num_inference_steps=5,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="pil",
            ).images[0]
            ours = all_stages(adapter, starting_from(request, image, skipped_steps), image)
            assert np.array_equal(ours, np.asarray(theirs)), strength


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_sees_pictures_has_the_bits_of_the_pipeline(tiny: Tiny, dtype: str) -> None:
    adapter, card, sizes = tiny.adapter(dtype), tiny.card, tiny.case.pictures
    assert len(sizes) == (0 if card.default_strength is not None else card.max_images)
    for number in range(1, min(2, len(sizes)) + 1):  # a picture takes seconds
        images = [picture(*size, seed) for seed, size in enumerate(sizes[:number])]
        requests = tiny.requests()
        if card.min_images:  # no other test calls the pipeline
            fields = {"num_steps": 2, "prompt": "red 東京\n\x00 %s {x} " * 20, "shape": odd(card)}
            requests = [tiny.request(num_steps=2, prompt=""), tiny.guided(**fields, negative_prompt="rain on it " * 3)]
        for request in requests if number == 1 else requests[-1:]:
            given = [Image.fromarray(image) for image in images]
            theirs = tiny.called(request, "pil", dtype, image=given if card.max_images > 1 else given[0])
            ours = all_stages(adapter, seeing(card, request, images), *images)
            assert np.array_equal(ours, np.asarray(theirs)), number


def test_members_that_see_pictures_and_ones_that_see_others_share_a_batch(tiny: Tiny) -> None:
    adapter, card = tiny.adapter(), tiny.card
    if card.default_strength is not None or not card.max_images:
        return
    size = tiny.case.pictures[0]
    requests, members = [], []
    for seed in range(2):
        image = picture(*size, seed)
        request = seeing(card, tiny.requests(seed=seed)[-1], [image])
        member = Member(request, 0, {INPUT: {"0": torch.from_numpy(image)}})
        for stage in (ENCODE, ENCODE_IMAGE):
            member.states = {**member.states, stage: adapter.run(stage, [member], 0, lambda: None)[0].tensors}
        requests.append(request)
        members.append(member)
    together = adapter.run(DENOISE, members, 3, lambda: None)
    for member, left in zip(members, together, strict=True):
        [alone] = adapter.run(DENOISE, [member], 3, lambda: None)
        assert (left.tensors["latents"] - alone.tensors["latents"]).abs().max() < TOLERANCE
    first, second = (left.tensors["latents"] for left in together)
    assert (first - second).abs().max() > 1e-3


def seeing(card: ModelCard, request: Request, images: Sequence[np.ndarray]) -> Request:
    """As intake makes it."""
    shapes = tuple(Shape(*image.shape[:2]) for image in images)
    guidance = Guidance(request.guidance_scale, request.negative_prompt, request.true_cfg_scale)
    stages = stages_of(card, request.shape, request.num_steps, guidance, shapes)
    return dataclasses.replace(request, stages=stages, images=shapes)


def test_prompts_seeds_and_guidance_matter(tiny: Tiny) -> None:
    requests = [tiny.request(), tiny.request(prompt="a tan square"), tiny.request(seed=8)]
    if tiny.case.guided is not None:
        requests.append(tiny.guided())
        if tiny.card.has_negative_prompt:
            requests.append(tiny.guided(negative_prompt="a picture of nothing at all"))
    results = [denoise(tiny.adapter(), request) for request in requests]
    for first, second in combinations(results, 2):
        assert (first - second).abs().max() > 1e-4


def test_a_request_resumed_before_any_step_ends_as_the_undisturbed_one(tiny: Tiny) -> None:
    adapter = tiny.adapter()
    for request in tiny.requests(num_steps=4):
        encoded = encoded_of(adapter, request)
        states, histories = [adapter.initial_latents(request)], [dict[str, torch.Tensor]()]
        loop = adapter.denoise_loop(request, encoded, 0)
        for _ in range(request.num_steps):
            states.append(loop.step(states[-1]))
            histories.append({**loop.history()})
        for steps_done in range(request.num_steps):
            latents = states[steps_done].clone()
            resumed = adapter.denoise_loop(request, encoded, steps_done, histories[steps_done])
            for _ in range(request.num_steps - steps_done):
                latents = resumed.step(latents)
            assert torch.equal(latents, states[-1]), steps_done


def test_members_that_join_and_leave_a_batch_at_any_step_get_the_latents_of_a_single_run(tiny: Tiny) -> None:
    adapter = tiny.adapter()
    for base in tiny.requests():
        texts = ("a red circle", "blue", "a green square beside a tan triangle", "")
        requests = [
            dataclasses.replace(
                base,
                prompt=text,
                seed=seed,
                stages=tuple(dataclasses.replace(s, num_steps=s.num_steps and 3 + seed) for s in base.stages),
            )
            for seed, text in enumerate(texts)
        ]
        members = [Member(request, 0, {ENCODE: encoded_of(adapter, request)}) for request in requests]
        dice = random.Random(3)
        while still := [member for member in members if member.steps_done < member.request.num_steps]:
            together = dice.sample(still, dice.randint(1, len(still)))
            if dice.random() < 0.2:
                together[0].memo.clear()  # as on a rank that has not seen it yet
            most = min(member.request.num_steps - member.steps_done for member in together)
            joins = dice.random() < 0.5
            lefts = adapter.run(DENOISE, together, dice.randint(1, most), lambda: None, joins_passes=joins)
            for member, left in zip(together, lefts, strict=True):
                member.states = {**member.states, DENOISE: left.tensors}
                member.steps_done += left.num_steps
        for member in members:
            difference = (member.states[DENOISE]["latents"] - denoise(adapter, member.request)).abs().max().item()
            assert difference < TOLERANCE, difference


def plan_of(number: int, degrees: Sequence[int]) -> list[tuple[int, ...]]:
    """The ranks of each of three steps; of one rank, that is rank 0."""
    dice = random.Random(number)
    sets = [each for degree in degrees for each in combinations(range(NUM_RANKS), degree) if degree > 1 or each == (0,)]
    return [dice.choice(sets) for _ in range(3)]


def batches_of(card: ModelCard, guided: dict[str, Any] | None) -> list[list[Request]]:
    """Text lengths that ranks cannot share evenly, or less than a token each, too; one batch has two members, a short
    and a long text."""
    one = [request_of(card), request_of(card, prompt="red", shape=odd(card))]
    two = [request_of(card, **guided), request_of(card, **guided, prompt="", shape=odd(card))] if guided else []
    base = {} if guided is None else guided
    pair = [request_of(card, **base, prompt=text, seed=seed) for seed, text in enumerate(("red", "a tan square " * 20))]
    short = request_of(card, **base, max_sequence_length=1)
    images = (Shape(200, 90),)
    seeing = [[request_of(card, **base, images=images)]] if family_of(card).condition_shapes(card, images) else []
    return [*([each] for each in one + two), pair, [short], *seeing]


def encoded_of(adapter: DiffusionAdapter, request: Request) -> Tensors:
    """With noise in place of the latents of pictures: a VAE would take seconds for them.

    Where there must be a picture beside each step, and the request has none, it is one of noise.
    """
    family = family_of(adapter.card)
    conditions = family.condition_shapes(adapter.card, request.images)
    if not conditions and adapter.card.min_images and adapter.card.makes_videos:
        return {**adapter.encode(request), **adapter.encode_images(request, [torch.from_numpy(picture(64, 96))])}
    if not conditions:
        return adapter.encode(request)
    num_tokens = sum(family.num_tokens(adapter.card, shape) for shape in conditions)
    num_channels, generator = adapter.initial_latents(request).shape[-1], torch.Generator().manual_seed(1)
    image_latents = torch.randn(1, num_tokens, num_channels, generator=generator)
    return {**adapter.encode(request), "image_latents": image_latents}


def run_plans(
    team: ShmTeam, rank: int, end: Connection, path: Path, guided: dict[str, Any] | None, degrees: tuple[int, ...]
) -> list[list[torch.Tensor]]:
    """The latents of each batch, on each rank."""
    card = read_card(path)
    adapter = load_adapter(card, "cpu")
    assert isinstance(adapter, DiffusionAdapter)
    return run_batches(team, rank, end, path, adapter, batches_of(card, guided), degrees)


def run_batches(
    team: ShmTeam,
    rank: int,
    end: Connection,
    path: Path,
    adapter: DiffusionAdapter,
    batches: Sequence[Sequence[Request]],
    degrees: tuple[int, ...],
) -> list[list[torch.Tensor]]:
    """As `plan_of` has them; what each step leaves goes to all ranks."""
    results = []
    token = 0
    for number, batch in enumerate(batches):
        members = [Member(request, 0, {ENCODE: encoded_of(adapter, request)}) for request in batch]
        for step, ranks in enumerate(plan_of(number, degrees)):
            meet(end)
            token += 1
            if rank in ranks:
                if len(ranks) > 1:
                    team.enter(ranks, token)
                adapter.use_team(team if len(ranks) > 1 else None)
                lefts = adapter.run(DENOISE, members, 1, lambda: None)
            meet(end)
            for index, member in enumerate(members):
                left = lefts[index].tensors if rank == ranks[0] else None
                member.states = {**member.states, DENOISE: _from(left, token, path, index)}
                member.steps_done = step + 1
            meet(end)
        results.append([member.states[DENOISE]["latents"] for member in members])
    return results


def _from(left: Tensors | None, token: int, path: Path, index: int) -> Tensors:
    """What the leader left, in a file as a worker leaves it in the store; None on the other ranks."""
    file = path.parent / f"{path.name}-left-{token}-{index}.pt"
    if left is not None:
        torch.save({**left}, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        return left
    while not file.exists():
        time.sleep(0.001)
    return torch.load(file)  # type: ignore[no-any-return]


def test_any_plan_of_degrees_and_ranks_gives_the_latents_of_degree_1(tiny: Tiny, tmp_path: Path) -> None:
    guided = None if tiny.case.guided is None else dict(tiny.case.guided)
    adapter = tiny.adapter()
    by_rank = results_of(run_plans, "shm", NUM_RANKS, tmp_path, tiny.card.path, guided, tiny.case.degrees)
    for number, batch in enumerate(batches_of(tiny.card, guided)):
        for index, request in enumerate(batch):
            expected = denoise(adapter, request)
            for latents in by_rank:
                difference = (latents[number][index] - expected).abs().max().item()
                assert difference < TOLERANCE, (plan_of(number, tiny.case.degrees), index, difference)


def test_degrees_are_those_that_divide_the_heads(tiny: Tiny) -> None:
    assert tiny.card.valid_degrees((1, 2, 3, 4)) == tiny.case.degrees


def test_defaults_follow_the_files_that_tell_a_familys_models_apart(tiny: Tiny) -> None:
    expected = {
        "flux2-dev": (50, 4.0, True, False),
        "flux2-klein": (4, 1.0, False, False),
        "flux2-klein-base": (50, 4.0, True, True),
        "z-image": (50, 5.0, True, True),
        "z-image-turbo": (8, 0.0, True, True),
        "wan-2.1": (50, 5.0, True, True),
    }
    card = tiny.card
    facts = (card.default_num_steps, card.default_guidance_scale, card.has_guidance, card.guides_by_passes)
    assert facts == expected.get(tiny.case.name, facts)
    has_second_pass = tiny.request(guidance_scale=card.default_guidance_scale).stepped.num_passes == 2
    assert has_second_pass == (card.guides_by_passes and card.default_guidance_scale > card.passes_above)


def test_previews_are_fit_to_the_latents_of_the_family(tiny: Tiny) -> None:
    adapter, card = tiny.adapter(), tiny.card
    if not card.has_previews:
        return
    request = tiny.request()
    basis = fit_basis(adapter, card)
    member = Member(request, 0, {ENCODE: adapter.encode(request)})
    [left] = adapter.run(DENOISE, [member], 2, lambda: None)
    rows, columns = (side // card.pixels_per_token for side in (request.shape.height, request.shape.width))
    latents = Latents.of(left.tensors["latents"].numpy(), float(left.tensors["noise_level"]), rows)
    assert len(latents.tokens) == family_of(card).num_tokens(card, request.shape)
    assert project(basis, latents, None, rows, columns).shape == (rows * PATCH, columns * PATCH, 3)
    assert 0 < latents.noise_level < 1


def test_text_is_counted_and_what_is_cut_is_told(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    adapter = tiny.adapter()
    short, long = tiny.request(prompt="red"), tiny.request(prompt="red " * 1200)
    assert 0 < adapter.count_text(short).num_tokens < tiny.card.num_text_tokens
    assert not adapter.count_text(short).is_truncated
    assert adapter.count_text(long).is_truncated
    adapter.encode(long)
    assert "red" not in caplog.text


def test_each_missing_component_ends_the_start_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    for component in family_of(tiny.card).components:
        index = json.loads((tiny.card.path / "model_index.json").read_text())
        path = linked(tiny.card.path, tmp_path / component)
        (path / component).unlink()
        with pytest.raises(CheckpointError, match=component) as caught:
            read_card(path)
        assert "\n" not in str(caught.value)
        (path / "model_index.json").unlink()
        (path / "model_index.json").write_text(json.dumps(index | {component: [None, None]}))
        with pytest.raises(CheckpointError, match=f"{component} is .null, null.; .* needs it") as caught:
            read_card(path)


def test_truncated_weights_and_other_schedulers_end_the_start_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    index = json.loads((tiny.card.path / "model_index.json").read_text())
    for component in (tiny.card.path / name for name in index if not name.startswith("_")):
        for file in component.glob("*.safetensors"):
            path = linked(tiny.card.path, tmp_path / component.name)
            folder = linked(component, path / "own")
            (path / component.name).unlink()
            folder.rename(path / component.name)
            spoilt = path / component.name / file.name
            spoilt.unlink()
            spoilt.write_bytes(file.read_bytes()[:-1])
            with pytest.raises(CheckpointError, match=f"{component.name}.*is truncated") as caught:
                read_card(path)
            assert "\n" not in str(caught.value)
    path = linked(tiny.card.path, tmp_path / "scheduler")
    (path / "scheduler").unlink()
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    with pytest.raises(CheckpointError, match="scheduler DDPMScheduler .* draws noise"):
        read_card(path)


def linked(source: Path, target: Path) -> Path:
    """A folder with links to all that is in `source`."""
    target.mkdir(exist_ok=True)
    for each in source.iterdir():
        if not (target / each.name).exists():
            (target / each.name).symlink_to(each)
    return target
