"""Nested values as named tensors, the form in which a state travels between ranks and into the store.

A tensor is named by its path. All else has a kind after the path: `step:int`, `outputs:list` (its length), whose items
are `outputs/0` and so on. Tensors in the memory of the host say so (`sigmas:cpu`), and stay there when they are read
on a rank with a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_NUMBERS: tuple[tuple[type, torch.dtype], ...] = (
    (bool, torch.bool),  # before int, of which it is a subclass
    (int, torch.int64),
    (float, torch.float64),
)
_NONE, _CPU, _DICT = "none", "cpu", "dict"
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple}
_KEY = re.compile(r"\w+", re.ASCII)


def named(value: object, path: str) -> dict[str, torch.Tensor]:
    """Copies of the tensors in `value`, and the rest of it as tensors; all names begin with `path`.

    Raises:
        TypeError: something in it is no tensor, number, None, list, tuple or dict whose keys are words; the message
            names its path and type.
    """
    return dict(_named(value, path))


def value_of(tensors: Mapping[str, torch.Tensor], path: str) -> Any:
    """What `named` was given under `path`. Tensors are copies: the caller may write to them.

    Raises:
        KeyError: nothing has that name.
    """
    if path in tensors:
        return tensors[path].clone()
    if f"{path}:{_CPU}" in tensors:
        return tensors[f"{path}:{_CPU}"].cpu().clone()
    if f"{path}:{_NONE}" in tensors:
        return None
    for number, _ in _NUMBERS:
        if (stored := tensors.get(f"{path}:{number.__name__}")) is not None:
            return number(stored.item())
    for name, kind in _SEQUENCES.items():
        if (stored := tensors.get(f"{path}:{name}")) is not None:
            return kind(value_of(tensors, f"{path}/{index}") for index in range(int(stored)))
    keys = bytes(tensors[f"{path}:{_DICT}"].tolist()).decode()
    return {key: value_of(tensors, f"{path}/{key}") for key in keys.splitlines()}


def with_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with each tensor in its lists, tuples and dicts changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(with_tensors(change, each) for each in value)
    if type(value) is dict:
        return {key: with_tensors(change, each) for key, each in value.items()}
    return value


def _named(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield (f"{path}:{_CPU}" if value.device.type == "cpu" else path), value.detach().clone()
        return
    if value is None:
        yield f"{path}:{_NONE}", torch.zeros(1, dtype=torch.uint8)
        return
    for number, dtype in _NUMBERS:
        if type(value) is number:
            yield f"{path}:{number.__name__}", torch.tensor(value, dtype=dtype)
            return
    for name, kind in _SEQUENCES.items():
        if type(value) is kind:
            yield f"{path}:{name}", torch.tensor(len(value))  # type: ignore[arg-type]
            for index, each in enumerate(value):  # type: ignore[arg-type, var-annotated]
                yield from _named(each, f"{path}/{index}")
            return
    if type(value) is dict and all(isinstance(key, str) and _KEY.fullmatch(key) for key in value):
        yield f"{path}:{_DICT}", torch.tensor(list("\n".join(value).encode()), dtype=torch.uint8)
        for key, each in value.items():
            yield from _named(each, f"{path}/{key}")
        return
    raise TypeError(f"{path} is of type {type(value).__name__}, which no state can keep")
