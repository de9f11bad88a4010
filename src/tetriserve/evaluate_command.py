"""`tetriserve evaluate`: does the model draw what it is asked for, and the same under every schedule?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from tetriserve import options
from tetriserve.core.bounds import MAX_REQUESTS, MAX_SEED, MAX_STEPS, check_range
from tetriserve.core.errors import ConfigError
from tetriserve.options import FORMATS, one_line_errors, option
from tetriserve.stopping import run_until_signal

if TYPE_CHECKING:
    from rich.table import Table

    from tetriserve.evaluator import EvaluationRow

_NUMBERS_OF_OBJECTS = (1, 2, 3)


def evaluate(
    model: options.Model = None,
    config: options.Config = None,
    ranks: options.Ranks = None,
    degrees: options.Degrees = "",
    device: options.Device = "cpu",
    profile: options.Profile = None,
    remeasure: options.Remeasure = False,
    adapter: options.Adapter = None,
    threads: options.Threads = 1,
    start_timeout: options.StartTimeout = 300.0,
    policies: Annotated[
        str, option("policies", "Schedules, such as fixed:1,fixed:2,unsteady; pictures are held against the first's.")
    ] = "fixed:1",
    prompts: Annotated[int, option("prompts", "Unseen prompts for each number of objects.")] = 100,
    objects: Annotated[str, option("objects", "Numbers of objects in a picture.")] = "1,2,3",
    sizes: Annotated[str, option("sizes", "Sizes to draw.")] = "256x256",
    steps: Annotated[str, option("steps", "Numbers of denoise steps. Default: the model's own.")] = "",
    seed: Annotated[int, option("seed", "Another seed asks for other pictures.")] = 0,
    sheet: Annotated[Path | None, option("sheet", "Write the first pictures of each setting here, as one PNG.")] = None,
    curve: Annotated[
        Path | None, option("curve", "Plot accuracy over the steps of the first policy here (PNG).")
    ] = None,
    output_file: Annotated[Path | None, option("output-file", "Write the results here, as JSON.")] = None,
    format: options.Format = FORMATS[0],
) -> None:
    """Try prompts that the bundled model has never seen, read the pictures back, and count what is right.

    The reader is image processing without a learnt part; it knows flat drawings of the bundled model's vocabulary.
    """
    with one_line_errors():
        from tetriserve.config import EngineConfig, ModelConfig, SchedulingConfig
        from tetriserve.evaluation.sheet import contact_sheet
        from tetriserve.evaluator import EvaluationSetting, evaluate_all
        from tetriserve.report.accuracy import save_accuracy_curve

        is_json = options.is_json(format)
        check_range("prompts", prompts, 1, MAX_REQUESTS)
        check_range("seed", seed, -MAX_SEED, MAX_SEED)
        settings = [
            EvaluationSetting(policy=policy, size=size, num_steps=num_steps, num_objects=num_objects)
            for policy, size, num_steps, num_objects in product(
                _split("policies", policies),
                _split("sizes", sizes),
                _numbers("steps", steps) or (None,),
                _numbers("objects", objects, _NUMBERS_OF_OBJECTS),
            )
        ]
        pool = options.pool_config(ranks, degrees, device, threads, start_timeout)
        configs = {
            policy: EngineConfig(
                models=(ModelConfig(path=model, profile=profile, adapter=adapter),),
                remeasure=remeasure,
                pool=pool,
                scheduling=SchedulingConfig(policy=policy, max_queue=4 * pool.num_ranks),
            )
            for policy in dict.fromkeys(setting.policy for setting in settings)
        }
        with Progress(console=Console(stderr=True), transient=True) as progress:
            pictures = progress.add_task("pictures", total=prompts * len(settings))
            rows = run_until_signal(
                evaluate_all(configs, settings, prompts, seed, on_trial=lambda: progress.advance(pictures))
            )
        result = {
            "prompts": prompts,
            "seed": seed,
            "num_ranks": pool.num_ranks,
            "rows": list(map(_as_json, rows)),
        }
        if output_file is not None:
            with _writing(output_file):
                output_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if sheet is not None:
            with _writing(sheet):
                contact_sheet([trial for row in rows for trial in row.first_trials]).save(sheet)
        if curve is not None:
            with _writing(curve):
                save_accuracy_curve(_accuracy_by_steps(rows[: len(rows) // len(configs)]), curve)
        if is_json:
            typer.echo(json.dumps(result))
        else:
            from tetriserve.report.printing import print_table

            print_table(_table(rows))


def _as_json(row: EvaluationRow) -> dict[str, object]:
    psnr = {} if row.psnr_db is None else dict(zip(("psnr_db_min", "psnr_db_median"), row.psnr_db, strict=True))
    shares = {name: asdict(share) | {"percent": share.percent} for name, share in row.shares.items()}
    return asdict(row.setting) | {"num_steps": row.num_steps} | shares | psnr | {"seconds_per_image": row.seconds}


def _table(rows: Sequence[EvaluationRow]) -> Table:
    from rich.table import Table

    table = Table(title="Pictures that show what was asked for, %")
    questions = ("objects", "relations", "background", "sizes")
    for name in ("policy", "size", "steps", "objects asked", "prompts", *questions, "PSNR min", "median", "s each"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        setting, objects = row.setting, row.shares["objects"]
        answered = [f"{row.shares[name].percent:.1f}" if name in row.shares else "" for name in questions]
        distances = ("", "") if row.psnr_db is None else tuple(f"{value:.0f} dB" for value in row.psnr_db)
        table.add_row(
            setting.policy, setting.size, str(row.num_steps), str(setting.num_objects),
            str(objects.total), *answered, *distances, f"{row.seconds:.2f}",
        )  # fmt: skip
    return table


def _accuracy_by_steps(rows: Sequence[EvaluationRow]) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """Points (steps, percentage of pictures with the right objects) by size and number of objects."""
    curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        points = curves.setdefault((row.setting.size, row.setting.num_objects), [])
        points.append((row.num_steps, row.shares["objects"].percent))
    return curves


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # Pillow refuses an unknown suffix so
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _split(name: str, text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ConfigError(f"{name} is empty; name at least one")
    return parts


def _numbers(name: str, text: str, allowed: Sequence[int] = ()) -> tuple[int, ...]:
    """Whole numbers above 0, of those `allowed` if any are named; none of an empty text."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; write whole numbers with commas") from None
    for number in numbers:
        if not 1 <= number <= MAX_STEPS or (allowed and number not in allowed):
            rule = ", ".join(map(str, allowed)) if allowed else f"1 to {MAX_STEPS}"
            raise ConfigError(f"{name} is {text!r}; allowed: {rule}")
    return numbers
