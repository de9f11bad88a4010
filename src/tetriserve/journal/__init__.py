"""What survives the server: accepted work, how far it has come, and its results, in one directory. No asyncio here."""

from tetriserve.journal.journal import Journal, Kept, Model
from tetriserve.journal.records import Course, Entry, Failure, KeptImage, Key

__all__ = ["Course", "Entry", "Failure", "Journal", "Kept", "KeptImage", "Key", "Model"]
