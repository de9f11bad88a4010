"""Writes the bundled profiles of Wan, which are derived from published times and not measured.

`python benchmarks/derive_profiles.py [--check]` writes `src/tetriserve/profile/data/wan*.json` anew, or says whether
they are what it would write.

**One pass at degree 1.** FastVideo publishes denoising times on one H200 with FlashAttention 3 and torch.compile, for
three steps without guidance, one pass each ("FastWan", table 1: 2.64 s of Wan 2.2 5B and 29.5 s of Wan 2.1 14B, both
at 720p). Compute bounds a pass, and of that an H100 has as much as an H200. Other sizes are scaled by arithmetic:
2 * P * L + 4 * L^2 * d * n operations for P parameters and L tokens, in n layers of width d.

**Higher degrees.** T(k) = T(1) * (f + (1 - f) / k). For 14B at 720p, f is fitted to eight H100: Morphic generated 40
steps of two passes in 195.13 s by Ulysses with FlashAttention 3 and without torch.compile, of which FastVideo has 37.87
s for three passes on one GPU; encode and decode are taken off. For other models and sizes f goes with what is exchanged
for each second of a pass, L * d * n / T(1).

**Decode.** Of 14B: SGLang's 2.631 s at 832x480 and 6.912 s at 1280x720, 81 frames, on GPUs of this class. Of 5B:
FastVideo's 16 s from prompt to video of 121 frames, less denoising (2.64 s) and encode. Other sizes go with the pixels
of latent frames. On two GPUs SGLang has 1.8148 s where one takes 2.6314 s (832x480), and 7.6708 s where one takes
13.4314 s (5B, 704x1280, 121 frames); higher degrees follow from these as above.

**Encode** is an assumption, the lower end of what is reported for UMT5-XXL. So are the costs to start and move a task,
which are those of `flux.1-dev-8xh100`: a hand-over of 84 MB (latents and UniPC's history) takes a few milliseconds,
below one percent of a pass.

A step with guidance is two passes: requests of these profiles have stages of two passes (`Scenario.num_passes`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.profile import Profile, Row, save_profile
from tetriserve.profile.bundled import open_profile

DATA = Path(__file__).parents[1] / "src" / "tetriserve" / "profile" / "data"
DEGREES = (1, 2, 4, 8)
FRAME_STEP = 4
ENCODE_S = 0.3
"""Of one prompt."""

EIGHT_GPUS_S, NUM_STEPS_OF_EIGHT, ONE_GPU_3_PASSES_S = 195.13, 40, 37.87
SHORT_STAGES_S = 2 * ENCODE_S + 6.912
"""Taken off `EIGHT_GPUS_S`."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """A size of a model. decode_s: at degree 1; decode_rest: the part that more ranks do not shorten."""

    shape: Shape
    decode_s: float
    decode_rest: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """
    pixels_per_token: of height and of width.
    measured: the shape whose pass takes `pass_s` at degree 1.
    """

    name: str
    file: str
    num_parameters: float
    num_layers: int
    width: int
    pixels_per_token: int
    measured: Shape
    pass_s: float
    videos: Sequence[Video]
    source: str

    def num_tokens(self, shape: Shape) -> int:
        frames = 1 + (shape.frames - 1) // FRAME_STEP
        return frames * (shape.height // self.pixels_per_token) * (shape.width // self.pixels_per_token)

    def num_operations(self, shape: Shape) -> float:
        tokens = self.num_tokens(shape)
        return 2 * self.num_parameters * tokens + 4 * tokens**2 * self.width * self.num_layers

    def alone_s(self, shape: Shape) -> float:
        """Seconds of one pass at degree 1."""
        return self.pass_s * self.num_operations(shape) / self.num_operations(self.measured)

    def exchanged_per_s(self, shape: Shape) -> float:
        """Activations of all layers for each second of a pass at degree 1."""
        return self.num_tokens(shape) * self.width * self.num_layers / self.alone_s(shape)


def amdahl_rest(speedup: float, degree: int) -> float:
    """The part of the work that does not shrink, if `degree` ranks are `speedup` times as fast as one."""
    return (1 / speedup - 1 / degree) / (1 - 1 / degree)


def amdahl_s(alone_s: float, rest: float, degree: int) -> float:
    return alone_s * (rest + (1 - rest) / degree)


DECODE_REST_480P = amdahl_rest(2.6314 / 1.8148, 2)
DECODE_REST_5B = amdahl_rest(13.4314 / 7.6708, 2)
DECODE_5B_S = 16.0 - 2.64 - ENCODE_S

WAN_14B = Model(
    name="Wan2.1-T2V-14B",
    file="wan2.1-14b-8xh100",
    num_parameters=14e9,
    num_layers=40,
    width=5120,
    pixels_per_token=16,
    measured=Shape(720, 1280, 81),
    pass_s=29.5 / 3,
    videos=(
        Video(shape=Shape(480, 832, 49), decode_s=2.631 * 13 / 21, decode_rest=DECODE_REST_480P),
        Video(shape=Shape(480, 832, 81), decode_s=2.631, decode_rest=DECODE_REST_480P),
        Video(shape=Shape(720, 1280, 81), decode_s=6.912, decode_rest=DECODE_REST_480P),
    ),
    source=(
        "a pass of 1280x720x81 at degree 1 from FastVideo's denoising time on one H200 (FlashAttention 3 and "
        "torch.compile, 3 passes in 29.5 s); decode at degree 1 from SGLang's PRs 27875 (832x480x81: 2.631 s; "
        "on two H200 1.815 s) and 18149 (1280x720x81: 6.912 s)"
    ),
)
WAN_5B = Model(
    name="Wan2.2-TI2V-5B",
    file="wan2.2-ti2v-5b-8xh100",
    num_parameters=5e9,
    num_layers=30,
    width=3072,
    pixels_per_token=32,
    measured=Shape(704, 1280, 121),
    pass_s=2.64 / 3,
    videos=(
        Video(
            shape=Shape(480, 832, 81),
            decode_s=DECODE_5B_S * (480 * 832 * 21) / (704 * 1280 * 31),
            decode_rest=DECODE_REST_5B,
        ),
        Video(shape=Shape(704, 1280, 81), decode_s=DECODE_5B_S * 21 / 31, decode_rest=DECODE_REST_5B),
        Video(shape=Shape(704, 1280, 121), decode_s=DECODE_5B_S, decode_rest=DECODE_REST_5B),
    ),
    source=(
        "a pass of 1280x704x121 at degree 1 from FastVideo's denoising time on one H200 (FlashAttention 3 and "
        "torch.compile, 3 passes in 2.64 s); decode at degree 1 from FastVideo's 16 s from prompt to video on one GPU, "
        "on two from SGLang's benchmark of this model (13.43 s, 7.67 s on two GPUs)"
    ),
)
MODELS = (WAN_14B, WAN_5B)


def rest_of(model: Model, shape: Shape) -> float:
    """The part of a pass that does not shrink with the degree."""
    one_gpu_s = 2 * NUM_STEPS_OF_EIGHT * ONE_GPU_3_PASSES_S / 3
    fitted = amdahl_rest(one_gpu_s / (EIGHT_GPUS_S - SHORT_STAGES_S), 8)
    return fitted * model.exchanged_per_s(shape) / WAN_14B.exchanged_per_s(WAN_14B.measured)


def derive(model: Model) -> Profile:
    flux = open_profile("flux.1-dev-8xh100")
    rows = [Row(stage=ENCODE, seconds=ENCODE_S)]
    for video in model.videos:
        shape, rest = video.shape, rest_of(model, video.shape)
        size = {"height": shape.height, "width": shape.width, "frames": shape.frames}
        rows += [
            Row(
                stage=DENOISE,
                **size,
                tokens=model.num_tokens(shape),
                degree=degree,
                seconds=round(amdahl_s(model.alone_s(shape), rest, degree), 4),
            )
            for degree in DEGREES
        ]
        rows += [
            Row(
                stage=DECODE,
                **size,
                degree=degree,
                seconds=round(amdahl_s(video.decode_s, video.decode_rest, degree), 3),
            )
            for degree in DEGREES
        ]
    return Profile(
        model=model.name,
        hardware=flux.hardware,
        execution=Execution("bfloat16"),
        source=(
            f"DERIVED, not measured here (benchmarks/derive_profiles.py): {model.source}; other sizes by the number of "
            "operations of a pass, their decode by pixels of latent frames; higher degrees by Amdahl's law, fitted for "
            "passes to Morphic's 195.13 s of 40 steps of Wan 2.2 A14B on eight H100 with Ulysses. Seconds of denoise "
            "are of ONE pass, and a step with guidance is two passes. Encode (of one prompt) and a millisecond each to "
            "start and to move a task are assumptions. Seconds to form a set of ranks (team_s): published for an NCCL "
            "group by GF-DiT (arXiv 2606.13501)."
        ),
        created="2026-11-30",
        switch_s=flux.switch_s,
        move_s=flux.move_s,
        team_s=flux.team_s,
        frame_step=FRAME_STEP,
        rows=tuple(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs")
    options = parser.parse_args()
    differing = []
    for model in MODELS:
        profile, path = derive(model), DATA / f"{model.file}.json"
        if not options.check:
            save_profile(profile, path)
        elif not is_saved(profile, path):
            differing.append(path.name)
    if differing:
        sys.exit(f"not what this script writes: {', '.join(differing)}")


def is_saved(profile: Profile, path: Path) -> bool:
    """Whether the file is what `save_profile` would write."""
    with TemporaryDirectory() as scratch:
        fresh = Path(scratch) / path.name
        save_profile(profile, fresh)
        return path.exists() and fresh.read_text() == path.read_text()


if __name__ == "__main__":
    main()
