"""The sans-IO core: events in, commands out. The live engine and the simulator are two thin drivers of it."""

from tetriserve.control.controller import Controller

__all__ = ["Controller"]
