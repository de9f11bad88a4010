"""Which pictures a request may bring along, and what follows from them: its size, and the steps that are not made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.request import Shape, Stage
from tetriserve.core.stages import ENCODE_IMAGE
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Guidance
from tetriserve.models.registry import family_of, stages_of
from tetriserve.profile.cost import ProfileCost


@dataclass(frozen=True)
class PictureRules:
    """The rules of one served model; `cost` says what was measured."""

    card: ModelCard
    cost: ProfileCost

    @property
    def max_images(self) -> int:
        """How many pictures may come with a prompt: none if their encoding was not measured."""
        return self.card.max_images if ENCODE_IMAGE in self.cost.profile.stages else 0

    def takes(self, number: int) -> bool:
        """Whether so many pictures may come with a prompt."""
        return self.card.min_images <= number <= self.max_images

    def check_number(self, number: int) -> None:
        """
        Raises:
            InvalidRequest: the model takes fewer pictures, or more.
        """
        name, least, most = self.card.name, self.card.min_images, self.card.max_images
        if number > most == 0:
            raise InvalidRequest(f"image: {name} takes no pictures", "image")
        if not least <= number <= most:
            allowed = f"{most}" if least == most else f"{least} to {most}"
            raise InvalidRequest(f"image: {number} pictures came with the prompt; {name} takes {allowed}", "image")
        if number > self.max_images:
            raise InvalidRequest(
                f"image: the profile of {name} has no times for encoding pictures; measure it again: "
                "tetriserve serve --remeasure",
                "image",
            )

    def shapes_of(self, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """The pictures' sizes, of any that can be encoded.

        Raises: as `check_number`, and InvalidRequest: a picture is too small.
        """
        self.check_number(len(shapes))
        least = self.card.size_multiple
        for shape in shapes:
            if min(shape.height, shape.width) < least:
                raise InvalidRequest(f"image is {shape}; allowed: at least {least} pixels a side", "image")
        return tuple(shapes)

    def size_like(self, images: Sequence[Shape], num_frames: int = 1) -> Shape:
        """The size nearest to the first picture's, of those that are served with `images`; of one frame.

        A picture of too many pixels or too few is first scaled to the most or the fewest, of an output of `num_frames`
        frames. Sizes are as far apart as the logarithms of their heights and widths. There is one size at least: the
        smallest that was measured.
        """
        image, multiple, longest = images[0], self.card.size_multiple, self.longest_side
        profile = self.cost.profile
        seen = sum(each.num_pixels for each in family_of(self.card).condition_shapes(self.card, images))
        smallest, largest = profile.shapes[0], profile.shapes[-1]
        num_cell_pixels = profile.num_latent_pixels(Shape(multiple, multiple, num_frames))
        low = -(-profile.num_latent_pixels(smallest) // num_cell_pixels)
        high = max((profile.num_latent_pixels(largest) - seen) // num_cell_pixels, low)
        num_pixels = min(max(image.num_pixels, low * multiple**2), high * multiple**2)
        scale = math.sqrt(num_pixels / image.num_pixels) / multiple
        wanted_height, wanted_width = image.height * scale, image.width * scale
        sizes = [replace(smallest, frames=1)]
        for height in range(1, longest // multiple + 1):
            narrowest, widest = -(-low // height), min(high // height, longest // multiple)
            if narrowest <= widest:
                near = math.floor(wanted_width), math.ceil(wanted_width)
                widths = {min(max(width, narrowest), widest) for width in near}
                sizes += [Shape(height * multiple, width * multiple) for width in widths]
        if smallest.frames != num_frames and len(sizes) > 1:
            del sizes[0]  # with so many frames it may be too small

        def distance(size: Shape) -> float:
            height, width = size.height / multiple, size.width / multiple
            return math.hypot(math.log(height / wanted_height), math.log(width / wanted_width))

        return min(sizes, key=distance)

    @property
    def longest_side(self) -> int:
        """Of a picture that is drawn."""
        longest = max(max(measured.height, measured.width) for measured in self.cost.profile.shapes)
        return min(2 * longest, self.card.max_side)

    def skipped_steps(self, strength: float | None, num_steps: int, num_images: int) -> int:
        """As diffusers' image-to-image pipelines count (`get_timesteps`); at least one step is made.

        Raises:
            InvalidRequest: `strength` is out of range, or has no meaning.
        """
        default = self.card.default_strength
        if default is None or num_images == 0:
            if strength is not None:
                why = f"{self.card.name} does not start from a picture" if default is None else "no picture came along"
                raise InvalidRequest(f"strength is {strength:g}, but {why}", "strength")
            return 0
        strength = default if strength is None else strength
        if not 0 < strength <= 1:
            raise InvalidRequest(f"strength is {strength:g}; allowed: above 0, at most 1", "strength")
        return min(int(max(num_steps - min(num_steps * strength, num_steps), 0)), num_steps - 1)

    def stages(self, shape: Shape, num_steps: int, guidance: Guidance, images: Sequence[Shape]) -> tuple[Stage, ...]:
        """What a request goes through.

        Raises:
            InvalidRequest: with the pictures its steps are larger than any that was measured.
        """
        stages = stages_of(self.card, shape, num_steps, guidance, images)
        measure = self.cost.profile.num_latent_pixels
        low, high = measure(self.cost.profile.shapes[0]), measure(self.cost.largest)
        for stage in stages:
            if stage.shape is not None and not low <= (num_pixels := measure(stage.shape)) <= high:
                what = "the pictures" if stage.kind == ENCODE_IMAGE else f"size {shape} and the pictures"
                raise InvalidRequest(
                    f"size: {what} that came along make {num_pixels} pixels of a step; measured: {low} to {high}",
                    "size",
                )
        return stages
