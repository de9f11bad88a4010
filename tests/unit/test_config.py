"""Configuration is checked when it is made: every mistake is one line with the value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from tetriserve.config import ApiConfig, EngineConfig, ModelConfig, PoolConfig, SchedulingConfig, ServerConfig
from tetriserve.core.errors import ConfigError


@pytest.mark.parametrize(
    ("num_ranks", "degrees"), [(1, (1,)), (2, (1, 2)), (3, (1, 2)), (4, (1, 2, 4)), (7, (1, 2, 4)), (8, (1, 2, 4, 8))]
)
def test_degrees_default_to_the_powers_of_two_up_to_the_ranks(num_ranks: int, degrees: tuple[int, ...]) -> None:
    assert PoolConfig(num_ranks=num_ranks).degrees == degrees


def test_given_degrees_are_sorted_and_kept_once() -> None:
    assert PoolConfig(num_ranks=4, degrees=(4, 1, 4, 3)).degrees == (1, 3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_ranks": 0}, "ranks is 0; allowed: 1 to 1024"),
        ({"num_ranks": 1025}, "ranks is 1025; allowed: 1 to 1024"),
        ({"device": "tpu"}, "device is 'tpu'; allowed: cpu, cuda"),
        ({"collectives": "mpi"}, "collectives is 'mpi'; allowed: shm, torch"),
        ({"ranks_per_gpu": 2}, "ranks-per-gpu is 2, but device is cpu; use --device cuda"),
        ({"ranks_per_gpu": 5, "device": "cuda", "num_ranks": 4}, "ranks-per-gpu is 5; allowed: 1 to 4"),
        ({"ranks_per_gpu": 0, "device": "cuda"}, "ranks-per-gpu is 0; allowed: 1 to 2"),
        ({"degrees": (2,)}, "degrees is 2; it must contain 1, at which encode and decode run"),
        ({"degrees": (0, 1)}, "degrees is 0,1; a degree is at least 1"),
        ({"num_ranks": 2, "degrees": (1, 4)}, "degrees is 1,4 with 2 ranks; use --ranks 4 or degrees of at most 2"),
        ({"num_threads": 0}, "threads is 0; allowed: 1 to 1024"),
        ({"max_batch": 65}, "max-batch is 65; allowed: 1 to 64"),
        ({"resident_bytes": -1}, "resident_bytes is -1; allowed: 0 to 1125899906842624"),
        ({"max_groups": -1}, "max_groups is -1; allowed: 1 to 1000000"),
        ({"heartbeat_timeout_s": -1.0}, "heartbeat-timeout is -1; allowed: 0.001 to 604800"),
        ({"step_timeout_s": float("nan")}, "step-timeout is nan; allowed: 0.001 to 604800"),
        ({"group_timeout_s": 0.0}, "group-timeout is 0; allowed: 0.001 to 604800"),
        ({"start_timeout_s": 0.0}, "start-timeout is 0; allowed: 0.001 to 604800"),
    ],
)
def test_an_impossible_pool_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolConfig(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SchedulingConfig, {"default_slo_scale": 0.0}, "default-slo-scale is 0; allowed: 0.001 to 1e+06"),
        (SchedulingConfig, {"default_slo_scale": float("nan")}, "default-slo-scale is nan; allowed: 0.001 to 1e+06"),
        (SchedulingConfig, {"max_queue": 0}, "max-queue is 0; allowed: 1 to 1000000"),
        (SchedulingConfig, {"max_losses": -1}, "max-losses is -1; allowed: 0 to 1000"),
        (ApiConfig, {"compat": "loose"}, "compat is 'loose'; allowed: lenient, strict"),
        (ApiConfig, {"url_ttl_s": -1.0}, "url-ttl is -1; allowed: 0 to 604800"),
        (ApiConfig, {"url_ttl_s": float("nan")}, "url-ttl is nan; allowed: 0 to 604800"),
        (ApiConfig, {"preview_side": 8}, "preview-size is 8; allowed: 16 to 4096"),
        (ServerConfig, {"port": 65536}, "port is 65536; allowed: 0 to 65535"),
        (ServerConfig, {"port": -1}, "port is -1; allowed: 0 to 65535"),
        (ServerConfig, {"shutdown_timeout_s": -0.5}, "shutdown-timeout is -0.5; allowed: 0 to 604800"),
        (ServerConfig, {"shutdown_timeout_s": float("nan")}, "shutdown-timeout is nan; allowed: 0 to 604800"),
    ],
)
def test_an_impossible_setting_is_refused(kind: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**settings)
    assert str(caught.value) == message


def test_each_gpu_has_a_process_of_its_own_and_nccl_and_a_cpu_pool_has_gloo() -> None:
    gpus, cores = PoolConfig(num_ranks=4, device="cuda"), PoolConfig(num_ranks=4)
    assert (gpus.backend, gpus.device_of(3)) == ("nccl", "cuda:3")
    assert (cores.backend, cores.device_of(3)) == ("gloo", "cpu")


def test_the_default_engine_is_the_bundled_model_on_two_cpu_ranks() -> None:
    config = EngineConfig()
    assert config.models == (ModelConfig(),)
    assert (config.models[0].path, config.models[0].profile) == (None, None)
    assert (config.pool.num_ranks, config.pool.device, config.scheduling.policy) == (2, "cpu", "lookahead")
