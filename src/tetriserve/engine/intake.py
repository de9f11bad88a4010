"""From what a client wrote to a `Request`: defaults filled in, every mistake named."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.plan import CostModel, State
from tetriserve.core.request import MP4, RAW_PIXELS, Lora, Request, Shape
from tetriserve.engine.picture_rules import PictureRules
from tetriserve.engine.pictures import InputPicture
from tetriserve.engine.video_rules import VideoRules, VideoWish
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Guidance
from tetriserve.models.registry import family_of
from tetriserve.profile.cost import ProfileCost
from tetriserve.workload.slo import MultipleRule

MAX_SEED = 2**63 - 1
MAX_SLO_S = 24 * 3600.0
MAX_PRIORITY = 1_000_000
MAX_LORA_SCALE = 10.0
DEFAULT_TRUE_CFG_SCALE = 4.0
_AUTO = "auto"
"""A size that leaves the choice to the server, as none does."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
"""Files of the tensor store begin with it, and what follows begins with a dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a client may say about one image; None leaves the choice to the server.

    `slo_s` is the deadline relative to arrival, in seconds. `request_id` is unique among unfinished requests: 1 to 128
    letters and digits of ASCII, `-` and `_`. `images` come with the prompt; where the picture starts from one,
    `strength` is how much of the noise is added to it, above 0 and at most 1. `lora` names an adapter that the server
    has loaded; a text is its name, at scale 1. `model` is a name of one that is served; None is the first that makes
    what is asked for. `video` is there where a video is asked for.
    """

    prompt: str = field(repr=False)
    size: str | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = field(default=None, repr=False)
    true_cfg_scale: float | None = None
    slo_s: float | None = None
    priority: int = 0
    reject_infeasible: bool = False
    request_id: str | None = None
    max_sequence_length: int | None = None
    degrees: tuple[int, ...] | None = None
    images: tuple[InputPicture, ...] = ()
    strength: float | None = None
    lora: Lora | str | None = None
    model: str | None = None
    video: VideoWish | None = None

    @property
    def is_video(self) -> bool:
        return self.video is not None


@dataclass(frozen=True, kw_only=True)
class Intake:
    """The rules of admission for one served model.

    cost: which shapes and degrees there are. Its times are those of the start: `request` takes the present ones.
    max_degree: the widest that the policy ever gives to a request; None if the shape alone limits it.
    """

    card: ModelCard
    cost: ProfileCost
    default_slo_scale: float = 3.0
    max_degree: int | None = None
    max_steps: int = 200
    max_prompt_chars: int = 8000

    def request(self, generation: Generation, *, request_id: str, seed: int, now: float, cost: CostModel) -> Request:
        """The request that `generation` stands for, arriving at `now`.

        `request_id` and `seed` are used where the client named none. `cost`, as corrected by now, gives the deadline
        where the client named none: a profile may have been measured under another load.

        Raises:
            InvalidRequest: a value is out of range; `param` is the field's name in `Generation`.
        """
        pictures, card, wish = self.pictures, self.card, generation.video
        self.videos.check_kind(is_video=wish is not None)
        images = pictures.shapes_of([image.shape for image in generation.images])
        shape = self._shape(generation.size, images) if wish is None else self._video_shape(generation, wish, images)
        least, default = card.min_num_steps, card.default_num_steps
        num_steps = int(_in_range("num_steps", generation.num_steps, default, least, self.max_steps))
        skipped_steps = pictures.skipped_steps(generation.strength, num_steps, len(images))
        guidance = self._guidance(generation)
        degrees = self._degrees(generation.degrees, shape)
        request = Request(
            request_id=request_id if generation.request_id is None else _checked_id(generation.request_id),
            prompt=self._short_enough("prompt", generation.prompt),
            shape=shape,
            stages=pictures.stages(shape, num_steps - skipped_steps, guidance, images),
            seed=int(_in_range("seed", generation.seed, seed, 0, MAX_SEED)),
            arrival_s=now,
            deadline_s=math.inf,
            guidance_scale=guidance.scale,
            negative_prompt=guidance.negative_prompt,
            true_cfg_scale=guidance.true_cfg_scale,
            priority=int(_in_range("priority", generation.priority, 0, -MAX_PRIORITY, MAX_PRIORITY)),
            max_sequence_length=self._text_length(generation.max_sequence_length),
            degrees=generation.degrees and degrees,
            skipped_steps=skipped_steps,
            images=images,
            lora=self._lora(generation.lora),
            model=card.key,
            media_type=RAW_PIXELS if wish is None else MP4,
            video=None if wish is None else self.videos.options(wish),
        )
        slo_s = generation.slo_s
        if slo_s is None:
            slo_s = min(MultipleRule(self.default_slo_scale, cost).slo_s(request), MAX_SLO_S)
        if not 0 < slo_s <= MAX_SLO_S:
            raise InvalidRequest(f"slo_s is {slo_s:g}; allowed: above 0, at most {MAX_SLO_S:g}", "slo_s")
        return replace(request, deadline_s=now + slo_s)

    def _shape(self, size: str | None, images: Sequence[Shape] = ()) -> Shape:
        """Of an image that is made with `images`."""
        if size is None or size == _AUTO:
            return self.pictures.size_like(images) if images else self.sizes[0]
        shape = self._parsed(size)
        tokens, low, high = (
            family_of(self.card).num_tokens(self.card, each) for each in (shape, self.shapes[0], self.largest)
        )
        if not low <= tokens <= high:
            raise InvalidRequest(
                f"size {size!r} has {shape.num_pixels} pixels; allowed: {self.shapes[0].num_pixels} "
                f"({self.shapes[0]}) to {self.largest.num_pixels} ({self.largest})",
                "size",
            )
        self._check_sides(shape, size)
        return shape

    def _video_shape(self, generation: Generation, wish: VideoWish, images: Sequence[Shape]) -> Shape:
        size = None if generation.size == _AUTO else generation.size
        sized = None if size is None else self._parsed(size)
        num_frames = self.videos.num_frames(wish, sized)
        if sized is None:
            sized = self.pictures.size_like(images, num_frames) if images else self.sizes[0]
        shape = replace(sized, frames=num_frames)
        self.videos.check_measured(shape, wish, size)
        if size is not None:
            self._check_sides(shape, size)
        return shape

    def _parsed(self, size: str) -> Shape:
        try:
            shape = Shape.parse(size)
        except ValueError as error:
            raise InvalidRequest(str(error), "size") from error
        multiple = self.card.size_multiple
        if shape.height % multiple or shape.width % multiple:
            raise InvalidRequest(f"size {size!r}: width and height must be multiples of {multiple}", "size")
        return shape

    def _check_sides(self, shape: Shape, size: str) -> None:
        if max(shape.height, shape.width) > (most := self.pictures.longest_side):
            raise InvalidRequest(f"size {size!r}: no side may be longer than {most}", "size")

    @property
    def pictures(self) -> PictureRules:
        """What pictures may come along."""
        return PictureRules(self.card, self.cost)

    @property
    def videos(self) -> VideoRules:
        """What may be asked of a video."""
        return VideoRules(self.card, self.cost)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.cost.profile.shapes

    @property
    def largest(self) -> Shape:
        """Of as many pixels as a request may ask for."""
        return self.cost.largest

    @property
    def sizes(self) -> tuple[Shape, ...]:
        """The model's own sizes that the profile covers, then the measured ones; the first is the default."""
        num_pixels = self.cost.profile.num_latent_pixels
        low, high = num_pixels(self.shapes[0]), num_pixels(self.shapes[-1])
        own = [shape for shape in self.card.sizes if low <= num_pixels(shape) <= high]
        return tuple(dict.fromkeys((*own, *self.shapes)))

    def _degrees(self, wanted: Sequence[int] | None, shape: Shape) -> tuple[int, ...]:
        """The degrees that the request's steps may run at, ascending."""
        served = tuple(self.cost.profiled_step_times(shape))
        if wanted is None:
            return served
        usable = [degree for degree in served if self.max_degree is None or degree <= self.max_degree]
        refused = [degree for degree in wanted if degree not in usable]
        if refused or not wanted:
            allowed = f"allowed for {shape}: one or more of {', '.join(map(str, usable or served))}"
            raise InvalidRequest(f"degrees is {list(wanted)[:8]}; {allowed}", "degrees")
        return tuple(degree for degree in served if degree in wanted)

    def _lora(self, wanted: Lora | str | None) -> Lora | None:
        if wanted is None:
            return None
        if isinstance(wanted, str):
            wanted = Lora(wanted)
        served = self.card.find_lora(wanted.name)
        if served is None:
            names = ", ".join(lora.name for lora in self.card.loras) or "none"
            raise InvalidRequest(f"lora {wanted.name[:200]!r} is not served; served: {names}", "lora")
        low, high = -MAX_LORA_SCALE, MAX_LORA_SCALE
        if not low <= wanted.scale <= high:
            raise InvalidRequest(f"lora has scale {wanted.scale}; allowed: {low:g} to {high:g}", "lora")
        return Lora(served.name, float(wanted.scale), served.digest)

    def serves(self, lora: Lora | None) -> bool:
        """Whether the model is still served with the adapter that a request was accepted with."""
        served = None if lora is None else self.card.find_lora(lora.name)
        return lora is None or (served is not None and served.digest == lora.digest)

    def _text_length(self, length: int | None) -> int | None:
        longest = self.card.num_text_tokens
        if length is not None and longest == 0:
            raise InvalidRequest(f"{self.card.name} takes no max_sequence_length", "max_sequence_length")
        if length is not None and not 1 <= length <= longest:
            raise InvalidRequest(f"max_sequence_length is {length}; allowed: 1 to {longest}", "max_sequence_length")
        return length

    def _short_enough(self, param: str, text: str) -> str:
        if len(text) > self.max_prompt_chars:
            raise InvalidRequest(f"{param} has {len(text)} characters; allowed: at most {self.max_prompt_chars}", param)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{param} holds half of a surrogate pair at character {error.start}", param) from None
        return text

    def _guidance(self, generation: Generation) -> Guidance:
        """Guidance by a negative prompt takes one, and a scale above 1. A scale up to 1 turns it off."""
        card, negative, scale = self.card, generation.negative_prompt, generation.true_cfg_scale
        strength = _in_range("guidance_scale", generation.guidance_scale, card.default_guidance_scale, 0.0, 100.0)
        if negative is None and (scale is None or 0 <= scale <= 1):
            return Guidance(strength)
        if negative is not None and not card.has_negative_prompt:
            raise InvalidRequest(f"{card.name} has no negative prompt", "negative_prompt")
        if scale is not None and (card.guides_by_passes or not card.has_negative_prompt):
            allowed = "guidance_scale" if card.guides_by_passes or card.has_guidance else "no scale of guidance"
            raise InvalidRequest(f"{card.name} takes {allowed}, not true_cfg_scale", "true_cfg_scale")
        if negative is None:
            raise InvalidRequest("true_cfg_scale above 1 needs a negative_prompt", "true_cfg_scale")
        negative = self._short_enough("negative_prompt", negative)
        if card.guides_by_passes:
            return Guidance(strength, negative)
        return Guidance(strength, negative, _in_range("true_cfg_scale", scale, DEFAULT_TRUE_CFG_SCALE, 0.0, 100.0))


def check_ids(requests: Sequence[Request], state: State, others: Collection[str] = ()) -> None:
    """`others`: ids of requests that the controller knows no more, and that are not over.

    Raises:
        InvalidRequest: one of `requests`, which are not admitted, has the id of another unfinished one.
    """
    taken = {trajectory.request_id for trajectory in state.trajectories}
    taken |= state.flights.keys()  # left by their clients
    taken.update(others)
    for request in requests:
        if request.request_id in taken:
            raise InvalidRequest(f"request_id {request.request_id!r} is that of an unfinished request", "request_id")
        taken.add(request.request_id)


def _checked_id(request_id: str) -> str:
    if not _ID.fullmatch(request_id):
        allowed = "allowed: 1 to 128 of A-Z, a-z, 0-9, - and _"
        raise InvalidRequest(f"request_id is {request_id[:200]!r}; {allowed}", "request_id")
    return request_id


def _in_range(param: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidRequest(f"{param} is {value}; allowed: {low} to {high}", param)
    return value
