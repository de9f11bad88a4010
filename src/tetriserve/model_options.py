"""What `serve` is told of its models: one directory, or several models by name, and what holds for one of them alone.

Options of a model (`OPTIONS`) hold for all models in their own spelling, and for one in `--model-option`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tetriserve.core.errors import ConfigError
from tetriserve.options import ENV, option

if TYPE_CHECKING:
    from tetriserve.config import ModelConfig

BUNDLED = "bundled"
"""Stands for the bundled model where a directory is asked for."""

Models = Annotated[
    list[str] | None,
    typer.Option("--model", envvar=ENV + "MODELS",
                 help="NAME=DIR of one of several models, instead of MODEL (repeatable; bundled for the small model "
                 "that comes along). Requests name theirs.", show_default=False),
]  # fmt: skip
ModelRanks = Annotated[
    list[str] | None,
    option("model-ranks", "NAME=RANKS: only these ranks hold the model, such as video=0-3 or video=0,2 (repeatable). "
           "Default: all.", show_default=False),
]  # fmt: skip
ModelOption = Annotated[
    list[str] | None,
    option("model-option", "NAME=OPTION[=VALUE]: an option of one model alone, such as video=vae-tiling or "
           "images=profile=flux.json (repeatable).", show_default=False),
]  # fmt: skip

_SWITCHES = ("compile", "vae-tiling", "offload-text-encoders")
_EXECUTION = (*_SWITCHES, "attention", "quantization")
_LISTS = ("lora", "served-model-name")
OPTIONS = ("profile", "adapter", "max-sequence-length", *_EXECUTION, *_LISTS)
_ON_OFF = {"": True, "on": True, "off": False}


def model_configs(
    common: ModelConfig,
    models: Sequence[str] = (),
    model_ranks: Sequence[str] = (),
    model_options: Sequence[str] = (),
) -> tuple[ModelConfig, ...]:
    """The models to serve.

    Args:
        common: MODEL, and what the options of a model say in their own spelling.
        models, model_ranks, model_options: as the operator wrote them.

    Raises:
        ConfigError: they contradict each other, or cannot be read; one line says which.
    """
    if not models:
        for name, values in (("model-ranks", model_ranks), ("model-option", model_options)):
            if values:
                raise ConfigError(f"{name} is {values[0][:200]!r}, and no --model has a name; write --model NAME=DIR")
        return (common,)
    if common.path is not None:
        raise ConfigError(f"model {common.path} stands beside --model {models[0][:200]}; leave one out")
    paths = dict(_named(models, "model", "DIR", "images=models/flux"))
    if len(models) > 1:
        _check_common(common, next(iter(paths)))
    ranks = dict(_known(_named(model_ranks, "model-ranks", "RANKS", "video=0-3"), "model-ranks", paths))
    said: dict[str, list[tuple[str, str]]] = {name: [] for name in paths}
    for name, text in _known(
        _named(model_options, "model-option", "OPTION", "video=vae-tiling", is_once=False), "model-option", paths
    ):
        key, _, value = text.partition("=")
        said[name].append((key, value))
    return tuple(
        _with_options(
            replace(
                common,
                name=name,
                path=None if path == BUNDLED else path,
                ranks=_ranks(name, ranks[name]) if name in ranks else (),
            ),
            said[name],
        )
        for name, path in paths.items()
    )


def _check_common(common: ModelConfig, first: str) -> None:
    """Raises: ConfigError: it says of all models what can be true of one alone."""
    alone = {
        "profile": common.profile,
        "lora": next((f"{lora.name}={lora.path}" for lora in common.loras), None),
        "served-model-name": next(iter(common.served_model_names), None),
    }
    for name, value in alone.items():
        if value is not None:
            raise ConfigError(
                f"{name} is {value[:200]!r}, and several models are served; say of which, such as "
                f"--model-option {first}={name}={value[:200]}"
            )


def _named(
    values: Sequence[str], flag: str, what: str, example: str, *, is_once: bool = True
) -> Iterator[tuple[str, str]]:
    """What follows each NAME=. Raises: ConfigError: there is no name, or it comes twice where `is_once`."""
    seen: set[str] = set()
    for text in values:
        name, _, rest = text.partition("=")
        if not (name and rest):
            raise ConfigError(f"{flag} is {text[:200]!r}; write NAME={what}, such as {example}")
        if is_once and name in seen:
            raise ConfigError(f"{flag} names {name[:200]!r} twice; leave one out")
        seen.add(name)
        yield name, rest


def _known(named: Iterator[tuple[str, str]], flag: str, models: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, rest in named:
        if name not in models:
            raise ConfigError(f"{flag} names {name[:200]!r}, which no --model does; allowed: {', '.join(models)}")
        yield name, rest


def _ranks(name: str, text: str) -> tuple[int, ...]:
    """
    >>> _ranks("video", "0-2,5")
    (0, 1, 2, 5)
    """
    ranks: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and end.isascii() and len(end) <= 4 for end in ends) or int(ends[0]) > int(ends[1]):
            raise ConfigError(f"model-ranks of {name} is {text[:200]!r}; write ranks such as 0-3 or 0,2")
        ranks += range(int(ends[0]), int(ends[1]) + 1)
    return tuple(ranks)


def _with_options(model: ModelConfig, said: Sequence[tuple[str, str]]) -> ModelConfig:
    from tetriserve.config import LoraConfig

    fields: dict[str, Any] = {}
    execution: dict[str, Any] = {}
    loras, names = [*model.loras], [*model.served_model_names]
    for key, value in said:
        where = f"model-option {model.name}={key[:200]}"
        if key not in OPTIONS:
            raise ConfigError(f"{where} is no option of a model; allowed: {', '.join(OPTIONS)}")
        if key in fields or key in execution:
            raise ConfigError(f"{where} is given twice; leave one out")
        if key in _SWITCHES:
            if value not in _ON_OFF:
                raise ConfigError(f"{where} is {value[:200]!r}; allowed: on, off")
            execution[key] = _ON_OFF[value]
        elif not value:
            raise ConfigError(f"{where} has no value; write {where}=VALUE")
        elif key == "lora":
            loras.append(LoraConfig.parse(value))
        elif key == "served-model-name":
            names.append(value)
        elif key == "max-sequence-length":
            if not (value.isdecimal() and len(value) <= 9):
                raise ConfigError(f"{where} is {value[:200]!r}; write a whole number")
            fields[key] = int(value)
        elif key in _EXECUTION:
            execution[key] = value
        else:
            fields[key] = value
    return replace(
        model,
        **{key.replace("-", "_"): value for key, value in fields.items()},
        execution=replace(model.execution, **{key.replace("-", "_"): value for key, value in execution.items()}),
        loras=tuple(loras),
        served_model_names=tuple(names),
    )
