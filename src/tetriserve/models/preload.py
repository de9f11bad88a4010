"""What the fork server loads once, so that each worker starts with it: seconds and memory saved per worker.

It loads the adapter of the served family as well (`executor/processes.py`).
"""

import torch
import transformers  # noqa: F401

import tetriserve.models.parallel  # noqa: F401
from tetriserve.logs import adopt_loggers

torch.set_num_threads(1)
adopt_loggers("diffusers", "transformers")  # they warn of truncated prompts, and quote them
