"""The corrections file: what an engine learnt about a profile, for the next engine on the same hardware.

```
{"format": "tetriserve-corrections/2", "profile": <SHA-256 of the profile they correct>, "hardware": ...,
 "factors": [{"stage", "height", "width", "frames", "degree", "batch", "factor"}, ...]}
```

The profile holds the model's fingerprint and execution, so that its digest stands for both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from tetriserve.core.errors import ProfileError
from tetriserve.core.request import Shape
from tetriserve.profile.corrections import MAX_ENTRIES, RANGE, Case, Corrections
from tetriserve.profile.table import Profile, write_whole

FORMAT = "tetriserve-corrections/2"
_MAX_BYTES = 1 << 20
_MAX_SIDE = 1 << 20


def save_corrections(corrections: Corrections, path: Path, profile: Profile, hardware: str) -> None:
    """
    Raises:
        ProfileError: they cannot be written there.
    """
    document = {
        **_identity(profile, hardware),
        "factors": [
            {
                "stage": case.stage,
                **({} if case.shape is None else asdict(case.shape)),
                "degree": case.degree,
                "batch": case.batch,
                "factor": factor,
            }
            for case, factor in corrections.factors.items()
        ],
    }
    try:
        write_whole(path, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise ProfileError(f"corrections {path} cannot be written: {error.strerror}") from error


def load_corrections(path: Path, profile: Profile, hardware: str) -> Corrections:
    """Those for `profile` on `hardware`; none if there is no file, or if it is about another profile or hardware.

    Raises:
        ProfileError: it cannot be read, or is damaged.
    """
    if not path.is_file():
        return Corrections()
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        document = json.loads(data)
        identity = _identity(profile, hardware)
        if {key: document[key] for key in identity} != identity:
            return Corrections()
        return Corrections({_case(row): _factor(row["factor"]) for row in _rows(document["factors"])})
    except OSError as error:
        raise ProfileError(f"corrections {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ProfileError(f"corrections {path} are damaged: {reason}") from error


def _identity(profile: Profile, hardware: str) -> dict[str, str]:
    digest = hashlib.sha256(json.dumps(asdict(profile), sort_keys=True).encode()).hexdigest()
    return {"format": FORMAT, "profile": digest, "hardware": hardware}


def _rows(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise ValueError(f"a table must be a list of at most {MAX_ENTRIES} rows")
    return value


def _case(row: dict[str, object]) -> Case:
    stage = row["stage"]
    if not isinstance(stage, str):
        raise ValueError("a stage must be a string")
    return Case(stage, _shape(row), _count(row["degree"]), _count(row["batch"]))


def _shape(row: dict[str, object]) -> Shape | None:
    if "height" not in row:
        return None
    return Shape(_count(row["height"]), _count(row["width"]), _count(row["frames"]))


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIDE:
        raise ValueError("a count must be a whole number of at least 1")
    return value


def _factor(value: object) -> float:
    low, high = RANGE
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"a factor must be {low} to {high}")
    return float(value)
