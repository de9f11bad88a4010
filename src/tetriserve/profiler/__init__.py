"""Measures a profile, and warms an engine up, with the same executor that serves."""

from tetriserve.profiler.hardware import hardware_name
from tetriserve.profiler.measure import measure
from tetriserve.profiler.warmup import warm_up

__all__ = ["hardware_name", "measure", "warm_up"]
