"""The command line of the training package: one command for each part, in the order in which they are run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from training.learner import Schedule

_Number = TypeVar("_Number", int, float)

# By (height, width) in pixels.
_PICTURES = {(256, 256): 24_000, (512, 512): 16_000, (1024, 1024): 2_500, (256, 384): 3_000, (384, 256): 3_000}
_SHARES = {(256, 256): 0.3, (512, 512): 0.44, (1024, 1024): 0.16, (256, 384): 0.05, (384, 256): 0.05}

DESCRIPTION = """\
Train the bundled model. Every command continues what it finds in --folder.

  1. vae        learn to compress drawings
  2. latents    compress drawings, once (may go on while 4 runs)
  3. text       learn to read captions
  4. dit        learn to denoise the latents of 2 from what 3 reads
     hear       once, between two runs of 4: let a head of it hear what the noise says
  5. export     write a FluxPipeline directory, for `tetriserve evaluate` and `tetriserve serve`

  restore       checkpoints from such a directory, to go on from there; in place of 1, 3 and hear

A run with --decay 0 keeps its learning rate and can be continued at will; a last run with --decay 1 lets it fall to
zero, which is when the result is best. `torchrun --nproc-per-node N -m training ...` trains with N processes.
"""


def main() -> None:
    arguments = _parse()
    try:
        _run(arguments)
    except (FileNotFoundError, ValueError) as error:
        print(f"training: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: argparse.Namespace) -> None:
    # Idle threads that spin cost more than they save when a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    folder: Path = arguments.folder
    vae, text, dit = (folder / f"{name}.pt" for name in ("vae", "text", "dit"))
    latents, pipeline = folder / "latents", folder / "pipeline"
    match arguments.command:
        case "vae":
            from training.vae import train_vae

            if latents.exists() and not arguments.decoder_only:
                raise ValueError(
                    f"{latents} was made by the present encoder: keep it with --decoder-only, or remove it"
                )
            train_vae(
                vae,
                _schedule(arguments),
                num_pixels=arguments.pixels,
                decoder_only=arguments.decoder_only,
                num_workers=arguments.workers,
                device=device,
            )
        case "latents":
            from training.latents import store_latents
            from training.vae import load_vae

            encoder = load_vae(vae, device)
            for size, count in arguments.count:
                store_latents(latents, encoder, *size, num_pictures=count, num_workers=arguments.workers)
        case "text":
            from training.text import train_text

            train_text(text, _schedule(arguments), batch=arguments.batch, device=device)
        case "dit":
            from training.dit import train_dit

            train_dit(
                dit,
                text,
                latents,
                _schedule(arguments),
                shares=dict(arguments.share),
                batch=arguments.batch,
                guidance=arguments.guidance,
                device=device,
                is_compiled=arguments.compile,
            )
        case "hear":
            from training.dit import let_hear

            print(f"{dit}: head {let_hear(dit, latents)} of the first block hears the marks")
        case "restore":
            from training.export import restore_checkpoints

            if existing := [path for path in (vae, text, dit) if path.exists()]:
                raise ValueError(f"{existing[0]} exists: remove it, or name another --folder")
            restore_checkpoints(arguments.directory, vae, text, dit)
        case "export":
            from training.export import export_pipeline, make_pipeline

            num_bytes = export_pipeline(make_pipeline(vae, dit), arguments.to or pipeline)
            print(f"{arguments.to or pipeline}: {num_bytes / 1e6:.1f} MB of weights")


def _parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m training", description=DESCRIPTION, formatter_class=formatter)
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="checkpoints and latents")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures; 0 draws in this one")
    commands = parser.add_subparsers(dest="command", required=True)

    vae = commands.add_parser("vae")
    _add_schedule(vae, rate=3e-3)
    vae.add_argument("--pixels", type=int, default=2**16, help="pixels in a batch")

    vae.add_argument("--decoder-only", action="store_true", help="keep the encoder, so that stored latents stay valid")

    latents = commands.add_parser("latents")
    latents.add_argument(
        "--count", type=_size_and(int), nargs="+", default=list(_PICTURES.items()),
        metavar="SIZE=PICTURES",
    )  # fmt: skip

    text = commands.add_parser("text")
    _add_schedule(text, rate=1e-3)
    text.add_argument("--batch", type=int, default=128, help="captions in a batch")

    dit = commands.add_parser("dit")
    _add_schedule(dit, rate=2e-3)
    dit.add_argument("--batch", type=int, default=64, help="pictures of 256x256 in a batch, fewer of larger ones")
    dit.add_argument(
        "--share", type=_size_and(float), nargs="+", default=list(_SHARES.items()),
        metavar="SIZE=SHARE", help="share of the batches that are of this size",
    )  # fmt: skip

    dit.add_argument(
        "--guidance", type=float, default=1.0, help="for a last run: the scale of guidance to learn; 1 is none"
    )
    dit.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="with torch.compile")

    commands.add_parser("hear")

    restore = commands.add_parser("restore")
    restore.add_argument("directory", type=Path, help="what `export` wrote, such as the model in the package")

    export = commands.add_parser("export")
    export.add_argument("--to", type=Path, help="directory; default: pipeline in --folder")
    return parser.parse_args()


def _add_schedule(parser: argparse.ArgumentParser, rate: float) -> None:
    parser.add_argument("--minutes", type=float, required=True, help="how long this run takes")
    parser.add_argument("--decay", type=float, default=0.0, help="last part of the run in which the rate falls to 0")
    parser.add_argument("--rate", type=float, default=rate, help="learning rate")


def _schedule(arguments: argparse.Namespace) -> Schedule:
    from training.learner import Schedule

    return Schedule(learning_rate=arguments.rate, minutes=arguments.minutes, warmup_steps=100, decay=arguments.decay)


def _size_and(kind: Callable[[str], _Number]) -> Callable[[str], tuple[tuple[int, int], _Number]]:
    """Reads SIDE=NUMBER or WIDTHxHEIGHT=NUMBER; the size is (height, width)."""

    def parse(text: str) -> tuple[tuple[int, int], _Number]:
        size, _, number = text.partition("=")
        width, _, height = size.partition("x")
        return (int(height or width), int(width)), kind(number)

    return parse


if __name__ == "__main__":
    main()
