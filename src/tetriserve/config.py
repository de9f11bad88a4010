"""One tree of frozen values that says how a server is set up. Built once at the edge (CLI, Python API), not changed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tetriserve.core.bounds import MAX_RANKS, MAX_REQUESTS, MAX_TIME_S, SLO_SCALES, check_range
from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import DEFAULT, REGIONAL, TEXT_ENCODERS, VAE, Execution
from tetriserve.core.plan import LATE_SHARE

DEVICES = ("cpu", "cuda")
COLLECTIVES = ("shm", "torch")
MAX_BATCH = 64
LOG_FORMATS = ("text", "json")
LENIENT, STRICT = "lenient", "strict"
COMPATS = (LENIENT, STRICT)

MODEL_NAMES = "1 to 200 printable characters without spaces around them"
_MAX_TTL_S = 366 * 24 * 3600.0
_KEY = re.compile(r"[!-~]+")
_MODEL_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#]+")


def is_model_name(name: str) -> bool:
    """Whether clients can be told to write `name`; see `MODEL_NAMES`."""
    return 1 <= len(name) <= 200 and name.isprintable() and name == name.strip()


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The ranks and how they are looked after.

    encoder_ranks: of the ranks that hold a model, the first so many hold its text encoders and encode; None: all do.
    degrees: allowed degrees of sequence parallelism; empty means the powers of two up to `num_ranks`.
    ranks_per_gpu: how many ranks share each GPU. More than one proves correctness, and is slower.
    collectives: how the ranks of a task exchange tensors: through shared memory (`shm`), or by torch's process groups
        (`torch`: NCCL between GPUs, else gloo); empty means torch where each rank has a GPU of its own, else shm.
    num_threads: intra-op threads of each worker. One is right on a CPU shared by several ranks.
    max_batch: requests that may share a task at most, where that pays; 1 for none.
    max_groups: live process groups of torch in each rank at most, the least recently used goes first; 0 means 32, or
        twice the ranks if more.
    resident_bytes: of requests' states that each rank keeps beside their copies in the store; what was used least
        recently goes first, and is loaded again where it is needed.
    heartbeat_timeout_s: a worker silent for this long is taken for hung and replaced.
    step_timeout_s: a busy worker that finishes no step for this long is taken for hung and replaced; 0 means 60 on a
        GPU and 600 on a CPU.
    group_timeout_s: a collective of torch that waits for a peer for this long fails.
    log_format: one of `LOG_FORMATS`, for what workers log.
    """

    num_ranks: int = 2
    encoder_ranks: int | None = None
    degrees: tuple[int, ...] = ()
    device: str = "cpu"
    ranks_per_gpu: int = 1
    collectives: str = ""
    num_threads: int = 1
    max_batch: int = 8
    max_groups: int = 0
    resident_bytes: int = 2**30
    heartbeat_timeout_s: float = 10.0
    step_timeout_s: float = 0.0
    group_timeout_s: float = 30.0
    start_timeout_s: float = 300.0
    log_format: str = "text"

    def __post_init__(self) -> None:
        check_range("ranks", self.num_ranks, 1, MAX_RANKS)
        if self.encoder_ranks is not None:
            check_range("encoder-ranks", self.encoder_ranks, 1, self.num_ranks)
        if self.device not in DEVICES:
            raise ConfigError(f"device is {self.device!r}; allowed: {', '.join(DEVICES)}")
        check_range("ranks-per-gpu", self.ranks_per_gpu, 1, self.num_ranks)
        if self.ranks_per_gpu > 1 and self.device != "cuda":
            raise ConfigError(f"ranks-per-gpu is {self.ranks_per_gpu}, but device is {self.device}; use --device cuda")
        if self.collectives not in ("", *COLLECTIVES):
            raise ConfigError(f"collectives is {self.collectives!r}; allowed: {', '.join(COLLECTIVES)}")
        object.__setattr__(self, "collectives", self.collectives or self.usual_collectives)
        if not self.degrees:
            powers = tuple(2**i for i in range(self.num_ranks.bit_length()) if 2**i <= self.num_ranks)
            object.__setattr__(self, "degrees", powers)
        degrees = tuple(sorted(set(self.degrees)))
        object.__setattr__(self, "degrees", degrees)
        if degrees[0] < 1:
            raise ConfigError(f"degrees is {_listed(degrees)}; a degree is at least 1")
        if degrees[0] != 1:
            raise ConfigError(f"degrees is {_listed(degrees)}; it must contain 1, at which encode and decode run")
        if degrees[-1] > self.num_ranks:
            raise ConfigError(
                f"degrees is {_listed(degrees)} with {self.num_ranks} ranks; "
                f"use --ranks {degrees[-1]} or degrees of at most {self.num_ranks}"
            )
        if self.step_timeout_s == 0:
            object.__setattr__(self, "step_timeout_s", 60.0 if self.device == "cuda" else 600.0)
        if self.max_groups == 0:
            object.__setattr__(self, "max_groups", max(32, 2 * self.num_ranks))
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log-format is {self.log_format!r}; allowed: {', '.join(LOG_FORMATS)}")
        check_range("max-batch", self.max_batch, 1, MAX_BATCH)
        check_range("threads", self.num_threads, 1, 1024)
        check_range("max_groups", self.max_groups, 1, 1_000_000)
        check_range("resident_bytes", self.resident_bytes, 0, 2**50)
        for name in ("heartbeat_timeout", "step_timeout", "group_timeout", "start_timeout"):
            check_range(name.replace("_", "-"), getattr(self, f"{name}_s"), 0.001, MAX_TIME_S)

    @property
    def has_own_gpus(self) -> bool:
        """Whether each rank has a GPU that no other rank uses."""
        return self.device == "cuda" and self.ranks_per_gpu == 1

    @property
    def usual_collectives(self) -> str:
        return "torch" if self.has_own_gpus else "shm"

    @property
    def backend(self) -> str:
        """Of torch's process groups: NCCL refuses ranks that share a GPU, and gloo takes its tensors too."""
        return "nccl" if self.has_own_gpus else "gloo"

    @property
    def heartbeat_s(self) -> float:
        """Between two signs of life of a worker."""
        return self.heartbeat_timeout_s / 5

    @property
    def num_gpus(self) -> int:
        """As many as the ranks need; 0 on a CPU."""
        return -(-self.num_ranks // self.ranks_per_gpu) if self.device == "cuda" else 0

    def device_of(self, rank: int) -> str:
        """torch's name of the rank's device."""
        return f"cuda:{rank // self.ranks_per_gpu}" if self.device == "cuda" else "cpu"


@dataclass(frozen=True, kw_only=True)
class SchedulingConfig:
    """What decides order and degrees.

    policy: a registered policy's name, with its argument after a colon (`fixed:2`, `tetriserve:scale_up=off`).
    default_slo_scale: deadline of a request that names none, as a multiple of its time alone at degree 1.
    max_queue: unfinished requests that may wait beyond the running ones before admission refuses more.
    max_losses: how often in a row a request's workers may be lost before it is failed: it may be what kills them.
    late_share: part of the pool's rank time that is owed to the request longest past its deadline.
    """

    policy: str = "lookahead"
    default_slo_scale: float = 3.0
    max_queue: int = 256
    max_losses: int = 5
    late_share: float = LATE_SHARE

    def __post_init__(self) -> None:
        check_range("default-slo-scale", self.default_slo_scale, *SLO_SCALES)
        check_range("max-queue", self.max_queue, 1, MAX_REQUESTS)
        check_range("max-losses", self.max_losses, 0, 1000)
        check_range("late-share", self.late_share, 0, 1)


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Who may use the server, and how much. Keys are left out of `repr`, so that no log shows them.

    api_keys: clients send one of them; empty: everyone is welcome, and all together count as one key.
    rate_limit: images per minute and key; None: no limit. A minute's worth may come at once.
    max_concurrency: unanswered images per key; None: no limit.
    guard_metrics: `/metrics` takes a key too.
    cors_origins: origins whose pages may call the server from a browser, or `*`; empty: none.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    rate_limit: int | None = None
    max_concurrency: int | None = None
    guard_metrics: bool = False
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for number, key in enumerate(self.api_keys, start=1):
            if not _KEY.fullmatch(key):
                problem = "is empty" if not key else "holds a space or a character outside ASCII"
                raise ConfigError(f"api-key {number} {problem}; allowed: 1 or more printable ASCII characters")
        for name, limit in (("rate-limit", self.rate_limit), ("max-concurrency", self.max_concurrency)):
            if limit is not None:
                check_range(name, limit, 1, MAX_REQUESTS)
        if self.guard_metrics and not self.api_keys:
            raise ConfigError("guard-metrics is set without a key to ask for; add --api-key")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors-origin is {origin!r}; write an origin such as https://example.org, or *")


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """How requests are read, and what answers look like.

    compat: what becomes of parameters that are not served and that no picture depends on: `lenient` ignores them and
        says so in the answer's `warnings`, `strict` refuses them.
    url_ttl_s: how long the images of `response_format: url` can be fetched; 0: that format is refused.
    preview_side: the longer side of previews in pixels at most.
    """

    compat: str = LENIENT
    url_ttl_s: float = 3600.0
    preview_side: int = 256

    def __post_init__(self) -> None:
        if self.compat not in COMPATS:
            raise ConfigError(f"compat is {self.compat!r}; allowed: {', '.join(COMPATS)}")
        check_range("url-ttl", self.url_ttl_s, 0, MAX_TIME_S)
        check_range("preview-size", self.preview_side, 16, 4096)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP side.

    shutdown_timeout_s: how long SIGTERM waits for accepted requests.
    otlp_traces_endpoint: URL that takes OpenTelemetry spans (OTLP over HTTP); None: no spans.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    shutdown_timeout_s: float = 60.0
    access: AccessConfig = field(default_factory=AccessConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    otlp_traces_endpoint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("shutdown-timeout", self.shutdown_timeout_s, 0.0, MAX_TIME_S)
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            # Not quoted: it may hold a password.
            raise ConfigError(
                "otlp-traces-endpoint is no URL of HTTP; write one such as http://localhost:4318/v1/traces"
            )
        if endpoint is not None and "?" in endpoint:
            raise ConfigError(
                "otlp-traces-endpoint has a query, which OpenTelemetry logs; put tokens into OTEL_EXPORTER_OTLP_HEADERS"
            )


@dataclass(frozen=True, kw_only=True)
class JournalConfig:
    """What outlives the server, and for how long: `directory` holds it, finished work for `result_ttl_s`."""

    directory: str
    result_ttl_s: float = 3600.0

    def __post_init__(self) -> None:
        check_range("result-ttl", self.result_ttl_s, 0.001, _MAX_TTL_S)


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How to run the model, where not as its directory says and as diffusers does it. See `core.execution.Execution`.

    dtype: None is as its directory says.
    attention, quantization: a value of `Execution`.
    compile: compile the transformer's repeated blocks, one graph for each shape.
    vae_tiling: decode large pictures in tiles.
    offload_text_encoders: keep them in the CPU's memory between encodes.

    Raises:
        ConfigError: a value that is not implemented; the message lists those that are.
    """

    dtype: str | None = None
    attention: str = DEFAULT
    compile: bool = False
    quantization: str = DEFAULT
    vae_tiling: bool = False
    offload_text_encoders: bool = False

    def __post_init__(self) -> None:
        self.of("bfloat16")  # which goes with every other value

    def of(self, own_dtype: str) -> Execution:
        """The execution of a model whose directory says `own_dtype`.

        Raises:
            ConfigError: the values do not go together.
        """
        return Execution(
            dtype=self.dtype or own_dtype,
            attention=self.attention,
            compile=REGIONAL if self.compile else DEFAULT,
            quantization=self.quantization,
            tiling=VAE if self.vae_tiling else DEFAULT,
            offload=TEXT_ENCODERS if self.offload_text_encoders else DEFAULT,
        )


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """An adapter that requests may name: `path` is a safetensors file, or a directory with one."""

    name: str
    path: str

    @classmethod
    def parse(cls, text: str) -> LoraConfig:
        """Read `NAME=PATH`.

        Raises:
            ConfigError: it is not of that form.
        """
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"lora is {text[:200]!r}; write NAME=PATH, such as sketch=loras/sketch.safetensors")
        return cls(name, path)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of a pool, and how it is served.

    name: what requests, answers and logs call it. It may be empty where no other model is served: then the model has
        the checkpoint's own name.
    path: a diffusers checkpoint directory; None is the bundled small model.
    profile: path of a profile file, which every start takes as it is written; None finds, or measures, one for this
        model and machine, and takes up what the last engine learnt about it.
    served_model_names: what clients call the model beside its name; where it has none, the first is what answers call
        it, instead of the checkpoint's own name.
    max_sequence_length: text tokens of every request that asks for no other number; None is the model's own.
    execution: how the model is run.
    adapter: the name of the family to serve the model, `generic` for pipelines that no family knows; None is the one
        that serves its pipeline class.
    loras: adapters that requests may name.
    ranks: those of the pool that hold the model; empty: all.
    """

    name: str = ""
    path: str | None = None
    profile: str | None = None
    served_model_names: tuple[str, ...] = ()
    max_sequence_length: int | None = None
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    adapter: str | None = None
    loras: tuple[LoraConfig, ...] = ()
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name and not _MODEL_KEY.fullmatch(self.name):
            raise ConfigError(f"a model is called {self.name[:200]!r}; allowed: 1 to 64 of A-Z a-z 0-9 . _ -")
        if self.name == "default":
            raise ConfigError("a model is called 'default', by which clients mean the first; give it another name")
        for name in self.served_model_names:
            if not is_model_name(name):
                raise ConfigError(f"served-model-name is {name[:200]!r}; allowed: {MODEL_NAMES}")
        object.__setattr__(self, "ranks", tuple(sorted(set(self.ranks))))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """A whole engine.

    models: at least one. Requests that name none are for the first that makes what they ask for.
    remeasure: measure profiles even if some are found.
    journal: None keeps nothing.
    """

    models: tuple[ModelConfig, ...] = (ModelConfig(),)
    remeasure: bool = False
    pool: PoolConfig = field(default_factory=PoolConfig)
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    journal: JournalConfig | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no model is named; name at least one")
        named = next((model.profile for model in self.models if model.profile is not None), None)
        if self.remeasure and named is not None:
            raise ConfigError(f"remeasure is set beside profile {named}, which would not be used; leave one out")
        names = [model.name for model in self.models]
        if len(names) > 1 and "" in names:
            raise ConfigError(f"{len(names)} models are served, and one has no name; give each a name of its own")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two models are called {twice!r}; give each a name of its own")
        self._check_ranks()

    def _check_ranks(self) -> None:
        every = range(self.pool.num_ranks)
        held: set[int] = set()
        for model in self.models:
            if outside := [rank for rank in model.ranks if rank not in every]:
                raise ConfigError(
                    f"model-ranks of {model.name or 'the model'} names rank {outside[0]}; allowed: 0 to {every[-1]}"
                )
            held.update(model.ranks or every)
        if idle := [rank for rank in every if rank not in held]:
            what = f"rank {idle[0]} holds" if len(idle) == 1 else f"ranks {_listed(tuple(idle))} hold"
            raise ConfigError(f"{what} no model; name them in model-ranks, or use fewer --ranks")


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
