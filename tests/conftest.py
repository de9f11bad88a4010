"""What holds for all tests. The environment must be set before torch is first imported, here and in child processes."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from hypothesis import HealthCheck, settings

# A fixture that holds state between examples is still found; the machine's speed is no finding.
_EVERYWHERE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_EVERYWHERE)
settings.register_profile("search", derandomize=False, **_EVERYWHERE)
settings.load_profile("same")
