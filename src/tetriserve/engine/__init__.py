"""The live driver of the controller: wall clock, executor, and the clients who wait."""

from tetriserve.engine.durable import DurableWork
from tetriserve.engine.intake import Generation, Intake
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.observers import Observation, Observer, Occurred, Stopped
from tetriserve.engine.progress import GeneratedImage, Progress, Watcher
from tetriserve.engine.shared import SharedWork
from tetriserve.engine.tasks import EndedTask

__all__ = [
    "DurableWork",
    "EndedTask",
    "GeneratedImage",
    "Generation",
    "Intake",
    "LiveEngine",
    "Observation",
    "Observer",
    "Occurred",
    "Progress",
    "SharedWork",
    "Stopped",
    "Watcher",
]
