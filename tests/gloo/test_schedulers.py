"""Schedulers' state as named tensors: a fresh scheduler goes on from it as the one that left it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tetriserve.models.nesting import named, value_of
from tetriserve.models.schedulers import restore, state_of
from tetriserve.worker.bundle import arrays_of

NUM_STEPS = 7
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),  # as Wan's
    "unipc-3": lambda: diffusers.UniPCMultistepScheduler(solver_order=3, **FLOW),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
    "dpm++-3-flow": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3, **FLOW),
    "deis": lambda: diffusers.DEISMultistepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
}
KEEPING = ("unipc", "unipc-3", "dpm++", "dpm++-3-flow", "deis", "pndm")
"""Their steps depend on those before."""


@pytest.fixture(params=list(SCHEDULERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepared(name: str) -> Any:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def run(scheduler: Any, latents: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Steps `start` to `end`, for predictions that depend on the latents and the step alone."""
    for index in range(start, end):
        timestep = scheduler.timesteps[index]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
        prediction = (
            scheduler.scale_model_input(latents, timestep) * 0.3 + noise
            if hasattr(scheduler, "scale_model_input")
            else latents * 0.3 + noise
        )
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def test_a_fresh_scheduler_goes_on_from_any_step(name: str, tmp_path: Path) -> None:
    initial = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    num_steps = len(prepared(name).timesteps)
    expected = run(prepared(name), initial, 0, num_steps)
    is_wrong_without = False
    for steps_done in range(1, num_steps):
        first = prepared(name)
        latents = run(first, initial, 0, steps_done)
        save_file(state_of(first, SCHEDULERS[name]()), tmp_path / "state")
        state = load_file(tmp_path / "state")
        assert arrays_of((tmp_path / "state").read_bytes()).keys() == state.keys()  # the server can read it
        run(first, latents, steps_done, num_steps)  # what was left is not changed by the one that left it
        fresh = prepared(name)
        restore(fresh, state)
        assert torch.equal(run(fresh, latents.clone(), steps_done, num_steps), expected), steps_done
        if name in KEEPING:
            without = prepared(name)
            if hasattr(without, "_step_index"):
                without._step_index = steps_done
            is_wrong_without |= not torch.equal(run(without, latents.clone(), steps_done, num_steps), expected)
    assert is_wrong_without == (name in KEEPING)


def test_a_state_has_what_steps_change_and_no_constants() -> None:
    scheduler = prepared("unipc")
    run(scheduler, torch.randn(1, 4, 8, 8), 0, 3)
    state = state_of(scheduler, SCHEDULERS["unipc"]())
    fields = {key.split(":")[0].split("/")[1] for key in state}
    assert fields >= {"model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order", "_step_index"}
    assert not fields & {"betas", "alphas_cumprod", "config", "_internal_dict", "solver_order"}


VALUES = {
    "tensor": torch.arange(6.0).reshape(2, 3),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "no-bytes": torch.empty(0, 4, 5, dtype=torch.float16),
    "int": -3,
    "large-int": 2**53 + 1,
    "float": 0.1,
    "bool": True,
    "none": None,
    "list": [None, torch.tensor(1), 2, [], [False]],
    "tuple": (torch.ones(1), ()),
    "dict": {"0": [torch.ones(2)], "name": {"of_one": 1}},
    "empty-dict": {},
}


@pytest.mark.parametrize("kind", list(VALUES))
def test_values_come_back_as_they_went(kind: str, tmp_path: Path) -> None:
    value = VALUES[kind]
    tensors = named(value, "path")
    assert all(name.startswith("path") for name in tensors)
    save_file(tensors, tmp_path / "state")
    assert_same(value_of(load_file(tmp_path / "state"), "path"), value)


def assert_same(found: Any, value: Any) -> None:
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found, value)
    elif isinstance(value, dict):
        assert list(found) == list(value)
        for key in value:
            assert_same(found[key], value[key])
    elif isinstance(value, list | tuple):
        assert len(found) == len(value)
        for each in zip(found, value, strict=True):
            assert_same(*each)
    else:
        assert found == value


def test_values_are_copies() -> None:
    tensor = torch.zeros(2)
    tensors = named([tensor], "path")
    tensor.add_(1)
    value_of(tensors, "path")[0].add_(1)
    assert torch.equal(value_of(tensors, "path")[0], torch.zeros(2))


@pytest.mark.parametrize("value", ["text", [object()], {"a/b": 1}, {1: 2}])
def test_what_no_state_can_keep_is_named(value: object) -> None:
    with pytest.raises(TypeError, match="path.* is of type .*, which no state can keep"):
        named(value, "path")
