"""The command line. Every option also comes from `TETRISERVE_*` and from a YAML or TOML file, in that order."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tetriserve.core.errors import ConfigError, TetriServeError

if TYPE_CHECKING:
    from tetriserve.config import PoolConfig
    from tetriserve.engine.live import LiveEngine
    from tetriserve.launch import Progress
    from tetriserve.profile.table import Profile

FORMATS = ("table", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
_ENV = "TETRISERVE_"
_HEARTBEAT_TIMEOUT_S = 10.0

console = Console(stderr=True, highlight=False)
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Deadline-aware serving for diffusion transformers.",
)


def _option(name: str, text: str, **settings: Any) -> Any:
    """An option that `TETRISERVE_<NAME>` sets too."""
    return typer.Option(f"--{name}", envvar=_ENV + name.upper().replace("-", "_"), help=text, **settings)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a file's values as the command's defaults."""
    if path is None:
        return None
    with _one_line_errors():
        known = {name for parameter in context.command.params for name in [parameter.name or ""]} - {"config", "help"}
        values = {key.replace("-", "_"): value for key, value in _load_settings(path).items()}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"{path} sets {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
        context.default_map = {
            key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()
        }
    return path


Model = Annotated[
    str | None,
    typer.Argument(envvar=_ENV + "MODEL", help="Directory of a diffusers checkpoint; the bundled small model if none."),
]
Config = Annotated[
    Path | None,
    _option("config", "YAML or TOML file of option values; the command line and TETRISERVE_* override it.",
            callback=_read_config, is_eager=True),
]  # fmt: skip
Ranks = Annotated[
    int | None, _option("ranks", "Worker processes, one per GPU or CPU slot. Default: all GPUs, or 2 on a CPU.")
]
Degrees = Annotated[
    str, _option("degrees", "Degrees of sequence parallelism, such as 1,2,4. Default: powers of two up to --ranks.")
]
Device = Annotated[str, _option("device", "cpu or cuda.")]
Threads = Annotated[int, _option("threads", "Threads of each CPU worker; more than cores / ranks slows everyone.")]
LogLevel = Annotated[str, _option("log-level", f"One of {', '.join(LOG_LEVELS)}.")]
StartTimeout = Annotated[float, _option("start-timeout", "Seconds that workers may take to load.")]


@app.command()
def serve(
    model: Model = None,
    config: Config = None,
    ranks: Ranks = None,
    degrees: Degrees = "",
    policy: Annotated[str, _option("policy", "tetriserve, fcfs, fixed:K, or a plug-in's name.")] = "tetriserve",
    device: Device = "cpu",
    host: Annotated[str, _option("host", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _option("port", "Port to listen on; 0 takes a free one.")] = 8000,
    profile: Annotated[
        str | None, _option("profile", "Profile file. Default: one for this model and machine, measured if need be.")
    ] = None,
    served_model_name: Annotated[
        str | None, _option("served-model-name", "What clients call the model. Default: the checkpoint's own name.")
    ] = None,
    default_slo_scale: Annotated[
        float,
        _option("default-slo-scale", "Deadline without slo_ms, as a multiple of the request's time at degree 1."),
    ] = 3.0,
    max_queue: Annotated[int, _option("max-queue", "Waiting requests at most; beyond it clients get a 429.")] = 256,
    threads: Threads = 1,
    heartbeat_timeout: Annotated[
        float, _option("heartbeat-timeout", "Seconds of silence after which a worker is replaced.")
    ] = _HEARTBEAT_TIMEOUT_S,
    start_timeout: StartTimeout = 300.0,
    shutdown_timeout: Annotated[
        float, _option("shutdown-timeout", "Seconds that SIGTERM waits for accepted requests.")
    ] = 60.0,
    log_level: LogLevel = "info",
) -> None:
    """Serve a model over OpenAI's images API, each request by its deadline."""
    with _one_line_errors():
        from tetriserve.config import EngineConfig, SchedulingConfig, ServerConfig
        from tetriserve.launch import launch
        from tetriserve.server.run import run_server

        _set_up_logging(log_level)
        engine_config = EngineConfig(
            model=model,
            profile=profile,
            served_model_name=served_model_name,
            pool=_pool(ranks, degrees, device, threads, start_timeout, heartbeat_timeout),
            scheduling=SchedulingConfig(policy=policy, default_slo_scale=default_slo_scale, max_queue=max_queue),
        )
        server_config = ServerConfig(host=host, port=port, shutdown_timeout_s=shutdown_timeout)
        with _progress() as progress:
            exit_code = run_server(server_config, lambda: launch(engine_config, progress), on_ready=_say_ready)
    raise typer.Exit(exit_code)


@app.command()
def profile(
    model: Model = None,
    config: Config = None,
    ranks: Ranks = None,
    degrees: Degrees = "",
    device: Device = "cpu",
    sizes: Annotated[
        str, _option("sizes", "Sizes to measure, such as 256x256,512x512. Default: the model's own.")
    ] = "",
    out: Annotated[
        Path | None, _option("out", "File to write. Default: <model>.profile.json in the working directory.")
    ] = None,
    threads: Threads = 1,
    start_timeout: StartTimeout = 300.0,
    log_level: LogLevel = "warning",
) -> None:
    """Measure how long each stage takes at each size and degree, and write a profile."""
    with _one_line_errors():
        from tetriserve.core.request import Shape
        from tetriserve.launch import measure_profile
        from tetriserve.profile.table import save_profile

        _set_up_logging(log_level)
        try:
            shapes = tuple(Shape.parse(size.strip()) for size in sizes.split(",") if size.strip())
        except ValueError as error:
            raise ConfigError(f"--sizes: {error}") from error
        pool = _pool(ranks, degrees, device, threads, start_timeout)
        with _progress() as progress:
            card, measured = asyncio.run(measure_profile(model, pool, shapes, progress))
        path = out or Path(f"{card.name}.profile.json")
        save_profile(measured, path)
        _print_profile(measured)
        console.print(f"written to {path}; serve with: tetriserve serve {model or ''} --profile {path}")


@app.command()
def simulate(
    config: Config = None,
    profile: Annotated[str, _option("profile", "Bundled profile's name or a profile file.")] = "flux.1-dev-8xh100",
    policies: Annotated[str, _option("policies", "Names with commas, such as tetriserve,fixed:2, or all.")] = "all",
    mix: Annotated[
        str, _option("mix", "uniform, skewed[:ALPHA], homogeneous:WxH, or weights: 256x256:3,1024x1024:1.")
    ] = "uniform",
    rate: Annotated[float, _option("rate", "Requests per minute, on average.")] = 12.0,
    arrivals: Annotated[
        str, _option("arrivals", "poisson, constant, gamma:cv=3, on-off:on_s=30,off_s=30 or step:at_s=300,factor=2.")
    ] = "poisson",
    slo_scale: Annotated[float, _option("slo-scale", "Factor on the base deadlines of the sizes.")] = 1.0,
    slo_multiple: Annotated[
        float | None, _option("slo-multiple", "Instead: deadlines as a multiple of the time alone at degree 1.")
    ] = None,
    requests: Annotated[int, _option("requests", "Requests per seed.")] = 300,
    steps: Annotated[int, _option("steps", "Denoise steps per request.")] = 28,
    ranks: Annotated[int | None, _option("ranks", "Default: the profile's largest degree.")] = None,
    seeds: Annotated[int, _option("seeds", "How many workloads to average over.")] = 5,
    seed: Annotated[int, _option("seed", "The first workload's seed; the others follow it.")] = 0,
    noise: Annotated[float, _option("noise", "Standard deviation of task times, as a fraction of them.")] = 0.0,
    bound: Annotated[
        bool, typer.Option("--bound/--no-bound", envvar=_ENV + "BOUND", help="Compute what no scheduler can exceed.")
    ] = True,
    trace: Annotated[
        Path | None, _option("trace", "CSV or JSON Lines of requests to replay, instead of making them up.")
    ] = None,
    out: Annotated[Path | None, _option("out", "Write every request's outcome here, as JSON Lines.")] = None,
    trace_out: Annotated[
        Path | None, _option("trace-out", "Write a Perfetto trace of the first policy's first run here.")
    ] = None,
    format: Annotated[str, _option("format", f"One of {', '.join(FORMATS)}.")] = FORMATS[0],
) -> None:
    """Compare policies on made-up or recorded requests, without a model: times come from a profile."""
    with _one_line_errors():
        from tetriserve.report.comparing import compare_and_print
        from tetriserve.simulator.scenario import Scenario

        if format not in FORMATS:
            raise ConfigError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
        scenario = Scenario(
            profile=profile,
            mix=mix,
            arrivals=arrivals,
            rate_per_min=rate,
            slo_scale=slo_scale,
            slo_multiple=slo_multiple,
            num_requests=requests,
            num_steps=steps,
            num_ranks=ranks,
            noise=noise,
            trace=trace,
        )
        compare_and_print(
            scenario,
            policies=policies,
            num_seeds=seeds,
            first_seed=seed,
            has_bound=bound,
            out=out,
            trace_out=trace_out,
            is_json=format == "json",
            progress=console,
        )


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from tetriserve import __version__

        typer.echo(f"tetriserve {__version__}")
        raise typer.Exit


def main() -> None:
    """The `tetriserve` command."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """An operator's mistake is one line on stderr and a failing exit code, never a traceback."""
    try:
        yield
    except TetriServeError as error:
        typer.echo(f"tetriserve: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _load_settings(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".toml":
            import tomllib

            values: object = tomllib.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text) or {}
    except Exception as error:  # each parser has errors of its own
        raise ConfigError(f"config file {path} cannot be parsed: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold option names and values")
    return {str(key): value for key, value in values.items()}


def _pool(
    ranks: int | None,
    degrees: str,
    device: str,
    threads: int,
    start_timeout: float,
    heartbeat_timeout: float = _HEARTBEAT_TIMEOUT_S,
) -> PoolConfig:
    from tetriserve.config import PoolConfig
    from tetriserve.launch import num_gpus

    try:
        parsed = tuple(int(degree) for degree in degrees.split(",") if degree.strip())
    except ValueError:
        raise ConfigError(f"degrees is {degrees!r}; write whole numbers with commas, such as 1,2,4") from None
    num_ranks = ranks if ranks is not None else (num_gpus() or 1) if device == "cuda" else 2
    return PoolConfig(
        num_ranks=num_ranks,
        degrees=parsed,
        device=device,
        num_threads=threads,
        start_timeout_s=start_timeout,
        heartbeat_timeout_s=heartbeat_timeout,
    )


def _set_up_logging(level: str) -> None:
    if level not in LOG_LEVELS:
        raise ConfigError(f"log-level is {level!r}; allowed: {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


@contextmanager
def _progress() -> Iterator[Progress]:
    """What happens during the start: a line per step, a bar while a profile is measured."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from tetriserve.launch import Progress

    bar = Bar(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task("", visible=False)

    def on_measured(done: int, total: int, text: str) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total, description=text, visible=done < total)
        if done == total:
            bar.stop()

    try:
        yield Progress(step=lambda text: console.print(f"  {text}"), measured=on_measured)
    finally:
        if bar.live.is_started:  # stopping one that never started prints an empty line
            bar.stop()


def _say_ready(url: str, engine: LiveEngine) -> None:
    card, state, profile = engine.intake.card, engine.state, engine.intake.cost.profile
    console.print(
        f"\n[bold]{card.name}[/] on {len(state.ranks)} ranks is ready at [bold]{url}[/]\n"
        f"Times planned with: {profile.hardware} ({profile.source}); corrected as requests run.\n\n"
        "A picture with a deadline of 5 seconds, saved as picture.png:\n"
    )
    console.print(
        f"curl -s {url}/v1/images/generations -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"prompt": "a red circle above a blue square", "size": "{card.sizes[0]}", "slo_ms": 5000}}\' \\\n'
        '  | python3 -c \'import base64, json, sys; image = json.load(sys.stdin)["data"][0]; '
        'open("picture.png", "wb").write(base64.b64decode(image["b64_json"])); print(image["schedule"])\'\n',
        soft_wrap=True,
        markup=False,
    )


def _print_profile(measured: Profile) -> None:
    from rich.table import Table

    table = Table(title=f"{measured.model} on {measured.hardware}: seconds per step by degree")
    for heading in ("size", "tokens", *(f"degree {degree}" for degree in measured.degrees), "decode"):
        table.add_column(heading, justify="right")
    decode = {row.shape: row.decode_s for row in measured.decode}
    for shape in measured.shapes:
        rows = {row.degree: row for row in measured.denoise if row.shape == shape}
        steps = [f"{rows[degree].step_s:.4f}" if degree in rows else "-" for degree in measured.degrees]
        table.add_row(str(shape), str(next(iter(rows.values())).tokens), *steps, f"{decode[shape]:.3f}")
    console.print(table)
