"""Any pipeline that makes a picture or a video of a text: each request is a call of it, in a thread of its own, which
pauses between tasks.

What it cannot do: `facts.LIMITS`, `facts.VIDEO_LIMITS`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tetriserve.core.errors import CheckpointError, ConfigError
from tetriserve.core.execution import DEFAULT
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.models.adapter import Left, Member, Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.files import read_json
from tetriserve.models.generic.call import PipelineCall, fps_of
from tetriserve.models.generic.course import denoisers_of
from tetriserve.models.generic.selftest import problem_of
from tetriserve.models.loading import held_bytes, load_pipeline, weights_of
from tetriserve.models.team import Team
from tetriserve.models.video_file import VideoWriter, check_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_CALLS = 16
"""That pause at once on a rank. Each has a thread, and tensors that the rank's limit on states does not count."""


class GenericAdapter:
    """A loaded checkpoint. Its pictures or frames are the pipeline's own bit for bit, wherever steps were made."""

    def __init__(self, card: ModelCard, device: torch.device | str, *, has_text_encoders: bool = True) -> None:
        """
        Raises:
            CheckpointError: the checkpoint cannot be loaded, or fails the self-test; the message is one line.
            ConfigError: the pipeline cannot run as the card's execution says, or is to run without text encoders, or
                nothing is installed that encodes its videos.
        """
        if not has_text_encoders:
            raise ConfigError(
                "--encoder-ranks leaves out text encoders, but --adapter generic needs them on every rank"
            )
        self.card = card
        self.device = torch.device(device)
        _check_execution(card)
        if card.makes_videos:
            check_encoder()
        dtype: torch.dtype = getattr(torch, card.execution.dtype)
        self.pipeline, _ = load_pipeline(card, dtype, self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        _check_attention(card, self.pipeline)
        self._paused: list[weakref.ref[PipelineCall]] = []
        if problem := problem_of(self.pipeline, card, self.device):
            raise CheckpointError(
                f"{card.path}: {card.pipeline_class} fails the self-test of --adapter generic: {problem}"
            )

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
        """See `Adapter.run`. Members come one after the other.

        Decode leaves `pixels` (H, W, 3), or the files `video` and `thumbnail`.
        """
        lefts = []
        for member in members:
            call = self._call(member, stage)
            before_s = call.cpu_s
            try:
                left = self._advance(call, stage, num_steps, on_step)
            except BaseException:
                call.release()
                raise
            is_over = stage != DENOISE or call.steps_done == member.request.num_steps
            made = num_steps if stage == DENOISE else 0
            self._limit_calls(call)
            lefts.append(Left(left, made, is_stage_over=is_over, cpu_s=call.cpu_s - before_s))
        return lefts

    def use_team(self, team: Team | None) -> None:
        """See `Adapter.use_team`: there is no degree but 1."""
        assert team is None, "the card has one head"

    def latents_of(self, pixels: np.ndarray) -> torch.Tensor:
        """
        Raises:
            ValueError: always; which latents a pipeline makes of pixels, only its own code knows.
        """
        raise ValueError(f"{self.card.pipeline_class} has no previews with --adapter generic")

    def _call(self, member: Member, stage: str) -> PipelineCall:
        """The request's call where it pauses on this rank before this task; else one that begins or goes on there."""
        request = member.request
        steps_done = {ENCODE: 0, DENOISE: member.steps_done, DECODE: request.num_steps}.get(stage, 0)
        call: PipelineCall | None = member.memo.pop("call", None)
        if call is None or not call.is_before(stage, steps_done, request):
            if call is not None:
                call.release()
            call = PipelineCall(
                self.pipeline,
                self.card,
                request,
                self.device,
                encoded=member.states.get(ENCODE) if stage != ENCODE else None,
                stepped=member.states.get(DENOISE),
                steps_done=steps_done,
            )
        member.memo["call"] = call
        return call

    def _advance(self, call: PipelineCall, stage: str, num_steps: int, on_step: Callable[[], None]) -> Tensors:
        """What the stage leaves of the call's request."""
        if stage == ENCODE:
            return call.encode()
        if stage == DENOISE:
            for _ in range(num_steps):
                call.step()
                on_step()
            return call.stepped_state()
        if stage == DECODE:
            return self._video(call) if self.card.makes_videos else {"pixels": _pixels(call.pictures()[0])}
        raise ValueError(f"this model has no stage {stage!r}")

    def _video(self, call: PipelineCall) -> Tensors:
        shape = call.request.shape
        pictures = call.pictures()  # before a file is begun: it may raise
        writer = VideoWriter(shape.height, shape.width, fps_of(self.card, call.request))
        for picture in pictures:
            writer.add(_pixels(picture)[None].numpy())
        file = writer.finish()
        return {"video": _bytes(file.video), "thumbnail": _bytes(file.thumbnail)}

    def _limit_calls(self, last: PipelineCall) -> None:
        """Release those that were used least recently; they can go on as they would at another rank."""
        paused = [other for each in self._paused if (other := each()) is not None and other is not last]
        for other in paused[: -(_MAX_CALLS - 1)]:
            other.release()
        self._paused = [weakref.ref(each) for each in (*paused[-(_MAX_CALLS - 1) :], last)]


def _pixels(picture: Image) -> torch.Tensor:
    """(H, W, 3), uint8."""
    return torch.from_numpy(np.array(picture.convert("RGB")))


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _check_execution(card: ModelCard) -> None:
    """That what is asked for of a transformer finds one. Raises ConfigError."""
    index, execution = read_json(card.path / "model_index.json"), card.execution
    for name in ("attention", "compile", "quantization"):
        value = getattr(execution, name)
        if value != DEFAULT and index.get("transformer") in (None, [None, None]):
            raise ConfigError(
                f"{name} is {value!r}, which takes a transformer, but {card.pipeline_class} has none; "
                f"allowed: {DEFAULT}"
            )


def _check_attention(card: ModelCard, pipeline: Any) -> None:
    """That the backend which was asked for is used: some processors know only one, whatever diffusers is told."""
    if card.execution.attention == DEFAULT:
        return
    parts = [each for name in denoisers_of(pipeline) for each in getattr(pipeline, name).modules()]
    processors = [processor for each in parts if (processor := getattr(each, "processor", None)) is not None]
    fixed = next((each for each in processors if getattr(each, "_attention_backend", None) is None), None)
    if fixed is not None or not processors:
        what = "the model" if fixed is None else type(fixed).__name__
        raise ConfigError(
            f"attention is {card.execution.attention!r}, but {what} of {card.pipeline_class} has no choice of it; "
            f"allowed: {DEFAULT}"
        )
