"""What classes of diffusers take, and their defaults, read from its source: the server loads no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

REQUIRED = object()
"""In place of a default: the call must be given a value."""
_MAX_BASES = 8


def call_of(pipeline_class: str) -> Mapping[str, object]:
    """The parameters of `pipeline_class.__call__` after self, with their defaults as plain values.

    A default that is no literal is None.

    Raises:
        LookupError: diffusers has no public class of that name, or it cannot be called.
    """
    if not re.fullmatch(r"\w+", pipeline_class, re.ASCII) or not _is_public(pipeline_class):
        raise LookupError(f"diffusers has no class {pipeline_class!r}")
    names = [pipeline_class]
    for _ in range(_MAX_BASES):
        if not names:
            break
        found = _class_named(names.pop(0), "pipelines")
        if found is None:
            continue
        if (parameters := _parameters_of(found, "__call__")) is not None:
            return parameters
        names += [base.id for base in found.bases if isinstance(base, ast.Name)]
    raise LookupError(f"{pipeline_class} of diffusers has no call")


def configuration_of(model_class: str) -> Mapping[str, object]:
    """The configuration of a model whose `config.json` says nothing: defaults of `model_class.__init__`, as above.

    Empty if diffusers has no public model of that name.
    """
    if not re.fullmatch(r"\w+", model_class, re.ASCII) or not _is_public(model_class):
        return {}
    found = _class_named(model_class, "models")
    return (_parameters_of(found, "__init__") if found is not None else None) or {}


def _parameters_of(found: ast.ClassDef, method: str) -> dict[str, object] | None:
    """None if the class itself does not define it."""
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return dict(_parameters(node.args))
    return None


def _parameters(arguments: ast.arguments) -> Iterator[tuple[str, object]]:
    positional = [*arguments.posonlyargs, *arguments.args][1:]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += [*arguments.defaults, *arguments.kw_defaults]
    for argument, default in zip([*positional, *arguments.kwonlyargs], defaults, strict=True):
        if default is None:
            yield argument.arg, REQUIRED
            continue
        try:
            yield argument.arg, ast.literal_eval(default)
        except ValueError:
            yield argument.arg, None


def _is_public(name: str) -> bool:
    return re.search(rf'^\s+"{name}",$', (_root() / "__init__.py").read_text(), re.MULTILINE) is not None


def _class_named(name: str, folder: str) -> ast.ClassDef | None:
    for file in sorted(_root().glob(f"{folder}/**/*.py")):
        text = file.read_text()
        if f"\nclass {name}(" in text:
            return next(
                (each for each in ast.parse(text).body if isinstance(each, ast.ClassDef) and each.name == name), None
            )
    return None


@cache
def _root() -> Path:
    spec = find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
