"""Wan: `diffusers.WanPipeline`'s own parts, or `WanImageToVideoPipeline`'s, driven one step at a time.

Suffixes of tensor names: see `models.diffusion`; besides T latent frames, N frames. H and W are of what they follow.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE
from tetriserve.models.adapter import Left, Member, Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.diffusion import Branch, DenoiseLoop, DiffusionAdapter, num_text_tokens
from tetriserve.models.execution import transformers_of
from tetriserve.models.parallel import SequenceParallel
from tetriserve.models.tiled_decode import finished
from tetriserve.models.video_file import VideoWriter
from tetriserve.models.wan.decoding import decode_by_frame, most_likely_latents, spread
from tetriserve.models.wan.facts import FRAME_STEP, NUM_TEXT_TOKENS

if TYPE_CHECKING:
    from tetriserve.models.team import Team

# Without the package ftfy that of pictures fails; otherwise both are the same.
pipeline_wan_i2v.basic_clean = pipeline_wan.basic_clean


@dataclass(frozen=True)
class VideoInputs:
    """What the forwards of a request take, besides latents, time and embeddings.

    condition: of the picture, (1, C, T, H, W): channels beside the latents, or the latents of the first frame, T = 1.
    image_embeds: of the picture, (1, L, D), for transformers that read them.
    free: 1 where latents are made, 0 in the first frame where that is given: (1, 1, T, H, W); None without times for
        each token.
    """

    condition: torch.Tensor | None
    image_embeds: torch.Tensor | None
    free: torch.Tensor | None


class WanLoop(DenoiseLoop):
    """Steps of one video."""

    @property
    def is_of_second(self) -> bool:
        """Whether the second transformer makes the next step: `boundary_ratio` of the pipeline."""
        ratio = self._adapter.pipeline.config.boundary_ratio
        video = self.request.video
        if ratio is None:
            return False
        if video is not None and video.boundary_ratio is not None:
            ratio = video.boundary_ratio
        return bool(self.timestep < ratio * self._scheduler.config.num_train_timesteps)

    @property
    def guidance_scale(self) -> float:
        """Of the next step."""
        video = self.request.video
        if video is None or video.guidance_scale_2 is None or not self.is_of_second:
            return self.request.guidance_scale
        return video.guidance_scale_2

    @property
    def times(self) -> torch.Tensor:
        """Of the next step: (1,), or (1, S) where each token has its own, 0 in a frame that is given."""
        inputs: VideoInputs = self.inputs
        if inputs.free is None:
            return self.timestep.expand(1)
        return (inputs.free[0][0][:, ::2, ::2] * self.timestep).flatten().unsqueeze(0)

    def seen(self, latents: torch.Tensor) -> torch.Tensor:
        """What the transformer sees of the latents."""
        inputs: VideoInputs = self.inputs
        if inputs.condition is None:
            return latents
        if inputs.free is None:
            return torch.cat([latents, inputs.condition], dim=1)
        return (1 - inputs.free) * inputs.condition + inputs.free * latents

    def advance(self, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The first frame, where it is given, is put in after the last step, as the pipeline does."""
        after = super().advance(latents, prediction)
        is_given = self.inputs.free is not None and self.inputs.condition is not None
        return self.seen(after) if self.is_over and is_given else after


class WanAdapter(DiffusionAdapter):
    """Latents are (B, C, T, H, W), in float32 whatever the model's dtype, as are the VAE and the image encoder: those
    of the published examples are."""

    has_history = True
    in_float32 = ("vae", "image_encoder")

    def __init__(self, card: ModelCard, device: torch.device | str, *, has_text_encoders: bool = True) -> None:
        """See `DiffusionAdapter`."""
        super().__init__(card, device, has_text_encoders=has_text_encoders)
        self._others = [SequenceParallel(each) for each in transformers_of(self.pipeline)[1:]]

    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        """Of `length` tokens; of 512 where a picture's embeddings stand before them: the transformer counts from the
        end. What stands for no text is zeros."""
        prompt_embeds_BLD, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        if self._reads_images:
            prompt_embeds_BLD = torch.nn.functional.pad(prompt_embeds_BLD, (0, 0, 0, NUM_TEXT_TOKENS - length))
        return {"prompt_embeds": prompt_embeds_BLD.to(self.pipeline.transformer.dtype)}

    def text_parts(self, embeds: Tensors) -> Mapping[str, torch.Tensor]:
        return {"text_encoder": embeds["prompt_embeds"]}

    def count_text(self, request: Request) -> TextCount:
        num_tokens = num_text_tokens(self.pipeline.tokenizer, pipeline_wan.prompt_clean(request.prompt))
        return TextCount(num_tokens, num_tokens > (request.max_sequence_length or self.card.num_text_tokens))

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        size = (1, self.pipeline.vae.config.z_dim, *self._latent_size(request.shape))
        return torch.randn(size, generator=generator, dtype=torch.float32).to(self.device)

    def schedule(self, request: Request) -> tuple[Any, torch.Tensor]:
        """With the request's own shift of noise levels, if it has one."""
        shift = None if request.video is None else request.video.flow_shift
        config = self.pipeline.scheduler.config
        name = "flow_shift" if "flow_shift" in config else "shift"
        changes = {} if shift is None else {name: shift}
        scheduler = type(self.pipeline.scheduler).from_config(config, **changes)
        return scheduler, self.set_timesteps(scheduler, request)

    def set_timesteps(self, scheduler: Any, request: Request) -> torch.Tensor:
        scheduler.set_timesteps(request.num_schedule_steps, device=self.device)
        return scheduler.timesteps  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_images(self, request: Request, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`condition` and `image_embeds` of the only picture; see `VideoInputs`."""
        [image_HWC] = images
        pipeline, shape = self.pipeline, request.shape
        picture = Image.fromarray(image_HWC.cpu().numpy())
        image_BCHW = pipeline.video_processor.preprocess(picture, height=shape.height, width=shape.width)
        image_BCHW = image_BCHW.to(self.device, torch.float32)
        if pipeline.config.expand_timesteps:
            return {"condition": self.encode_pixels(image_BCHW)}
        left = {"condition": self._beside(image_BCHW, shape.frames)}
        if self._reads_images:
            image_embeds_BLD = pipeline.encode_image(picture, self.device)
            left["image_embeds"] = image_embeds_BLD.to(pipeline.transformer.dtype)
        return left

    def denoise_loop(
        self, request: Request, encoded: Tensors, steps_done: int, left: Tensors = MappingProxyType({})
    ) -> WanLoop:
        return WanLoop(self, request, encoded, steps_done, left)

    def inputs(self, request: Request, encoded: Tensors) -> VideoInputs:
        condition, image_embeds, free = encoded.get("condition"), encoded.get("image_embeds"), None
        size = self._latent_size(request.shape)
        if self.pipeline.config.expand_timesteps:
            free = torch.ones(1, 1, *size, device=self.device)
            if condition is not None:
                free[:, :, 0] = 0
        elif condition is None and self.card.min_images:  # a step is measured without a picture
            config = self.pipeline.transformer.config
            condition = torch.zeros(1, config.in_channels - config.out_channels, *size, device=self.device)
            if self._reads_images:
                vision = self.pipeline.image_encoder.config
                num_tokens = 1 + (vision.image_size // vision.patch_size) ** 2
                image_embeds = torch.zeros(1, num_tokens, config.image_dim, device=self.device, dtype=self.dtype)
        return VideoInputs(condition, image_embeds, free)

    def kind(self, branch: Branch) -> Hashable:
        return branch.latents.shape, branch.embeds().shape, _loop(branch).is_of_second

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        loops = [_loop(branch) for branch in branches]
        pipeline = self.pipeline
        transformer = pipeline.transformer_2 if loops[0].is_of_second else pipeline.transformer
        seen = [loop.seen(branch.latents) for loop, branch in zip(loops, branches, strict=True)]
        images = [loop.inputs.image_embeds for loop in loops if loop.inputs.image_embeds is not None]
        velocity_BCTHW = transformer(
            hidden_states=torch.cat(seen).to(transformer.dtype),
            timestep=torch.cat([loop.times for loop in loops]),
            encoder_hidden_states=torch.cat([branch.embeds() for branch in branches]),
            encoder_hidden_states_image=torch.cat(images) if images else None,
            return_dict=False,
        )[0]
        return velocity_BCTHW.split(1)  # type: ignore[no-any-return]

    def guide(self, loop: DenoiseLoop, prediction: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(loop, WanLoop)
        return prediction if negative is None else negative + loop.guidance_scale * (prediction - negative)

    def decode_latents(self, latents: torch.Tensor, shape: Shape) -> torch.Tensor | None:
        """The whole video (1, 3, N, H, W)."""
        vae = self.pipeline.vae
        return vae.decode(spread(vae, latents), return_dict=False)[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def frames(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """The video as it is decoded, of one latent frame after the other: uint8 (N, H, W, 3), exactly those of the
        pipeline's PIL images. None where another member leads."""
        vae = self.pipeline.vae
        spread_BCTHW = spread(vae, latents)
        if self._tiled_decode.cuts(spread_BCTHW):
            yield from self._frames_of_tiles(spread_BCTHW)
            return
        for video_BCNHW in decode_by_frame(vae, spread_BCTHW):
            yield self._pixels(video_BCNHW)
            self._tiled_decode.on_part()

    def decode(self, request: Request, latents: torch.Tensor) -> np.ndarray | None:
        """All frames, uint8 (N, H, W, 3)."""
        frames = [*self.frames(latents)]
        return np.concatenate(frames) if frames else None

    def encode_pixels(self, image_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Of a video of one frame."""
        assert generator is None, "the pipelines take the most likely latents"
        return most_likely_latents(self.pipeline.vae, image_BCHW.unsqueeze(2))

    def use_team(self, team: Team | None) -> None:
        super().use_team(team)
        for each in self._others:
            each.use(team)

    def _latent_size(self, shape: Shape) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        side = self.pipeline.vae_scale_factor_spatial
        return 1 + (shape.frames - 1) // FRAME_STEP, shape.height // side, shape.width // side

    @property
    def _reads_images(self) -> bool:
        """Whether pictures are embedded as texts are."""
        return self.pipeline.transformer.config.image_dim is not None

    def _beside(self, image_BCHW: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Channels beside the latents: which of the frames that share a latent frame are given, and the latents of a
        video that is the picture and then grey. The order of frames is `prepare_latents`'s of the pipeline."""
        video_BCNHW = image_BCHW.new_zeros(*image_BCHW.shape[:2], num_frames, *image_BCHW.shape[2:])
        video_BCNHW[:, :, 0] = image_BCHW
        latents_BCTHW = most_likely_latents(self.pipeline.vae, video_BCNHW)
        given_BCTHW = latents_BCTHW.new_zeros(1, FRAME_STEP, *latents_BCTHW.shape[2:])
        given_BCTHW[:, :, 0] = 1
        return torch.cat([given_BCTHW, latents_BCTHW], dim=1)

    def _decode(self, member: Member) -> Left:
        """The files of the video, which is encoded as it is decoded."""
        request = member.request
        pieces = self.frames(member.states[DENOISE]["latents"])
        first = next(pieces, None)
        if first is None:
            return Left({})
        fps = self.card.default_fps if request.video is None else request.video.fps
        writer = VideoWriter(request.shape.height, request.shape.width, fps)
        for frames in chain([first], pieces):
            writer.add(frames)
        file = writer.finish()
        files = {"video": file.video, "thumbnail": file.thumbnail}
        return Left({name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()})

    def _frames_of_tiles(self, spread_BCTHW: torch.Tensor) -> Iterator[np.ndarray]:
        """A tile is decoded through all frames before the next one is, so that they are kept, as bytes."""
        vae = self.pipeline.vae
        height, width = (side * vae.spatial_compression_ratio for side in spread_BCTHW.shape[-2:])
        video_NHWC = np.empty((0, height, width, 3), np.uint8)
        top = 0
        for strip_BCNHW in self._tiled_decode.strips(spread_BCTHW):
            if not len(video_NHWC):
                video_NHWC = np.empty((strip_BCNHW.shape[2], height, width, 3), np.uint8)
            for start in range(0, len(video_NHWC), FRAME_STEP):
                piece_NHWC = self._pixels(finished(vae, strip_BCNHW[:, :, start : start + FRAME_STEP]))
                video_NHWC[start : start + FRAME_STEP, top : top + piece_NHWC.shape[1]] = piece_NHWC
            top += piece_NHWC.shape[1]
        for start in range(0, len(video_NHWC), FRAME_STEP):
            yield video_NHWC[start : start + FRAME_STEP]

    def _pixels(self, video_BCNHW: torch.Tensor) -> np.ndarray:
        """uint8 (N, H, W, 3), of a video from -1 to 1."""
        image_NCHW = video_BCNHW[0].permute(1, 0, 2, 3)
        image_NCHW = self.pipeline.video_processor.postprocess(image_NCHW, output_type="pt")
        return image_NCHW.permute(0, 2, 3, 1).float().mul(255).round().to(torch.uint8).cpu().numpy()  # type: ignore[no-any-return]


def _loop(branch: Branch) -> WanLoop:
    assert isinstance(branch.loop, WanLoop)
    return branch.loop
