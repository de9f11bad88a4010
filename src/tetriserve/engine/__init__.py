"""The live driver of the controller: wall clock, executor, the clients who wait, and jobs that go on without."""

from tetriserve.engine.intake import Generation, Intake
from tetriserve.engine.job import Job
from tetriserve.engine.jobs import Jobs
from tetriserve.engine.journalled import JournalledJobs
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.observers import Observation, Observer, Occurred, Stopped
from tetriserve.engine.progress import Generated, GeneratedImage, GeneratedVideo, Progress, Watcher
from tetriserve.engine.tasks import EndedTask
from tetriserve.engine.video_rules import VideoWish
from tetriserve.engine.videos import Video, VideoStatus

__all__ = [
    "EndedTask",
    "Generated",
    "GeneratedImage",
    "GeneratedVideo",
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
    "Video",
    "VideoStatus",
    "VideoWish",
    "Watcher",
]
