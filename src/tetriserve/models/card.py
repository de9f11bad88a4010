"""What the server must know of a checkpoint before, and without, loading it; the same for every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tetriserve.core.execution import VAE, Execution
from tetriserve.core.request import MAX_SIDE, Shape
from tetriserve.core.stages import DECODE
from tetriserve.models.tiles import Tiles


@dataclass(frozen=True)
class Tolerance:
    """By how much of 255 levels an image may differ from the same request's at degree 1: any subpixel, and the mean.

    Tested with the bundled model under switching schedules (`tests/gloo/test_tolerance.py`). Another model may exceed
    it in half precision, where it is a measurement and no proof.
    """

    max_levels: int
    mean_levels: float


TOLERANCES = {
    "float32": Tolerance(1, 0.01),
    "bfloat16": Tolerance(32, 2.5),
    "float16": Tolerance(10, 0.5),
}
"""By dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """An adapter that the model is served with.

    name: what clients call it.
    file: a safetensors file.
    digest: of its content.
    """

    name: str
    file: Path
    digest: str


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Facts of one checkpoint, as plain values that survive a spawn. The rules of its family: `registry.family_of`.

    name, aliases: what clients call the model; see `is_called`.
    path: the directory that holds `model_index.json`.
    family: a name in `registry.FAMILIES`.
    pipeline_class: of diffusers.
    size_multiple: height and width must divide by it.
    pixels_per_token: pixels that one image token stands for, on each side.
    num_heads: of the transformer's attention; 1 for a model whose steps cannot be divided.
    num_text_tokens: to which texts are padded and at which they are cut: the pipeline's `max_sequence_length`. 0: it
        has none, and neither have requests.
    sizes: the default first.
    guides_by_passes: whether `guidance_scale` above `passes_above` takes a second pass at each step, for the negative
        prompt or an empty text. Otherwise a second pass comes with a negative prompt and `true_cfg_scale` above 1.
    max_side: the longest height or width, in pixels.
    min_images, max_images: pictures that a request brings along.
    min_num_steps: fewest that the schedule allows.
    default_strength: how much of the noise is added to a picture from which a request starts, 0 to 1; None for a model
        whose steps see the pictures beside the latents.
    can_batch: whether requests may share a step.
    has_previews: whether latents on their way can be shown, which takes an adapter with `latents_of`.
    limits: what cannot be done with this model and can with others, a line each.
    fingerprint: changes whenever the architecture does; a profile belongs to one fingerprint.
    stamp: changes whenever a file of the checkpoint does.
    loras: adapters that requests may name.
    key: `Request.model` of what is for this model; empty where no other is served.
    ranks: those of the pool that hold it, ascending; empty: all.
    frame_step: frames that share a latent frame, so that a video has 1 + k * `frame_step` frames; 0: it makes images.
    max_frames: of a video.
    default_fps: frames per second of a video.
    has_boundary: steps below a noise level are made by a second transformer: `VideoOptions.boundary_ratio` and
        `guidance_scale_2` have a meaning.
    has_flow_shift: requests may shift the schedule's noise levels.
    tiles: in which the VAE decodes what is large, where the execution says so; None where ranks cannot share them.
    """

    name: str
    path: Path
    family: str
    pipeline_class: str
    execution: Execution
    size_multiple: int
    pixels_per_token: int
    num_heads: int
    num_text_tokens: int
    default_num_steps: int
    default_guidance_scale: float
    has_guidance: bool
    has_negative_prompt: bool
    sizes: tuple[Shape, ...]
    fingerprint: str
    guides_by_passes: bool = False
    passes_above: float = 1.0
    max_side: int = MAX_SIDE
    min_images: int = 0
    max_images: int = 0
    default_strength: float | None = None
    can_batch: bool = True
    has_previews: bool = True
    limits: tuple[str, ...] = ()
    min_num_steps: int = 1
    aliases: tuple[str, ...] = ()
    stamp: str = ""
    loras: tuple[LoraFile, ...] = ()
    key: str = ""
    ranks: tuple[int, ...] = ()
    frame_step: int = 0
    max_frames: int = 1
    default_fps: float = 16.0
    has_boundary: bool = False
    has_flow_shift: bool = False
    tiles: Tiles | None = None

    @property
    def makes_videos(self) -> bool:
        return self.frame_step > 0

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.execution.dtype]

    @property
    def one_pass_scale(self) -> float:
        """A `guidance_scale` at which each step is one pass, as profiles measure it."""
        return self.passes_above if self.guides_by_passes else self.default_guidance_scale

    def valid_degrees(self, degrees: Sequence[int]) -> tuple[int, ...]:
        """Those of `degrees` at which steps can run: the ranks share the heads evenly, and tokens in any numbers."""
        return tuple(degree for degree in degrees if self.num_heads % degree == 0)

    def short_degrees(self, kind: str, shape: Shape, degrees: Sequence[int]) -> tuple[int, ...]:
        """Those of `degrees` at which a stage without steps can run, of a kind: a decode at as many as it has tiles."""
        num_tiles = 1
        if kind == DECODE and self.tiles is not None and self.execution.tiling == VAE:
            num_tiles = self.tiles.count(shape)
        return tuple(degree for degree in degrees if degree <= num_tiles)

    def is_called(self, name: str) -> bool:
        """Whether clients may write `name`: a served name, the directory's path, or `default`; or an adapter's name,
        which stands for the model with it."""
        own = (self.name, *self.aliases, "default", str(self.path), str(self.path.resolve()))
        return name in own or self.find_lora(name) is not None

    def find_lora(self, name: str) -> LoraFile | None:
        """The adapter that clients call `name`."""
        return next((lora for lora in self.loras if lora.name == name), None)
