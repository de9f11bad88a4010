"""What clients of OpenAI's and of other servers send that is not served here: ignored with a warning, or refused.

Only what no picture depends on is ever ignored. What would change the picture, and what is unknown, is refused by the
schemas, whatever `--compat` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tetriserve.config import STRICT
from tetriserve.core.errors import InvalidRequest
from tetriserve.server.schemas import PictureOptions


@dataclass(frozen=True)
class Unserved:
    """A parameter that has no effect here.

    reason: why, as the end of a sentence.
    served: values that ask for nothing else than what is done anyway.
    is_shown: the value is one of a few words, not a text of the client's.
    """

    reason: str
    served: tuple[object, ...] = ()
    is_shown: bool = False


Table = Mapping[str, Unserved]

PICTURE: Table = {
    "quality": Unserved("one quality is served", ("auto", "standard"), is_shown=True),
    "style": Unserved("the style is what the prompt says", ("auto",), is_shown=True),
    "complexity": Unserved("the number of steps is num_inference_steps", is_shown=True),
    "moderation": Unserved("images are not moderated", ("auto",), is_shown=True),
    "fps": Unserved("an image is one frame"),
    "guidance_scale_2": Unserved("there is no second transformer"),
    "extra_args": Unserved("what it says is for another scheduler, but for a deadline", ("", {})),
}
"""Of `PictureOptions`."""
EDIT: Table = {"input_fidelity": Unserved("one fidelity is served", ("low",), is_shown=True)}
"""Of `EditsRequest`, beside those."""

_EXTRA_ARGS = frozenset({"latent_seq_len", "voxels", "num_steps", "text_seq_len", "denoise_chunk_size"})
_SCHEDULER_PREFIX = "runtime_v2_"


def warnings_of(body: BaseModel, table: Table, compat: str) -> list[str]:
    """One sentence for every parameter of `table` that `body` sets in vain.

    Raises:
        InvalidRequest: `compat` is strict, and there is one.
    """
    warnings = []
    for name, unserved in table.items():
        value = getattr(body, name)
        if value is None or value in unserved.served:
            continue
        shown = f"{name} {value!r}" if unserved.is_shown else name
        if compat == STRICT:
            served = (
                f"; served: {', '.join(map(repr, unserved.served))}" if unserved.is_shown and unserved.served else ""
            )
            raise InvalidRequest(f"{shown} is not served: {unserved.reason}{served}", name)
        warnings.append(f"{shown} is ignored: {unserved.reason}")
    return warnings


def picture_warnings(body: PictureOptions, compat: str) -> list[str]:
    """`warnings_of` what may be asked of pictures.

    Raises:
        InvalidRequest: `compat` is strict, and something would be ignored.
    """
    warnings = warnings_of(body, PICTURE, compat)
    if (body.output_format or "png") == "png" and body.output_compression not in (None, 100):
        reason = "it is the quality of a jpeg or webp image, and output_format is png"
        if compat == STRICT:
            raise InvalidRequest(
                f"output_compression {body.output_compression} is not served: {reason}", "output_compression"
            )
        warnings.append(f"output_compression {body.output_compression} is ignored: {reason}")
    return warnings


def ignored_names(warnings: list[str]) -> str:
    """The parameters that `warnings` are about, for the log."""
    return ",".join(warning.split()[0] for warning in warnings)


def deadline_of(extra_args: dict[str, Any] | str | None) -> float | None:
    """Milliseconds from arrival to the deadline that GF-DiT's load generator writes into `extra_args`.

    It has two times of its workload's clock, `runtime_v2_arrival_ms` and `runtime_v2_deadline_ms`.

    Raises:
        InvalidRequest: it is no object of what that load generator writes.
    """
    if not extra_args:
        return None
    try:
        said = json.loads(extra_args) if isinstance(extra_args, str) else extra_args
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise InvalidRequest("extra_args must be a JSON object, or one as text", "extra_args")
    for name in said:
        if name not in _EXTRA_ARGS and not name.startswith(_SCHEDULER_PREFIX):
            known = f"{_SCHEDULER_PREFIX}*, {', '.join(sorted(_EXTRA_ARGS))}"
            raise InvalidRequest(f"extra_args holds {name[:80]!r}; allowed: {known}", "extra_args")
    arrival, deadline = (said.get(f"{_SCHEDULER_PREFIX}{name}_ms") for name in ("arrival", "deadline"))
    if deadline is None:
        return None
    if not all(isinstance(time, int | float) and abs(time) < 1e15 for time in (arrival, deadline)):
        raise InvalidRequest(
            f"extra_args: {_SCHEDULER_PREFIX}arrival_ms and {_SCHEDULER_PREFIX}deadline_ms must be numbers",
            "extra_args",
        )
    assert arrival is not None, "checked"
    return float(deadline - arrival)
