"""The command line. Every option also comes from `TETRISERVE_*` and from a YAML or TOML file, in that order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tetriserve import model_options, options
from tetriserve.bench_command import bench
from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import DEFAULT
from tetriserve.core.plan import LATE_SHARE
from tetriserve.evaluate_command import evaluate
from tetriserve.options import ENV, LOG_LEVELS, one_line_errors, option
from tetriserve.simulate_commands import plan, simulate
from tetriserve.stopping import run_until_signal

if TYPE_CHECKING:
    from tetriserve.engine.live import LiveEngine
    from tetriserve.launch import StartProgress
    from tetriserve.profile.table import Profile


console = Console(stderr=True, highlight=False)
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Deadline-aware serving for diffusion transformers.",
)


@app.command()
def serve(
    model: options.Model = None,
    models: model_options.Models = None,
    model_ranks: model_options.ModelRanks = None,
    model_option: model_options.ModelOption = None,
    config: options.Config = None,
    ranks: options.Ranks = None,
    encoder_ranks: options.EncoderRanks = None,
    degrees: options.Degrees = "",
    max_batch: options.MaxBatch = 8,
    policy: Annotated[
        str, option("policy", "lookahead, tetriserve, fcfs, fixed:K, or a plug-in's name.")
    ] = "lookahead",
    device: options.Device = "cpu",
    ranks_per_gpu: options.RanksPerGpu = 1,
    collectives: options.Collectives = "",
    host: Annotated[str, option("host", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("port", "Port to listen on; 0 takes a free one.")] = 8000,
    profile: options.Profile = None,
    remeasure: options.Remeasure = False,
    served_model_name: options.ServedModelNames = None,
    max_sequence_length: options.MaxSequenceLength = None,
    adapter: options.Adapter = None,
    compile: options.Compile = False,
    attention: options.Attention = DEFAULT,
    quantization: options.Quantization = DEFAULT,
    vae_tiling: options.VaeTiling = False,
    offload_text_encoders: options.OffloadTextEncoders = False,
    lora: options.Loras = None,
    default_slo_scale: Annotated[
        float,
        option("default-slo-scale", "Deadline without slo_ms, as a multiple of the request's time at degree 1."),
    ] = 3.0,
    max_queue: Annotated[int, option("max-queue", "Waiting requests at most; beyond it clients get a 429.")] = 256,
    max_losses: Annotated[
        int, option("max-losses", "Workers that a request may lose in a row; with one more it is failed alone.")
    ] = options.MAX_LOSSES,
    late_share: options.LateShare = LATE_SHARE,
    threads: options.Threads = 1,
    heartbeat_timeout: Annotated[
        float, option("heartbeat-timeout", "Seconds of silence after which a worker is replaced.")
    ] = options.HEARTBEAT_TIMEOUT_S,
    start_timeout: options.StartTimeout = 300.0,
    shutdown_timeout: Annotated[
        float, option("shutdown-timeout", "Seconds that SIGTERM waits for accepted requests.")
    ] = 60.0,
    api_key: options.ApiKeys = None,
    rate_limit: options.RateLimit = None,
    max_concurrency: options.MaxConcurrency = None,
    guard_metrics: options.GuardMetrics = False,
    cors_origin: options.CorsOrigins = None,
    compat: options.Compat = "lenient",
    url_ttl: options.UrlTtl = 3600.0,
    preview_size: options.PreviewSize = 256,
    journal: options.Journal = None,
    result_ttl: options.ResultTtl = 3600.0,
    log_level: options.LogLevel = "info",
    log_format: options.LogFormat = "text",
    otlp_traces_endpoint: options.OtlpEndpoint = None,
) -> None:
    """Serve a model over OpenAI's images API, or several in one pool, each request by its deadline."""
    with one_line_errors():
        from tetriserve.config import (
            AccessConfig,
            ApiConfig,
            EngineConfig,
            ExecutionConfig,
            JournalConfig,
            LoraConfig,
            ModelConfig,
            SchedulingConfig,
            ServerConfig,
        )
        from tetriserve.launch import StartProgress, launch
        from tetriserve.server.run import run_server

        _set_up_logging(log_level, log_format)
        if not api_key and os.environ.get(f"{ENV}API_KEY", "unset").strip() == "":  # a secret that did not arrive
            raise ConfigError(f"{ENV}API_KEY is empty; set it to a key, or unset it to serve everyone")
        model_config = ModelConfig(
            path=model,
            profile=profile,
            served_model_names=tuple(served_model_name or ()),
            max_sequence_length=max_sequence_length,
            adapter=adapter,
            execution=ExecutionConfig(
                compile=compile,
                attention=attention,
                quantization=quantization,
                vae_tiling=vae_tiling,
                offload_text_encoders=offload_text_encoders,
            ),
            loras=tuple(LoraConfig.parse(text) for text in lora or ()),
        )
        engine_config = EngineConfig(
            models=model_options.model_configs(model_config, models or (), model_ranks or (), model_option or ()),
            remeasure=remeasure,
            pool=options.pool_config(
                ranks,
                degrees,
                device,
                threads,
                start_timeout,
                heartbeat_timeout,
                log_format,
                max_batch,
                ranks_per_gpu,
                collectives,
                encoder_ranks,
            ),
            scheduling=SchedulingConfig(
                policy=policy,
                default_slo_scale=default_slo_scale,
                max_queue=max_queue,
                max_losses=max_losses,
                late_share=late_share,
            ),
            journal=None if journal is None else JournalConfig(directory=str(journal), result_ttl_s=result_ttl),
        )
        access_config = AccessConfig(
            api_keys=tuple(api_key or ()),
            rate_limit=rate_limit,
            max_concurrency=max_concurrency,
            guard_metrics=guard_metrics,
            cors_origins=tuple(cors_origin or ()),
        )
        server_config = ServerConfig(
            host=host,
            port=port,
            shutdown_timeout_s=shutdown_timeout,
            access=access_config,
            api=ApiConfig(compat=compat, url_ttl_s=url_ttl, preview_side=preview_size),
            otlp_traces_endpoint=otlp_traces_endpoint,
        )
        if log_format == "json":  # then stderr is a machine's: progress and the greeting are log lines too
            exit_code = run_server(server_config, lambda: launch(engine_config, StartProgress()))
        else:
            with _progress() as progress:
                exit_code = run_server(
                    server_config,
                    lambda: launch(engine_config, progress),
                    on_ready=lambda url, engine: _say_ready(url, engine, has_keys=bool(access_config.api_keys)),
                )
    raise typer.Exit(exit_code)


@app.command()
def profile(
    model: options.Model = None,
    config: options.Config = None,
    ranks: options.Ranks = None,
    encoder_ranks: options.EncoderRanks = None,
    degrees: options.Degrees = "",
    max_batch: options.MaxBatch = 8,
    device: options.Device = "cpu",
    ranks_per_gpu: options.RanksPerGpu = 1,
    collectives: options.Collectives = "",
    sizes: Annotated[str, option("sizes", "Sizes to measure, such as 256x256,512x512. Default: the model's own.")] = "",
    out: Annotated[
        Path | None, option("out", "File to write. Default: <model>.profile.json in the working directory.")
    ] = None,
    max_sequence_length: options.MaxSequenceLength = None,
    adapter: options.Adapter = None,
    compile: options.Compile = False,
    attention: options.Attention = DEFAULT,
    quantization: options.Quantization = DEFAULT,
    vae_tiling: options.VaeTiling = False,
    offload_text_encoders: options.OffloadTextEncoders = False,
    lora: options.Loras = None,
    threads: options.Threads = 1,
    start_timeout: options.StartTimeout = 300.0,
    log_level: options.LogLevel = "warning",
) -> None:
    """Measure how long each stage takes at each size and degree, and write a profile."""
    with one_line_errors():
        from tetriserve.config import ExecutionConfig, LoraConfig
        from tetriserve.core.request import Shape
        from tetriserve.launch import measure_profile
        from tetriserve.profile.table import save_profile

        _set_up_logging(log_level)
        try:
            shapes = tuple(Shape.parse(size.strip()) for size in sizes.split(",") if size.strip())
        except ValueError as error:
            raise ConfigError(f"--sizes: {error}") from error
        pool = options.pool_config(
            ranks,
            degrees,
            device,
            threads,
            start_timeout,
            max_batch=max_batch,
            ranks_per_gpu=ranks_per_gpu,
            collectives=collectives,
            encoder_ranks=encoder_ranks,
        )
        execution = ExecutionConfig(
            compile=compile,
            attention=attention,
            quantization=quantization,
            vae_tiling=vae_tiling,
            offload_text_encoders=offload_text_encoders,
        )
        with _progress() as progress:
            loras = tuple(LoraConfig.parse(text) for text in lora or ())
            measuring = measure_profile(model, pool, shapes, progress, max_sequence_length, execution, adapter, loras)
            card, measured = run_until_signal(measuring)
        path = out or Path(f"{re.sub(r'[^A-Za-z0-9.-]+', '_', card.name)}.profile.json")  # checkpoints choose names
        save_profile(measured, path)
        _print_profile(measured)
        same = "" if execution == ExecutionConfig() else f" and the options of {card.execution}"
        console.print(f"written to {path}; serve with: tetriserve serve {model or ''} --profile {path}{same}")


app.command()(simulate)
app.command()(plan)
app.command()(bench)
app.command()(evaluate)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from tetriserve import __version__

        typer.echo(f"tetriserve {__version__}")
        raise typer.Exit


def main() -> None:
    """The `tetriserve` command."""
    app()


def _set_up_logging(level: str, log_format: str = "text") -> None:
    from tetriserve.config import LOG_FORMATS
    from tetriserve.logs import set_up_logging

    if level not in LOG_LEVELS:
        raise ConfigError(f"log-level is {level!r}; allowed: {', '.join(LOG_LEVELS)}")
    if log_format not in LOG_FORMATS:
        raise ConfigError(f"log-format is {log_format!r}; allowed: {', '.join(LOG_FORMATS)}")
    set_up_logging(level, log_format)


@contextmanager
def _progress() -> Iterator[StartProgress]:
    """What happens during the start: a line per step, a bar while sizes are measured or warmed."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from tetriserve.launch import StartProgress

    bar = Bar(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task("", visible=False)

    def on_counted(done: int, total: int, text: str) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total, description=text, visible=done < total)
        if done == total:
            bar.stop()

    try:
        yield StartProgress(step=lambda text: console.print(f"  {text}"), counted=on_counted)
    finally:
        if bar.live.is_started:  # stopping one that never started prints an empty line
            bar.stop()


def _say_ready(url: str, engine: LiveEngine, *, has_keys: bool) -> None:
    models, num_ranks = engine.models, len(engine.state.ranks)
    drawing = next((intake for intake in models.intakes if not intake.card.makes_videos), None)
    profiles = {intake.card.name: intake.cost.profile for intake in models.intakes}
    planned = [
        f"{f'{name}: ' if models.are_several else ''}{profile.hardware} ({profile.source})"
        for name, profile in profiles.items()
    ]
    console.print(
        f"\n[bold]{models.title}[/] on {num_ranks} ranks {'are' if models.are_several else 'is'} ready at "
        f"[bold]{url}[/]\n"
        "Open it in a browser to watch the pool and to ask for pictures.\n"
        f"Times planned with: {'; '.join(planned)}; corrected as requests run.\n"
    )
    key_header = ' -H "Authorization: Bearer $TETRISERVE_API_KEY"' if has_keys else ""
    post = f"-H 'Content-Type: application/json'{key_header}"
    if drawing is not None:
        model = f'"model": "{drawing.card.name}", ' if models.are_several else ""
        console.print("A picture with a deadline of 5 seconds, saved as picture.png:\n")
        console.print(
            f"curl -s {url}/v1/images/generations {post} \\\n"
            f'  -d \'{{{model}"prompt": "a red circle above a blue square", "size": "{drawing.card.sizes[0]}", '
            '"slo_ms": 5000}\' \\\n'
            '  | python3 -c \'import base64, json, sys; image = json.load(sys.stdin)["data"][0]; '
            'open("picture.png", "wb").write(base64.b64decode(image["b64_json"])); print(image["schedule"])\'\n',
            soft_wrap=True,
            markup=False,
        )
    if any(intake.card.makes_videos for intake in models.intakes):
        console.print("A video, saved as video.mp4:\n")
        console.print(
            f'curl -sf {url}/v1/videos/sync {post} \\\n  -d \'{{"prompt": "a fox in the snow"}}\' -o video.mp4\n',
            soft_wrap=True,
            markup=False,
        )


def _print_profile(measured: Profile) -> None:
    from rich.table import Table

    table = Table(title=f"{measured.model} on {measured.hardware}: seconds per step by degree")
    others = [row for row in measured.rows if row.tokens is None and row.shape is not None]
    others_by = {(row.stage, row.degree): row.stage + (f" at {row.degree}" if row.degree > 1 else "") for row in others}
    for heading in ("size", "tokens", *(f"degree {degree}" for degree in measured.degrees), *others_by.values()):
        table.add_column(heading, justify="right")
    for shape in measured.shapes:
        rows = {row.degree: row for row in measured.rows if row.shape == shape and row.tokens and row.batch == 1}
        steps = [f"{rows[degree].seconds:.4f}" if degree in rows else "-" for degree in measured.degrees]
        short = {(row.stage, row.degree): f"{row.seconds:.3f}" for row in others if row.shape == shape}
        short_s = [short.get(each, "-") for each in others_by]
        table.add_row(str(shape), str(next(iter(rows.values())).tokens), *steps, *short_s)
    console.print(table)
