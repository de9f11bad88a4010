"""How the ranks of a task exchange tensors: through shared memory, or through torch's process groups."""

from tetriserve.worker.team.region import SLOT_BYTES, Region

__all__ = ["SLOT_BYTES", "Region"]
