"""The controller under a virtual clock: what a policy would do with given arrivals, from a profile's times."""

from tetriserve.simulator.run import Simulation, simulate

__all__ = ["Simulation", "simulate"]
