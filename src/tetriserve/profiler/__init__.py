"""Measures a profile with the same executor that serves."""

from tetriserve.profiler.measure import hardware_name, measure

__all__ = ["hardware_name", "measure"]
