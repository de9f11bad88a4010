"""What the fork server loads once, so that each worker starts with it: seconds and memory saved per worker."""

import diffusers.hooks.context_parallel  # noqa: F401
import torch.distributed.device_mesh
import torch.testing._internal.distributed.fake_pg
from diffusers import FluxPipeline  # noqa: F401

from tetriserve.logs import adopt_loggers

torch.set_num_threads(1)
adopt_loggers("diffusers", "transformers")  # they warn of truncated prompts, and quote them
