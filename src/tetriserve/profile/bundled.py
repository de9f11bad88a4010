"""Profiles that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from tetriserve.core.errors import ProfileError
from tetriserve.profile.table import Profile, load_profile

_DIRECTORY = Path(__file__).parent / "data"


def bundled_profiles() -> tuple[str, ...]:
    """Names of the bundled profiles, in alphabetical order."""
    return tuple(sorted(path.stem for path in _DIRECTORY.glob("*.json")))


def open_profile(name_or_path: str) -> Profile:
    """The bundled profile of that name, else the file at that path.

    Raises:
        ProfileError: neither exists, or the file is not a valid profile.
    """
    if name_or_path in bundled_profiles():
        return load_profile(_DIRECTORY / f"{name_or_path}.json")
    path = Path(name_or_path)
    if not path.exists():
        raise ProfileError(
            f"profile {name_or_path!r} is neither a file nor bundled; bundled: {', '.join(bundled_profiles())}"
        )
    return load_profile(path)
