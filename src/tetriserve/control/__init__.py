"""The sans-IO core: events in, commands out. The live engine and the virtual pool are its two thin drivers."""

from tetriserve.control.controller import Controller

__all__ = ["Controller"]
