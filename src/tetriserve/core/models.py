"""Models in one pool, by the keys that requests name them with (`Request.model`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Of = TypeVar("Of")


def of_model(by_key: Mapping[str, Of], key: str) -> Of:
    """What `by_key` has for a model; an empty key is the first one, as where only one model is served.

    Raises:
        KeyError: there is no such model.
    """
    return by_key[key] if key else next(iter(by_key.values()))
