"""Measures a profile with the same executor that serves."""

from tetriserve.profiler.hardware import hardware_name
from tetriserve.profiler.measure import measure

__all__ = ["hardware_name", "measure"]
