"""What survives the server: accepted work, how far it has come, and its results, in one directory. No asyncio here."""

from tetriserve.journal.journal import Journal, Model
from tetriserve.journal.kept import Kept
from tetriserve.journal.records import Course, Entry, Failure, KeptFile, KeptImage, KeptVideo, Key, VideoFacts

__all__ = [
    "Course",
    "Entry",
    "Failure",
    "Journal",
    "Kept",
    "KeptFile",
    "KeptImage",
    "KeptVideo",
    "Key",
    "Model",
    "VideoFacts",
]
