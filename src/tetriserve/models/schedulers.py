"""What diffusers' schedulers keep between steps, as named tensors: a rank that goes on with a request needs it.

A multistep solver has the model's last answers, and all have their place in the schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from tetriserve.models.nesting import named, value_of

_FIELD = "scheduler/"
_NO_STATE = ("_internal_dict",)
"""The configuration, from which each scheduler is made."""


def state_of(scheduler: Any, unused: Any) -> dict[str, torch.Tensor]:
    """Copies of the fields in which `scheduler` differs from `unused`, one of the same configuration.

    Fields that are neither tensors nor numbers, nor None, nor lists of these, are left out: functions, and what of
    their own a scheduler may make. Only a comparison with an undisturbed run shows whether it does without them.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in vars(scheduler).items():
        if name in _NO_STATE or (name in vars(unused) and _is_same(value, vars(unused)[name])):
            continue
        with contextlib.suppress(TypeError):
            state |= named(value, _FIELD + name)
    return state


def restore(scheduler: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Set the fields that are in `state`, of `state_of`; `scheduler` has the same timesteps set. Copies the tensors."""
    paths = {name.split(":")[0].split("/")[1] for name in state if name.startswith(_FIELD)}
    for name in sorted(paths):
        setattr(scheduler, name, value_of(state, _FIELD + name))


def _is_same(first: object, second: object) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return (first.dtype, first.device) == (second.dtype, second.device) and torch.equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_is_same, first, second))
    return bool(first is second or (isinstance(first, bool | int | float | str | None) and first == second))
