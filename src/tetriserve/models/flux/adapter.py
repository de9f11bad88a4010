"""FLUX: `diffusers.FluxPipeline`'s own parts, driven one step at a time.

Suffixes of tensor names: B batch (1 of what one request keeps), L text tokens, S image tokens, C channels, D embedding
width, A position axes (3), N steps, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from tetriserve.core.errors import CheckpointError
from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE
from tetriserve.models.adapter import Left, Member, Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.loading import load_pipeline
from tetriserve.models.parallel import SequenceParallel

if TYPE_CHECKING:
    from tetriserve.models.team import Team


_TEXTS_TO_TELL_APART = ("a red circle", "a tan square")
"""As many letters in each word of one as of the other: a vocabulary of unknown tokens alone makes the same of both."""
_SHORT_TEXT_TOKENS = 16


class FluxAdapter:
    """A loaded FLUX checkpoint. Bit-identical at degree 1 to `FluxPipeline(...)` with a CPU generator.

    Everything runs under `no_grad`, not `inference_mode`: what is returned may be written to in place, saved and
    sent through collectives by the caller.
    """

    def __init__(self, card: ModelCard, device: torch.device | str) -> None:
        """
        Raises:
            CheckpointError: the checkpoint cannot be loaded, not as its files say, or does not tell texts apart; the
                message is one line.
        """
        self._card = card
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, card.execution.dtype)
        self._pipeline: Any = load_pipeline(card, self._dtype, self._device)
        self._sequence_parallel = SequenceParallel(self._pipeline.transformer)
        self._check_texts()

    def run(
        self,
        stage: str,
        members: Sequence[Member],
        num_steps: int,
        on_step: Callable[[], None],
        *,
        joins_passes: bool = False,
    ) -> list[Left]:
        """See `Adapter.run`. Latents (B, S, 4C) come with their `noise_level`; decode leaves `pixels` (H, W, 3)."""
        match stage:
            case "encode":
                return [Left(self.encode(one.request), text=self.count_text(one.request)) for one in members]
            case "denoise":
                return self._denoise(members, num_steps, on_step, joins_passes)
            case "decode":
                return [self._decode(one) for one in members]
            case unknown:
                raise ValueError(f"this model has no stage {unknown!r}")

    def _denoise(
        self, members: Sequence[Member], num_steps: int, on_step: Callable[[], None], joins_passes: bool
    ) -> list[Left]:
        loops = [self._loop_of(member) for member in members]
        latents = [
            one.states[DENOISE]["latents"] if one.steps_done else self.initial_latents(one.request) for one in members
        ]
        for _ in range(num_steps):
            latents = step_together(loops, latents, joins_passes=joins_passes)
            on_step()
        lefts = []
        for member, loop, latents_BSC in zip(members, loops, latents, strict=True):
            member.memo["loop"] = loop
            tensors = {"latents": latents_BSC, "noise_level": torch.tensor(loop.noise_level)}
            is_over = loop.steps_done == member.request.num_steps
            lefts.append(Left(tensors, num_steps, is_stage_over=is_over))
        return lefts

    def _loop_of(self, member: Member) -> FluxDenoiseLoop:
        loop: FluxDenoiseLoop | None = member.memo.get("loop")
        if loop is None or loop.request != member.request:
            return self.denoise_loop(member.request, member.states[ENCODE], member.steps_done)
        loop.go_to(member.steps_done)  # it may have stayed behind, or stand where a task failed
        return loop

    def _decode(self, member: Member) -> Left:
        pixels = self.decode(member.request, member.states[DENOISE]["latents"])
        return Left({"pixels": torch.from_numpy(pixels)})

    @torch.no_grad()
    def encode(self, request: Request) -> Tensors:
        """prompt_embeds (B, L, D), pooled_prompt_embeds (B, D), and negative_* of both when there are two passes."""
        length = request.max_sequence_length or self._card.num_text_tokens
        embeds = self._encode_prompt(request.prompt, length)
        if request.stepped.num_passes == 2:
            assert request.negative_prompt is not None
            negative = self._encode_prompt(request.negative_prompt, length)
            embeds |= {f"negative_{name}": tensor for name, tensor in negative.items()}
        return embeds

    @torch.no_grad()
    def initial_latents(self, request: Request) -> torch.Tensor:
        """Packed noise (B, S, 4C), from the request's seed alone."""
        generator = torch.Generator("cpu").manual_seed(request.seed)
        num_channels = self._pipeline.transformer.config.in_channels // 4
        latents_BSC, _ = self._pipeline.prepare_latents(
            1, num_channels, request.shape.height, request.shape.width, self._dtype, self._device, generator
        )
        return latents_BSC  # type: ignore[no-any-return]

    def denoise_loop(self, request: Request, embeds: Tensors, steps_done: int) -> FluxDenoiseLoop:
        """The request's loop, standing before step `steps_done` (0 <= steps_done <= num_steps)."""
        img_ids_SA = self._image_ids(request.shape)
        return FluxDenoiseLoop(self._pipeline, request, embeds, img_ids_SA, steps_done)

    def use_team(self, team: Team | None) -> None:
        """Divide the sequence among `team` from the next step on; None is the bare model."""
        self._sequence_parallel.use(team)

    @torch.no_grad()
    def decode(self, request: Request, latents: torch.Tensor) -> np.ndarray:
        """Pixels (H, W, 3), uint8, exactly those of the pipeline's PIL image; `latents` is (B, S, 4C)."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        shape = request.shape
        latents_BCHW = pipeline._unpack_latents(latents, shape.height, shape.width, pipeline.vae_scale_factor)
        latents_BCHW = latents_BCHW / vae.config.scaling_factor + vae.config.shift_factor
        image_BCHW = vae.decode(latents_BCHW, return_dict=False)[0]
        [image_CHW] = pipeline.image_processor.postprocess(image_BCHW, output_type="pt")
        # As numpy would, but on the device, so that only bytes are copied.
        return image_CHW.permute(1, 2, 0).float().mul(255).round().to(torch.uint8).cpu().numpy()  # type: ignore[no-any-return]

    @torch.no_grad()
    def latents_of(self, pixels: np.ndarray) -> torch.Tensor:
        """Packed latents (B, S, 4C) without noise, of pixels (H, W, 3), uint8."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        image_BCHW = pipeline.image_processor.preprocess(pixels[None] / np.float32(255)).to(self._device, self._dtype)
        latents_BCHW = vae.encode(image_BCHW).latent_dist.mode()
        latents_BCHW = (latents_BCHW - vae.config.shift_factor) * vae.config.scaling_factor
        return pipeline._pack_latents(latents_BCHW, *latents_BCHW.shape)  # type: ignore[no-any-return]

    def count_text(self, request: Request) -> TextCount:
        """By the tokenizer of the T5 encoder; CLIP's, of which only a summary is used, cuts most texts earlier."""
        length = request.max_sequence_length or self._card.num_text_tokens
        num_tokens = _num_tokens(self._pipeline.tokenizer_2, request.prompt)
        num_clip_tokens = _num_tokens(self._pipeline.tokenizer, request.prompt)
        is_cut = num_tokens > length or num_clip_tokens > self._pipeline.tokenizer_max_length
        return TextCount(num_tokens, is_cut)

    def _encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        prompt_embeds_BLD, pooled_prompt_embeds_BD, _ = self._pipeline.encode_prompt(
            prompt, device=self._device, max_sequence_length=length
        )
        return {"prompt_embeds": prompt_embeds_BLD, "pooled_prompt_embeds": pooled_prompt_embeds_BD}

    @torch.no_grad()
    def _check_texts(self) -> None:
        """That both tokenizers and encoders tell two texts of equal length apart.

        Raises:
            CheckpointError: a vocabulary is empty or another model's, or an encoder's weights are void.
        """
        pipeline = self._pipeline
        for part, tokenizer, encoder in (
            ("text_encoder", pipeline.tokenizer, pipeline.text_encoder),
            ("text_encoder_2", pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            if len(tokenizer) > encoder.config.vocab_size:
                raise CheckpointError(
                    f"{self._card.path / part.replace('text_encoder', 'tokenizer')} has {len(tokenizer)} tokens, but "
                    f"{part} knows {encoder.config.vocab_size}; they are of different checkpoints"
                )
        length = min(_SHORT_TEXT_TOKENS, self._card.num_text_tokens)
        first, second = (self._encode_prompt(prompt, length) for prompt in _TEXTS_TO_TELL_APART)
        for name, number in (("pooled_prompt_embeds", ""), ("prompt_embeds", "_2")):
            distance = (first[name].float() - second[name].float()).abs().max().item()
            if not 0 < distance < float("inf"):
                raise CheckpointError(
                    f"{self._card.path}: tokenizer{number} and text_encoder{number} do not tell "
                    f"{' and '.join(map(repr, _TEXTS_TO_TELL_APART))} apart; download them again"
                )

    def _image_ids(self, shape: Shape) -> torch.Tensor:
        side = self._card.pixels_per_token
        return self._pipeline._prepare_latent_image_ids(  # type: ignore[no-any-return]
            1, shape.height // side, shape.width // side, self._device, self._dtype
        )


class FluxDenoiseLoop:
    """One request's steps, with a scheduler of its own."""

    def __init__(
        self, pipeline: Any, request: Request, embeds: Tensors, img_ids_SA: torch.Tensor, steps_done: int
    ) -> None:
        config = pipeline.scheduler.config
        num_steps, device = request.num_steps, img_ids_SA.device
        shift = calculate_shift(
            img_ids_SA.shape[0],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas_N = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / num_steps, num_steps)
        self._scheduler: Any = type(pipeline.scheduler).from_config(config)
        self._timesteps_N, _ = retrieve_timesteps(self._scheduler, num_steps, device, sigmas=sigmas_N, mu=shift)
        self.transformer = pipeline.transformer
        self.embeds = embeds
        self.request = request
        self.num_passes = request.stepped.num_passes
        self.img_ids_SA = img_ids_SA
        num_text_tokens = embeds["prompt_embeds"].shape[1]
        self.txt_ids_LA = torch.zeros(num_text_tokens, 3, device=device, dtype=img_ids_SA.dtype)
        self.guidance_B = None
        if self.transformer.config.guidance_embeds:
            self.guidance_B = torch.full([1], request.guidance_scale, device=device, dtype=torch.float32)
        self.go_to(steps_done)

    def go_to(self, steps_done: int) -> None:
        """Stand before step `steps_done`: the scheduler keeps no more than its place."""
        self.steps_done = steps_done
        self._scheduler.set_begin_index(steps_done)
        self._scheduler._step_index = None  # it begins anew

    @property
    def timestep(self) -> torch.Tensor:
        """Of the next step; a scalar."""
        return self._timesteps_N[self.steps_done]  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents (B, S, 4C) after one more step, in the same dtype."""
        [after] = step_together([self], [latents])
        return after

    def advance(self, latents: torch.Tensor, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The latents (B, S, 4C) after the step whose passes gave `velocities`: of the prompt, and of the negative."""
        velocity_BSC = velocities[0]
        if len(velocities) == 2:
            velocity_BSC = velocities[1] + self.request.true_cfg_scale * (velocity_BSC - velocities[1])
        timestep = self.timestep
        self.steps_done += 1
        return self._scheduler.step(velocity_BSC, timestep, latents, return_dict=False)[0]  # type: ignore[no-any-return]

    @property
    def noise_level(self) -> float:
        """Sigma of the flow matching schedule."""
        return float(self._scheduler.sigmas[self.steps_done])


@torch.no_grad()
def step_together(
    loops: Sequence[FluxDenoiseLoop], latents: Sequence[torch.Tensor], *, joins_passes: bool = False
) -> list[torch.Tensor]:
    """One step of each loop, the latents (1, S, 4C) of all in one forward for each pass; with `joins_passes`, in one.

    They may stand at different steps, but are of one shape, one number of passes and one length of text.
    """
    prefixes = ("", "negative_")[: loops[0].num_passes]
    passes: list[Sequence[torch.Tensor]]
    if joins_passes:
        joined = _velocities(loops, latents, prefixes)
        passes = [joined[start : start + len(loops)] for start in range(0, len(joined), len(loops))]
    else:
        passes = [_velocities(loops, latents, (prefix,)) for prefix in prefixes]
    return [
        loop.advance(before, velocities)
        for loop, before, velocities in zip(loops, latents, zip(*passes, strict=True), strict=True)
    ]


def _velocities(
    loops: Sequence[FluxDenoiseLoop], latents: Sequence[torch.Tensor], prefixes: Sequence[str]
) -> Sequence[torch.Tensor]:
    """What the transformer says of each, (1, S, 4C), in one forward: of all loops for the first prefix, and so on."""
    first, times = loops[0], len(prefixes)
    latents_BSC = torch.cat([*latents] * times)
    timesteps_B = torch.stack([loop.timestep for loop in loops] * times)
    guidances = [loop.guidance_B for loop in loops if loop.guidance_B is not None] * times
    embeds = [(loop.embeds, prefix) for prefix in prefixes for loop in loops]
    velocity_BSC = first.transformer(
        hidden_states=latents_BSC,
        timestep=timesteps_B.to(latents_BSC.dtype) / 1000,
        guidance=torch.cat(guidances) if guidances else None,
        pooled_projections=torch.cat([each[f"{prefix}pooled_prompt_embeds"] for each, prefix in embeds]),
        encoder_hidden_states=torch.cat([each[f"{prefix}prompt_embeds"] for each, prefix in embeds]),
        txt_ids=first.txt_ids_LA,
        img_ids=first.img_ids_SA,
        return_dict=False,
    )[0]
    return velocity_BSC.split(1)  # type: ignore[no-any-return]


def _num_tokens(tokenizer: Any, text: str) -> int:
    """Those that mark its ends included. The tokenizer's warning of long texts, which quotes none, is left out."""
    return len(tokenizer(text, verbose=False).input_ids)
