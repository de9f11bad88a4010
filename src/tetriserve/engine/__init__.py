"""The live driver of the controller: wall clock, executor, the clients who wait, and jobs that go on without."""

from tetriserve.engine.intake import Generation, Intake
from tetriserve.engine.jobs import Job, Jobs
from tetriserve.engine.journalled import JournalledJobs
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.observers import Observation, Observer, Occurred, Stopped
from tetriserve.engine.progress import GeneratedImage, Progress, Watcher
from tetriserve.engine.tasks import EndedTask

__all__ = [
    "EndedTask",
    "GeneratedImage",
    "Generation",
    "Intake",
    "Job",
    "Jobs",
    "JournalledJobs",
    "LiveEngine",
    "Observation",
    "Observer",
    "Occurred",
    "Progress",
    "Stopped",
    "Watcher",
]
