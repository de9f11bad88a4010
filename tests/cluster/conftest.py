"""The bundled model on a Ray cluster of this machine."""

from tests.gloo.conftest import bundled_card, bundled_dir, paint, profile, reference

__all__ = ["bundled_card", "bundled_dir", "paint", "profile", "reference"]
