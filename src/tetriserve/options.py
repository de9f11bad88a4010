"""Options that several commands share, each declared once, and the file that gives them other defaults."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tetriserve.core.bounds import shown
from tetriserve.core.errors import ConfigError, TetriServeError
from tetriserve.core.execution import ATTENTIONS
from tetriserve.files import read_text
from tetriserve.logs import writes_json
from tetriserve.stopping import Interrupted

if TYPE_CHECKING:
    from tetriserve.config import PoolConfig

logger = logging.getLogger(__name__)

ENV = "TETRISERVE_"
FORMATS = ("table", "json")
PROFILE = "flux.1-dev-8xh100"
SHORTLIST = "lookahead,tetriserve,edf-best-fit,rssp"
"""What `plan` tries: the strongest policy, the paper's, GF-DiT's, and the paper's strongest baseline."""
HEARTBEAT_TIMEOUT_S = 10.0
MAX_LOSSES = 5
_MAX_CONFIG_BYTES = 2**16
LOG_LEVELS = ("debug", "info", "warning", "error")


def option(name: str, text: str, **settings: Any) -> Any:
    """An option that `TETRISERVE_<NAME>` sets too."""
    return typer.Option(f"--{name}", envvar=ENV + name.upper().replace("-", "_"), help=text, **settings)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What ends a command early, an operator's mistake or a signal, is one line on stderr and an exit code.

    2: a mistake; 1: another failure; 128 and the signal's number.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end(Interrupted(signal.SIGINT))
    except TetriServeError as error:
        _end(error)


def _end(error: TetriServeError) -> NoReturn:
    if writes_json():
        logger.critical("%s", error)
    else:
        typer.echo(f"tetriserve: {error}", err=True)
    match error:
        case Interrupted(exit_code=code):
            raise typer.Exit(code) from None
        case ConfigError():
            raise typer.Exit(2) from None
        case _:
            raise typer.Exit(1) from None


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a file's values as the command's defaults."""
    if path is None:
        return None
    with one_line_errors():
        known = {name for parameter in context.command.params for name in [parameter.name or ""]} - {"config", "help"}
        values = {key.replace("-", "_"): value for key, value in _load_settings(path).items()}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"{path} sets {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
        if blank := [key for key, value in values.items() if value is None or value == []]:
            raise ConfigError(f"{path} sets {blank[0]!r} to nothing; give it a value, or leave the line out")
        repeatable = {parameter.name for parameter in context.command.params if getattr(parameter, "multiple", False)}
        context.default_map = {key: _default(value, key in repeatable) for key, value in values.items()}
    return path


def _default(value: Any, is_repeatable: bool) -> Any:
    """A file's value as the command line would have it: lists with commas, unless the option can be repeated."""
    if is_repeatable:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _load_settings(path: Path) -> dict[str, Any]:
    text = read_text(path, "config file", _MAX_CONFIG_BYTES)
    try:
        if path.suffix == ".toml":
            import tomllib

            values: object = tomllib.loads(text)
        else:
            values = _load_yaml(text) or {}
    except Exception as error:  # each parser has errors of its own
        mark = getattr(error, "problem_mark", None)  # YAML's whole message quotes the line, which may hold an API key
        reason = str(error) if mark is None else f"{getattr(error, 'problem', 'not YAML')} in line {mark.line + 1}"
        raise ConfigError(f"config file {path} cannot be parsed: {' '.join(reason.split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold option names and values")
    for key, value in values.items():
        if not all(map(_is_plain, value if isinstance(value, list) else [value])):
            raise ConfigError(
                f"config file {path}: {shown(key)} must be a text, a number, a switch, or a list of these"
            )
    return {str(key): value for key, value in values.items()}


def _load_yaml(text: str) -> object:
    """As `yaml.safe_load`, for a mapping of values and lists.

    A few lines of aliases stand for gigabytes, and the time for nested lists grows with the square of their depth.
    """
    import yaml

    depth = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        match token:
            case yaml.AliasToken():
                raise ConfigError(f"it has an alias in line {token.start_mark.line + 1}; write the value out")
            case (
                yaml.BlockMappingStartToken()
                | yaml.BlockSequenceStartToken()
                | yaml.FlowMappingStartToken()
                | yaml.FlowSequenceStartToken()
            ):
                depth += 1
            case yaml.BlockEndToken() | yaml.FlowMappingEndToken() | yaml.FlowSequenceEndToken():
                depth -= 1
        if depth > 2:
            raise ConfigError(f"it nests lists in line {token.start_mark.line + 1}; a value is one text or one list")
    return yaml.safe_load(text)


def _is_plain(value: object) -> bool:
    """Whether an option can take it; None is told of elsewhere."""
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None or isinstance(value, str | float | date)


Config = Annotated[
    Path | None,
    option("config", "YAML or TOML file of option values; the command line and TETRISERVE_* override it.",
            callback=_read_config, is_eager=True),
]  # fmt: skip
Model = Annotated[
    str | None,
    typer.Argument(envvar=ENV + "MODEL", help="Directory of a diffusers checkpoint; the bundled small model if none."),
]
Ranks = Annotated[
    int | None, option("ranks", "Worker processes, one per GPU or CPU slot. Default: all GPUs, or 2 on a CPU.")
]
EncoderRanks = Annotated[
    int | None,
    option("encoder-ranks", "Only the first so many ranks of a model hold its text encoders, and encode. Default: all.",
           show_default=False),
]  # fmt: skip
Degrees = Annotated[
    str, option("degrees", "Degrees of sequence parallelism, such as 1,2,4. Default: powers of two up to --ranks.")
]
MaxBatch = Annotated[int, option("max-batch", "Requests of one size that may share a step, where it pays; 1: none.")]
Device = Annotated[str, option("device", "cpu or cuda.")]
RanksPerGpu = Annotated[int, option("ranks-per-gpu", "Ranks that share each GPU: for tests, as it is slower.")]
Collectives = Annotated[
    str, option("collectives", "shm (shared memory) or torch (NCCL, gloo). Default: torch between GPUs, else shm.")
]
Profile = Annotated[
    str | None, option("profile", "Profile file. Default: one for this model and machine, measured if need be.")
]
Remeasure = Annotated[
    bool,
    typer.Option("--remeasure", envvar=ENV + "REMEASURE", help="Measure a profile, whether or not one is kept."),
]
ServedModelNames = Annotated[
    list[str] | None,
    option("served-model-name", "What clients may call the model (repeatable; answers name the first). Default: the "
           "checkpoint's own name.", show_default=False),
]  # fmt: skip
MaxSequenceLength = Annotated[
    int | None,
    option("max-sequence-length", "Text tokens, to which prompts are padded and at which they are cut. Default: the "
           "model's own number, 512 for FLUX."),
]  # fmt: skip
Adapter = Annotated[
    str | None,
    option("adapter", "Family to serve the model; generic drives any text-to-image pipeline by its own call, at "
           "degree 1. Default: the family of its pipeline class.", show_default=False),
]  # fmt: skip
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", envvar=ENV + "COMPILE", help="Compile the transformer's repeated blocks, for each shape."
    ),
]
Attention = Annotated[str, option("attention", f"Kernel of attention: {', '.join(ATTENTIONS)}.")]
Quantization = Annotated[str, option("quantization", "fp8: the transformer's linear layers; it takes a GPU.")]
VaeTiling = Annotated[
    bool, typer.Option("--vae-tiling", envvar=ENV + "VAE_TILING", help="Decode large pictures in tiles.")
]
OffloadTextEncoders = Annotated[
    bool,
    typer.Option("--offload-text-encoders", envvar=ENV + "OFFLOAD_TEXT_ENCODERS",
                 help="Keep text encoders in the CPU's memory, and move them to the GPU for each prompt."),
]  # fmt: skip
Loras = Annotated[
    list[str] | None,
    option("lora", "NAME=PATH of a LoRA that requests may name: a safetensors file, or a directory with one "
           "(repeatable).", show_default=False),
]  # fmt: skip
Threads = Annotated[int, option("threads", "Threads of each CPU worker; more than cores / ranks slows everyone.")]
LogLevel = Annotated[str, option("log-level", f"One of {', '.join(LOG_LEVELS)}.")]
StartTimeout = Annotated[float, option("start-timeout", "Seconds that workers may take to load.")]

ApiKeys = Annotated[
    list[str] | None,
    option("api-key", "Clients must send this key (repeatable; better by environment, spaces between several).",
           show_default=False),
]  # fmt: skip
RateLimit = Annotated[int | None, option("rate-limit", "Images per minute that each key may ask for.")]
MaxConcurrency = Annotated[int | None, option("max-concurrency", "Unanswered images that each key may have.")]
GuardMetrics = Annotated[
    bool, typer.Option("--guard-metrics", envvar=ENV + "GUARD_METRICS", help="/metrics takes a key too.")
]
CorsOrigins = Annotated[
    list[str] | None,
    option("cors-origin", "Origin whose pages may call the server from a browser, or * (repeatable).",
           show_default=False),
]  # fmt: skip
Compat = Annotated[
    str,
    option("compat", "Parameters that are not served and change no picture: lenient ignores them with a warning in the "
           "answer, strict refuses them."),
]  # fmt: skip
UrlTtl = Annotated[
    float, option("url-ttl", "Seconds for which images asked for by response_format url are served; 0: not at all.")
]
PreviewSize = Annotated[int, option("preview-size", "Longer side of previews in streams, in pixels at most.")]
Journal = Annotated[
    Path | None,
    option("journal", "Keep requests with an Idempotency-Key in this directory: a restarted server finishes them."),
]
ResultTtl = Annotated[float, option("result-ttl", "Seconds that the journal keeps what is finished.")]
LogFormat = Annotated[str, option("log-format", "text, or json: one object per line.")]
OtlpEndpoint = Annotated[
    str | None,
    option("otlp-traces-endpoint", "Send OpenTelemetry spans here, such as http://localhost:4318/v1/traces.",
           show_default=False),
]  # fmt: skip

SimulatedProfiles = Annotated[
    list[str] | None,
    option("profile", f"Bundled profile's name or a profile file; NAME=PROFILE of each of several models that share "
           f"the pool (repeatable). Default: {PROFILE}.", show_default=False),
]  # fmt: skip
Mix = Annotated[
    str,
    option("mix", "uniform, skewed[:ALPHA], homogeneous:WxH, or weights: 256x256:3,1024x1024:1. Of several models: "
           "images:20,videos:1, or with sizes images[skewed]:20,videos[832x480x81]:1."),
]  # fmt: skip
Rate = Annotated[float, option("rate", "Requests per minute, on average.")]
Arrivals = Annotated[
    str, option("arrivals", "poisson, constant, gamma:cv=3, on-off:on_s=30,off_s=30 or step:at_s=300,factor=2.")
]
SloScale = Annotated[float, option("slo-scale", "Factor on the base deadlines of the sizes.")]
SloMultiple = Annotated[
    float | None, option("slo-multiple", "Instead: deadlines as a multiple of the time alone at degree 1.")
]
SloScales = Annotated[
    str, option("slo-scale", "Factor on the base deadlines of the sizes; NAME=FACTOR with commas for several models.")
]
SloMultiples = Annotated[
    str | None,
    option("slo-multiple", "Instead: deadlines as a multiple of the time alone at degree 1, or NAME=MULTIPLE."),
]
Requests = Annotated[int, option("requests", "Requests per seed.")]
Steps = Annotated[
    str | None,
    option("steps", "Denoise steps per request, or NAME=STEPS. Default: 28, and 50 of a video.", show_default=False),
]
Passes = Annotated[
    str | None,
    option("passes", "Passes of the model per step, or NAME=PASSES. Default: 1, and 2 of a video, which is guided.",
           show_default=False),
]  # fmt: skip
Cache = Annotated[
    str, option("cache", "Approximate cache: none, nirvana[:HIT_RATE], or skipped steps of 50: 10:0.3,25:0.2.")
]
FirstSeed = Annotated[int, option("seed", "The first workload's seed; the others follow it.")]
LateShare = Annotated[
    float,
    option("late-share", "Part of the pool's time owed to the request longest past its deadline, 0 to 1; 0 is none."),
]
Noise = Annotated[float, option("noise", "Standard deviation of task times, as a fraction of them.")]
Trace = Annotated[Path | None, option("trace", "CSV or JSON Lines of requests to replay, instead of making them up.")]
Format = Annotated[str, option("format", f"One of {', '.join(FORMATS)}.")]


def pool_config(
    ranks: int | None,
    degrees: str,
    device: str,
    threads: int,
    start_timeout: float,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT_S,
    log_format: str = "text",
    max_batch: int = 8,
    ranks_per_gpu: int = 1,
    collectives: str = "",
    encoder_ranks: int | None = None,
) -> PoolConfig:
    """The pool that the options describe.

    Raises:
        ConfigError: it cannot be.
    """
    from tetriserve.config import PoolConfig
    from tetriserve.launch import num_gpus

    try:
        parsed = tuple(int(degree) for degree in degrees.split(",") if degree.strip())
    except ValueError:
        raise ConfigError(f"degrees is {degrees!r}; write whole numbers with commas, such as 1,2,4") from None
    num_ranks = ranks if ranks is not None else ranks_per_gpu * (num_gpus() or 1) if device == "cuda" else 2
    return PoolConfig(
        num_ranks=num_ranks,
        degrees=parsed,
        device=device,
        ranks_per_gpu=ranks_per_gpu,
        collectives=collectives,
        encoder_ranks=encoder_ranks,
        num_threads=threads,
        max_batch=max_batch,
        start_timeout_s=start_timeout,
        heartbeat_timeout_s=heartbeat_timeout,
        log_format=log_format,
    )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises: ConfigError: `value` is none of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def is_json(format: str) -> bool:
    """Whether results are wanted as JSON. Raises: ConfigError: neither that nor a table."""
    check_choice("format", format, FORMATS)
    return format == "json"
