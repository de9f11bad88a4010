"""One tree of frozen values that says how a server is set up. Built once at the edge (CLI, Python API), not changed."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetriserve.core.errors import ConfigError

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The ranks and how they are looked after.

    degrees: allowed degrees of sequence parallelism; empty means the powers of two up to `num_ranks`.
    num_threads: intra-op threads of each worker. One is right on a CPU shared by several ranks.
    max_groups: live process groups at most, the least recently used goes first; 0 means 32, or twice the ranks if more.
    heartbeat_timeout_s: a worker silent for this long is taken for hung and replaced.
    step_timeout_s: a busy worker that finishes no step for this long is taken for hung and replaced.
    group_timeout_s: a collective that waits for a peer for this long fails.
    """

    num_ranks: int = 2
    degrees: tuple[int, ...] = ()
    device: str = "cpu"
    num_threads: int = 1
    max_groups: int = 0
    heartbeat_timeout_s: float = 10.0
    step_timeout_s: float = 600.0
    group_timeout_s: float = 30.0
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= 1024:
            raise ConfigError(f"ranks is {self.num_ranks}; allowed: 1 to 1024")
        if self.device not in DEVICES:
            raise ConfigError(f"device is {self.device!r}; allowed: {', '.join(DEVICES)}")
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
        if self.max_groups == 0:
            object.__setattr__(self, "max_groups", max(32, 2 * self.num_ranks))
        for name in ("num_threads", "max_groups", "heartbeat_timeout_s", "step_timeout_s", "group_timeout_s",
                     "start_timeout_s"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def backend(self) -> str:
        """Collective backend: NCCL between GPUs, gloo between CPU processes."""
        return "nccl" if self.device == "cuda" else "gloo"

    def device_of(self, rank: int) -> str:
        """torch's name of the rank's device; one process per GPU."""
        return f"cuda:{rank}" if self.device == "cuda" else "cpu"


@dataclass(frozen=True, kw_only=True)
class SchedulingConfig:
    """What decides order and degrees.

    policy: a registered policy's name, with its argument after a colon (`fixed:2`, `tetriserve:scale_up=off`).
    default_slo_scale: deadline of a request that names none, as a multiple of its time alone at degree 1.
    max_queue: unfinished requests that may wait beyond the running ones before admission refuses more.
    """

    policy: str = "tetriserve"
    default_slo_scale: float = 3.0
    max_queue: int = 256

    def __post_init__(self) -> None:
        if not self.default_slo_scale > 0:
            raise ConfigError(f"default_slo_scale is {self.default_slo_scale}; it must be above 0")
        if self.max_queue < 1:
            raise ConfigError(f"max_queue is {self.max_queue}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP side. `shutdown_timeout_s` bounds how long SIGTERM waits for accepted requests."""

    host: str = "127.0.0.1"
    port: int = 8000
    shutdown_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; allowed: 0 to 65535")
        if not self.shutdown_timeout_s >= 0:
            raise ConfigError(f"shutdown_timeout is {self.shutdown_timeout_s}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """A whole engine: `model` is a diffusers checkpoint directory, None the bundled small model.

    profile: path of a profile file; None finds, or measures, one for this model and machine.
    """

    model: str | None = None
    profile: str | None = None
    served_model_name: str | None = None
    pool: PoolConfig = field(default_factory=PoolConfig)
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
