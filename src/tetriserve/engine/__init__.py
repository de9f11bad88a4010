"""The live driver of the controller: wall clock, executor, and the clients who wait."""

from tetriserve.engine.intake import Generation, Intake
from tetriserve.engine.live import GeneratedImage, LiveEngine
from tetriserve.engine.tasks import EndedTask

__all__ = ["EndedTask", "GeneratedImage", "Generation", "Intake", "LiveEngine"]
