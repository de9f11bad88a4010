"""Asking the server what it is before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tetriserve.bench.connections import Answer, Connections, Unanswered
from tetriserve.bench.target import Target
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Shape

_CHECK_TIMEOUT_S = 10.0


async def find_target(connections: Connections, model: str | None) -> Target:
    """Ask `/v1/models`. A server that has no such route is taken as it is.

    Args:
        model: the one to use; None takes the first.

    Raises:
        ConfigError: nobody answers, the key is refused, the server is not ready, or does not serve `model`.
    """
    try:
        answer = await connections.exchange("GET", "/v1/models", timeout_s=_CHECK_TIMEOUT_S)
    except Unanswered as error:
        raise ConfigError(f"no server to measure: {error}; --no-check goes on all the same") from None
    if answer.status in (401, 403):
        raise ConfigError(f"the server refuses the API key ({answer.status}); set OPENAI_API_KEY or --api-key")
    if answer.status == 503:
        raise ConfigError(f"the server is not ready: {error_message(answer)}")
    models = _models(answer)
    if model is None:
        return _target(models[0]) if models else Target()
    found = next((entry for entry in models if entry["id"] == model), None)
    if models and found is None:
        raise ConfigError(f"model {model!r} is not served; served: {', '.join(str(entry['id']) for entry in models)}")
    return Target(model=model) if found is None else _target(found)


def error_message(answer: Answer) -> str:
    """What the server says went wrong, in one line: from OpenAI's envelope, else the body's beginning."""
    try:
        text = json.loads(answer.body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = answer.body[:200].decode("utf-8", "replace")
    return " ".join(str(text).split())[:200] or "no reason given"


def _models(answer: Answer) -> list[Mapping[str, object]]:
    if answer.status != 200:
        return []
    try:
        entries = json.loads(answer.body)["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _target(entry: Mapping[str, object]) -> Target:
    sizes, policy = entry.get("sizes"), entry.get("policy")
    return Target(
        model=str(entry["id"]),
        shapes=_shapes(sizes) if isinstance(sizes, list) else (),
        num_steps=_positive(entry.get("default_num_inference_steps")),
        num_ranks=_positive(entry.get("num_ranks")),
        policy=policy if isinstance(policy, str) else None,
    )


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _shapes(sizes: list[object]) -> tuple[Shape, ...]:
    try:
        return tuple(Shape.parse(str(size)) for size in sizes)
    except ValueError:
        return ()
