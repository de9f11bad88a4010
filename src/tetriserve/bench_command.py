"""`tetriserve bench`: its options, and what it prints and writes."""

from __future__ import annotations

import asyncio
import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from tetriserve import options
from tetriserve.core.bounds import check_range
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import MAX_SIDE
from tetriserve.options import ENV, FORMATS, check_choice, one_line_errors, option

if TYPE_CHECKING:
    from tetriserve.bench.session import Measurement, Session

_DATASETS = ("random", "trace")
_TASKS = ("t2i",)
_FLAGS = {
    "request_config": "random-request-config",
    "num_requests": "num-prompts",
    "rate_per_min": "rate",
    "num_steps": "num-inference-steps",
    "num_warm_ups": "warmup-requests",
    "timeout_s": "timeout",
    "images": "save-images",
}
"""Of fields whose option has another name."""


def bench(
    config: options.Config = None,
    base_url: Annotated[
        str | None, option("base-url", "The server, with or without /v1. Default: --host and --port.")
    ] = None,
    host: Annotated[str, option("host", "The server's address.")] = "127.0.0.1",
    port: Annotated[int, option("port", "The server's port.")] = 8000,
    model: Annotated[str | None, typer.Option("--model", help="Default: the first that /v1/models lists.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token.", show_envvar=True)
    ] = None,
    task: Annotated[str, option("task", f"One of {', '.join(_TASKS)}.")] = "t2i",
    dataset: Annotated[
        str | None, option("dataset", f"One of {', '.join(_DATASETS)}. Default: trace with --trace, else random.")
    ] = None,
    trace: options.Trace = None,
    prompts: Annotated[
        Path | None, option("prompts", "File of prompts, one per line. Default: made up, seeded.")
    ] = None,
    num_prompts: Annotated[int, option("num-prompts", "Requests to send.")] = 300,
    rate: options.Rate = 12.0,
    request_rate: Annotated[
        float | None, option("request-rate", "Instead of --rate: requests per second; inf sends all at once.")
    ] = None,
    arrivals: options.Arrivals = "poisson",
    mix: options.Mix = "uniform",
    width: Annotated[int | None, option("width", "With --height, instead of --mix: one size.")] = None,
    height: Annotated[int | None, option("height", "With --width, instead of --mix: one size.")] = None,
    random_request_config: Annotated[
        str | None,
        option("random-request-config", "Instead of --mix: JSON list of width, height, num_inference_steps, weight."),
    ] = None,
    num_inference_steps: Annotated[
        int | None, option("num-inference-steps", "Denoise steps per request. Default: the server's.")
    ] = None,
    slo_table: Annotated[
        str | None,
        option("slo-table", "Base deadlines in seconds by size: 256x256:1.5,512x512:2. Default: the paper's."),
    ] = None,
    slo_scale: options.SloScale = 1.0,
    slo_multiple: Annotated[
        float | None, option("slo-multiple", "Instead: a multiple of each size's time alone, as the warm-up measures.")
    ] = None,
    slo: Annotated[bool, typer.Option("--slo", help="As --slo-multiple, with --slo-scale for the number.")] = False,
    send_slo: Annotated[
        bool, typer.Option("--send-slo/--no-send-slo", envvar=ENV + "SEND_SLO", help="Send slo_ms with each request.")
    ] = True,
    extra_body: Annotated[
        str | None, option("extra-body", "JSON object of further fields to send; a null leaves a field out.")
    ] = None,
    max_concurrency: Annotated[
        int | None, option("max-concurrency", "Requests in flight at most; waiting counts as latency. Default: no cap.")
    ] = None,
    warmup_requests: Annotated[
        int, option("warmup-requests", "Uncounted requests of each size, one at a time, before the others.")
    ] = 1,
    timeout: Annotated[float, option("timeout", "Seconds after which a request counts as failed.")] = 600.0,
    seed: Annotated[int, option("seed", "Seed of arrivals, sizes, prompts and pictures.")] = 0,
    check: Annotated[
        bool, typer.Option("--check/--no-check", envvar=ENV + "CHECK", help="First ask the server what it serves.")
    ] = True,
    output_file: Annotated[Path | None, option("output-file", "Write the results here, as JSON.")] = None,
    out: Annotated[Path | None, option("out", "Write every request's outcome here, as JSON Lines.")] = None,
    report: Annotated[Path | None, option("report", "Write an HTML page with figures here.")] = None,
    save_images: Annotated[Path | None, option("save-images", "Keep the pictures in this directory.")] = None,
    format: options.Format = FORMATS[0],
) -> None:
    """Load a server, ours or any other with OpenAI's images API, and judge it by the client's clock."""
    with one_line_errors():
        from tetriserve.bench.address import Address
        from tetriserve.bench.load import Load
        from tetriserve.bench.session import Session

        check_choice("format", format, FORMATS)
        check_choice("task", task, _TASKS)
        check_choice("dataset", dataset or _DATASETS[0], _DATASETS)
        if (dataset == "trace" and trace is None) or (dataset == "random" and trace is not None):
            raise ConfigError(f"dataset is {dataset} {'without' if trace is None else 'beside'} a trace file")
        check_range("port", port, 1, 65535)
        load = Load(
            mix=_mix(mix, width, height),
            request_config=random_request_config,
            num_requests=num_prompts,
            rate_per_min=rate if request_rate is None else 60 * request_rate,
            arrivals=arrivals,
            num_steps=num_inference_steps,
            slo_table=slo_table,
            slo_scale=slo_scale,
            slo_multiple=slo_scale if slo and slo_multiple is None else slo_multiple,
            trace=trace,
            prompts=prompts,
            seed=seed,
        )
        session = Session(
            address=Address.parse(base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}"),
            load=load,
            api_key=api_key,
            model=model,
            is_checked=check,
            num_warm_ups=warmup_requests,
            max_concurrency=max_concurrency,
            timeout_s=timeout,
            sends_slo=send_slo,
            extra=_extra(extra_body),
            images=save_images,
        )
        exit_code = _measure_and_print(session, output_file, out, report, is_json=format == "json")
    raise typer.Exit(exit_code)


def _measure_and_print(
    session: Session, output_file: Path | None, out: Path | None, report: Path | None, *, is_json: bool
) -> int:
    """The exit code: 130 after an interrupt, 1 when nothing finished."""
    from tetriserve.bench.run import measure
    from tetriserve.bench.summary import judged_attempts, summarise, summary_json
    from tetriserve.report.bench_table import bench_notes, bench_table
    from tetriserve.report.page import one_line_error, reserve_page, write_page
    from tetriserve.report.printing import print_table
    from tetriserve.report.watching import Watch

    for path in (output_file, out, report):
        if path is not None:
            reserve_page(path)
    if session.images is not None:
        with one_line_error(session.images):
            session.images.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    with Watch(console) as watch:
        measurement = asyncio.run(measure(session, on_tick=watch.show, say=watch.say, warn=watch.warn))
    summary = summarise(measurement)
    document = summary_json(summary, session, measurement)
    if output_file is not None:
        write_page(json.dumps(document, indent=1, allow_nan=False) + "\n", output_file)
    if out is not None:
        lines = (json.dumps(attempt.as_json(), allow_nan=False) + "\n" for attempt in judged_attempts(measurement))
        write_page("".join(lines), out)
    if report is not None and summary.everything.num_judged:
        from tetriserve.report.bench_page import render_bench

        title = _title(session, measurement)
        page = render_bench(session, measurement, summary, title=title, command=_command_of(session))
        write_page(page, report)
    if is_json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        notes = "\n".join(bench_notes(summary, measurement))
        print_table(Text(_title(session, measurement)), bench_table(summary), Text(notes))
    return 130 if measurement.is_interrupted else 0 if summary.everything.num_finished else 1


def _mix(mix: str, width: int | None, height: int | None) -> str:
    if width is None and height is None:
        return mix
    if width is None or height is None:
        raise ConfigError(f"{'height' if width is None else 'width'} is set alone; set both, or --mix")
    check_range("width", width, 1, MAX_SIDE)
    check_range("height", height, 1, MAX_SIDE)
    return f"homogeneous:{width}x{height}"


def _extra(text: str | None) -> dict[str, object]:
    try:
        fields_sent = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"extra-body is not JSON: {error}") from None
    if not isinstance(fields_sent, dict):
        raise ConfigError(f"extra-body is {text}; it must be a JSON object")
    return fields_sent


def _title(session: Session, measurement: Measurement) -> str:
    load, target = session.load, measurement.target
    served = f"{target.model or 'the model'} at {session.address}" + (
        f" under {target.policy}" if target.policy else ""
    )
    if load.trace is not None:
        return f"{served}: {measurement.total} requests of {load.trace}"
    mix = load.mix if load.request_config is None else "configured sizes"
    slo = f"scale {load.slo_scale:g}" if load.slo_multiple is None else f"{load.slo_multiple:g} x alone"
    pace = f"{load.rate_per_min:g}/min {load.arrivals}"
    return f"{served}: {measurement.total} requests, {mix}, {pace}, SLO {slo}"


def _command_of(session: Session) -> str:
    """The command with the options that differ from their defaults, for a shell; without the key."""
    words = ["tetriserve", "bench", "--base-url", str(session.address)]
    for part in (session.load, session):
        for field in fields(part):
            value = getattr(part, field.name)
            if field.name in ("address", "load", "api_key") or value == field.default:
                continue
            match field.name:
                case "is_checked":
                    words.append("--no-check")
                case "sends_slo":
                    words.append("--no-send-slo")
                case "extra":
                    words += ["--extra-body", json.dumps(value)] if value else []
                case name:
                    flag = _FLAGS.get(name, name.replace("_", "-"))
                    words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
