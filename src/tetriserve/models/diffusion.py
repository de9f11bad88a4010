"""What the families share that denoise latents: stages, steps, batches. A family adds its own pipeline's parts.

Suffixes of tensor names: B batch (1 of what one request keeps), L text tokens, S image tokens, C channels, D embedding
width, A position axes, N steps, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image

from tetriserve.core.errors import CheckpointError
from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE, INPUT
from tetriserve.models.adapter import Left, Member, Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.loading import held_bytes, load_pipeline, weights_of
from tetriserve.models.parallel import SequenceParallel
from tetriserve.models.schedulers import restore, state_of
from tetriserve.models.tiled_decode import TiledDecode

if TYPE_CHECKING:
    import numpy as np

    from tetriserve.models.team import Team

PROMPT, NEGATIVE = "", "negative_"
"""Passes of a step, by the prefix of their embeddings' names."""
_TEXTS_TO_TELL_APART = ("a red circle", "a tan square")
"""As many letters in each word of one as of the other: a vocabulary of unknown tokens alone makes the same of both."""
_SHORT_TEXT_TOKENS = 16


class DenoiseLoop:
    """One request's steps, with a scheduler of its own.

    inputs: what all its forwards take, besides latents, time and embeddings; see `DiffusionAdapter.inputs`.
    """

    def __init__(
        self, adapter: DiffusionAdapter, request: Request, encoded: Tensors, steps_done: int, left: Tensors
    ) -> None:
        self._adapter = adapter
        self._scheduler, self._timesteps_N = adapter.schedule(request)
        self.request = request
        self.encoded = encoded
        self.inputs = adapter.inputs(request, encoded)
        self.go_to(steps_done, left)

    def go_to(self, steps_done: int, left: Tensors) -> None:
        """Stand before step `steps_done`, whatever steps were made here before.

        left: by the steps before it, of which the scheduler's `history` is read.
        """
        self.steps_done = steps_done
        if self._adapter.has_history:
            self._scheduler, self._timesteps_N = self._adapter.schedule(self.request)
            restore(self._scheduler, left)
        self._scheduler.set_begin_index(self._place)
        self._scheduler._step_index = None  # it begins anew

    def history(self) -> Tensors:
        """What the scheduler keeps for the steps that follow, besides its place."""
        if not self._adapter.has_history or self.is_over:
            return {}
        unused, _ = self._adapter.schedule(self.request)
        return state_of(self._scheduler, unused)

    @property
    def is_over(self) -> bool:
        return self.steps_done == self.request.num_steps

    @property
    def _place(self) -> int:
        """Of the next step in the schedule."""
        return self.request.skipped_steps + self.steps_done

    @property
    def timestep(self) -> torch.Tensor:
        """Of the next step; a scalar."""
        return self._timesteps_N[self._place]

    @property
    def noise_level(self) -> float:
        """Sigma of the flow matching schedule."""
        return float(self._scheduler.sigmas[self._place])

    @torch.no_grad()
    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents after one more step, in the same shape and dtype."""
        [after] = self._adapter.step_together([self], [latents])
        return after

    def advance(self, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The latents after the step for which the model, guided, says `prediction`."""
        timestep = self.timestep
        self.steps_done += 1
        return self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Branch:
    """One request's part of a forward: its latents, of batch 1, for the prompt or the negative prompt."""

    loop: DenoiseLoop
    latents: torch.Tensor
    prefix: str

    def embeds(self, name: str = "prompt_embeds") -> torch.Tensor:
        return self.loop.encoded[self.prefix + name]


class DiffusionAdapter(ABC):
    """A loaded checkpoint. At degree 1 a single request is bit-identical to its pipeline with a CPU generator.

    Everything runs under `no_grad`, not `inference_mode`: what is returned may be written to in place, saved and
    sent through collectives by the caller.

    passes: in the order in which the pipeline makes them.
    joins_passes: the pipeline itself makes both passes of a step in one forward.
    num_template_tokens: that come before a prompt, at most.
    has_history: the scheduler keeps more than its place between steps.
    in_float32: components that do not take the card's dtype.
    """

    passes: ClassVar[tuple[str, str]] = (PROMPT, NEGATIVE)
    joins_passes: ClassVar[bool] = False
    num_template_tokens: ClassVar[int] = 0
    has_history: ClassVar[bool] = False
    in_float32: ClassVar[tuple[str, ...]] = ()

    def __init__(self, card: ModelCard, device: torch.device | str, *, has_text_encoders: bool = True) -> None:
        """
        Args:
            has_text_encoders: False leaves out what encode takes, and encode with it.

        Raises:
            CheckpointError: the checkpoint cannot be loaded, not as its files say, or does not tell texts apart; the
                message is one line.
        """
        self.card = card
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, card.execution.dtype)
        self.pipeline: Any
        self.pipeline, self._adapters = load_pipeline(
            card,
            self.dtype,
            self.device,
            self.components,
            has_text_encoders=has_text_encoders,
            in_float32=self.in_float32,
        )
        self._sequence_parallel = self.sequence_parallel()
        self._tiled_decode = TiledDecode(self.pipeline.vae)
        if has_text_encoders:
            self._check_texts()

    # What a family says.

    def components(self) -> dict[str, Any]:
        """Parts of the pipeline, by name, that the family loads itself."""
        return {}

    @abstractmethod
    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        """The embeddings of one text of at most `length` tokens, by the name that `Branch.embeds` finds them under."""

    def encode_beside(self, prompt: str, length: int, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`encode_prompt` of a text that came with pictures (H, W, 3), uint8; here the encoders do not read them."""
        return self.encode_prompt(prompt, length)

    @abstractmethod
    def text_parts(self, embeds: Tensors) -> Mapping[str, torch.Tensor]:
        """What each text encoder made of a text, by its component's name."""

    @abstractmethod
    def count_text(self, request: Request) -> TextCount:
        """How many tokens the prompt has, those that mark its ends included, and whether an encoder cuts it."""

    @abstractmethod
    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        """What the request's latents begin as, but for a picture."""

    @torch.no_grad()
    def encode_images(self, request: Request, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of pictures (H, W, 3), uint8, what the steps need.

        Here `initial_latents`: those of the only picture, with noise, as the family's image-to-image pipeline has them.
        """
        [image] = images
        generator, shape = self.generator(request), request.shape
        picture = Image.fromarray(image.cpu().numpy())
        image_BCHW = self.pipeline.image_processor.preprocess(picture, height=shape.height, width=shape.width)
        clean = self.encode_pixels(image_BCHW.to(self.device, self.dtype), generator)
        scheduler, timesteps_N = self.schedule(request)
        scheduler.set_begin_index(request.skipped_steps)
        first_B = timesteps_N[request.skipped_steps][None]
        return {"initial_latents": scheduler.scale_noise(clean, first_B, self.noise(request, generator))}

    @abstractmethod
    def set_timesteps(self, scheduler: Any, request: Request) -> torch.Tensor:
        """Prepare a fresh scheduler for the request; returns the timesteps (N,), of its `num_schedule_steps`."""

    def inputs(self, request: Request, encoded: Tensors) -> Any:
        """What all forwards of a request take, besides latents, time and embeddings."""
        return None

    def kind(self, branch: Branch) -> Hashable:
        """Only branches of one kind go through one forward."""
        return branch.latents.shape, branch.embeds().shape

    @abstractmethod
    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        """What the transformer says of each branch, in one forward, in the form of its latents; all are of one kind."""

    def guide(self, loop: DenoiseLoop, prediction: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
        """What the scheduler is given, of the passes' predictions."""
        if negative is None:
            return prediction
        return negative + loop.request.true_cfg_scale * (prediction - negative)

    @abstractmethod
    def decode_latents(self, latents: torch.Tensor, shape: Shape) -> torch.Tensor | None:
        """The image (B, 3, H, W) as the VAE draws it, -1 to 1; None where another member of the team leads."""

    @abstractmethod
    def encode_pixels(self, image_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents without noise, of an image (B, 3, H, W) from -1 to 1.

        generator: draws them from the distribution that the VAE gives; without it they are the most likely.
        """

    def sequence_parallel(self) -> SequenceParallel:
        """How the transformer's steps are divided among ranks."""
        return SequenceParallel(self.pipeline.transformer)

    # What follows for all.

    @property
    def weights(self) -> list[torch.Tensor]:
        """See `Adapter.weights`."""
        return weights_of(self.pipeline)

    def held_bytes(self) -> dict[str, int]:
        """See `Adapter.held_bytes`."""
        return held_bytes(self.pipeline)

    def run(
        self,
        stage: str,
        members: Sequence[Member],
        num_steps: int,
        on_step: Callable[[], None],
        *,
        joins_passes: bool = False,
    ) -> list[Left]:
        """See `Adapter.run`. Latents come with their `noise_level`; decode leaves `pixels` (H, W, 3) on the leader."""
        if stage == ENCODE:
            return [
                Left(self.encode(one.request, _pictures(one)), text=self.count_text(one.request)) for one in members
            ]
        if stage == ENCODE_IMAGE:
            return [Left(self.encode_images(one.request, _pictures(one))) for one in members]
        if stage == DENOISE:
            return self._denoise(members, num_steps, on_step, joins_passes)
        if stage == DECODE:
            self._tiled_decode.on_part = on_step
            return [self._decode(one) for one in members]
        raise ValueError(f"this model has no stage {stage!r}")

    @torch.no_grad()
    def encode(self, request: Request, images: Sequence[torch.Tensor] = ()) -> Tensors:
        """The embeddings of the prompt, and with two passes those of the negative prompt as `negative_...`.

        images: pictures that came with it, (H, W, 3) uint8, for text encoders that see.
        """
        self._adapters.activate(request.lora)
        length = request.max_sequence_length or self.card.num_text_tokens
        embeds = self.encode_beside(request.prompt, length, images)
        if request.stepped.num_passes == 2:
            negative = self.encode_beside(request.negative_prompt or "", length, images)
            embeds |= {NEGATIVE + name: tensor for name, tensor in negative.items()}
        return embeds

    @torch.no_grad()
    def initial_latents(self, request: Request) -> torch.Tensor:
        """Noise, from the request's seed alone."""
        return self.noise(request, self.generator(request))

    def schedule(self, request: Request) -> tuple[Any, torch.Tensor]:
        """A scheduler for the request alone, and its timesteps (N,)."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        return scheduler, self.set_timesteps(scheduler, request)

    def denoise_loop(
        self, request: Request, encoded: Tensors, steps_done: int, left: Tensors = MappingProxyType({})
    ) -> DenoiseLoop:
        """The request's loop, standing before step `steps_done` (0 <= steps_done <= num_steps).

        left: by the steps before that.
        """
        return DenoiseLoop(self, request, encoded, steps_done, left)

    @torch.no_grad()
    def step_together(
        self, loops: Sequence[DenoiseLoop], latents: Sequence[torch.Tensor], *, joins_passes: bool = False
    ) -> list[torch.Tensor]:
        """One step of each loop, all in one forward for each pass where they are alike; with `joins_passes`, in one.

        They may stand at different steps, but are of one shape, one number of passes and one adapter.
        """
        self._adapters.activate(loops[0].request.lora)
        used = self.passes if loops[0].request.stepped.num_passes == 2 else (PROMPT,)
        by_pass = [[Branch(loop, each, prefix) for loop, each in zip(loops, latents, strict=True)] for prefix in used]
        predictions: dict[str, Sequence[torch.Tensor]]
        if joins_passes or self.joins_passes:
            joined = self._forward([branch for branches in by_pass for branch in branches])
            parts = [joined[start : start + len(loops)] for start in range(0, len(joined), len(loops))]
            predictions = dict(zip(used, parts, strict=True))
        else:
            predictions = {prefix: self._forward(branches) for prefix, branches in zip(used, by_pass, strict=True)}
        negatives: Sequence[torch.Tensor | None] = predictions.get(NEGATIVE) or [None] * len(loops)
        return [
            loop.advance(before, self.guide(loop, prediction, negative))
            for loop, before, prediction, negative in zip(loops, latents, predictions[PROMPT], negatives, strict=True)
        ]

    @torch.no_grad()
    def decode(self, request: Request, latents: torch.Tensor) -> np.ndarray | None:
        """Pixels (H, W, 3), uint8, exactly those of the pipeline's PIL image; None where another member leads."""
        image_BCHW = self.decode_latents(latents, request.shape)
        if image_BCHW is None:
            return None
        [image_CHW] = self.pipeline.image_processor.postprocess(image_BCHW, output_type="pt")
        # As numpy would, but on the device, so that only bytes are copied.
        return image_CHW.permute(1, 2, 0).float().mul(255).round().to(torch.uint8).cpu().numpy()  # type: ignore[no-any-return]

    @torch.no_grad()
    def latents_of(self, pixels: np.ndarray) -> torch.Tensor:
        """Latents without noise, of pixels (H, W, 3), uint8."""
        image_HWC = torch.from_numpy(pixels).to(torch.float32) / 255
        image_BCHW = image_HWC.permute(2, 0, 1)[None] * 2 - 1
        return self.encode_pixels(image_BCHW.to(self.device, self.dtype))

    def use_team(self, team: Team | None) -> None:
        """Divide the sequence, and tiles of a decode, among `team` from the next step on; None is the bare model."""
        self._sequence_parallel.use(team)
        self._tiled_decode.use(team)

    def generator(self, request: Request) -> torch.Generator:
        """As it stands before the request's first draw."""
        return torch.Generator("cpu").manual_seed(request.seed)

    def _forward(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """By as many forwards as there are kinds of branches."""
        kinds: dict[Hashable, list[int]] = {}
        for index, branch in enumerate(branches):
            kinds.setdefault(self.kind(branch), []).append(index)
        results: dict[int, torch.Tensor] = {}
        for indices in kinds.values():
            results |= dict(zip(indices, self.forward([branches[index] for index in indices]), strict=True))
        return [results[index] for index in range(len(branches))]

    def _denoise(
        self, members: Sequence[Member], num_steps: int, on_step: Callable[[], None], joins_passes: bool
    ) -> list[Left]:
        loops = [self._loop_of(member) for member in members]
        latents = [self._latents_of(one) for one in members]
        for _ in range(num_steps):
            latents = self.step_together(loops, latents, joins_passes=joins_passes)
            on_step()
        lefts = []
        for member, loop, after in zip(members, loops, latents, strict=True):
            member.memo["loop"] = loop
            tensors = {"latents": after, "noise_level": torch.tensor(loop.noise_level), **loop.history()}
            lefts.append(Left(tensors, num_steps, is_stage_over=loop.is_over))
        return lefts

    def _latents_of(self, member: Member) -> torch.Tensor:
        if member.steps_done:
            return member.states[DENOISE]["latents"]
        initial = _encoded(member).get("initial_latents")
        return self.initial_latents(member.request) if initial is None else initial

    def _loop_of(self, member: Member) -> DenoiseLoop:
        loop: DenoiseLoop | None = member.memo.get("loop")
        left = member.states.get(DENOISE, {}) if member.steps_done else {}
        if loop is None or loop.request != member.request:
            return self.denoise_loop(member.request, _encoded(member), member.steps_done, left)
        loop.go_to(member.steps_done, left)  # it may have stayed behind, or stand where a task failed
        return loop

    def _decode(self, member: Member) -> Left:
        pixels = self.decode(member.request, member.states[DENOISE]["latents"])
        return Left({} if pixels is None else {"pixels": torch.from_numpy(pixels)})

    @torch.no_grad()
    def _check_texts(self) -> None:
        """That all tokenizers and encoders tell two texts of equal length apart.

        Raises:
            CheckpointError: a vocabulary is empty or another model's, or an encoder's weights are void.
        """
        length = min(self.num_template_tokens + _SHORT_TEXT_TOKENS, self.card.num_text_tokens)
        components = self.pipeline.components
        encoders = [name for name in components if name.startswith("text_encoder") and components[name] is not None]
        for encoder in encoders:
            tokenizer = encoder.replace("text_encoder", "tokenizer")
            num_tokens, config = len(getattr(self.pipeline, tokenizer)), getattr(self.pipeline, encoder).config
            if num_tokens > (num_known := config.get_text_config().vocab_size):
                raise CheckpointError(
                    f"{self.card.path / tokenizer} has {num_tokens} tokens, but "
                    f"{encoder} knows {num_known}; they are of different checkpoints"
                )
        first, second = (self.text_parts(self.encode_prompt(text, length)) for text in _TEXTS_TO_TELL_APART)
        for encoder in encoders:
            tokenizer = encoder.replace("text_encoder", "tokenizer")
            if first[encoder].shape == second[encoder].shape:
                distance = (first[encoder].float() - second[encoder].float()).abs().max().item()
                if 0 < distance < float("inf"):
                    continue
            elif first[encoder].isfinite().all() and second[encoder].isfinite().all():
                continue
            raise CheckpointError(
                f"{self.card.path}: {tokenizer} and {encoder} do not tell "
                f"{' and '.join(map(repr, _TEXTS_TO_TELL_APART))} apart; download them again"
            )


def _encoded(member: Member) -> Tensors:
    """What its prompt and its pictures have become."""
    return {**member.states[ENCODE], **member.states.get(ENCODE_IMAGE, {})}


def _pictures(member: Member) -> list[torch.Tensor]:
    """Those that came with the request, (H, W, 3), uint8."""
    pictures = member.states.get(INPUT, {})
    return [pictures[str(number)] for number in range(len(pictures))]


def num_text_tokens(tokenizer: Any, text: str) -> int:
    """Those that mark its ends included. The tokenizer's warning of long texts, which quotes none, is left out."""
    return len(tokenizer(text, verbose=False).input_ids)


def drawn(distribution: Any, generator: torch.Generator | None) -> torch.Tensor:
    """Latents of a VAE's distribution; see `DiffusionAdapter.encode_pixels`."""
    latents: torch.Tensor = distribution.mode() if generator is None else distribution.sample(generator)
    return latents
