"""What the fork server runs first: it logs as every process does, before libraries load and warn."""

import os

from tetriserve.logs import set_up_logging

set_up_logging("info", os.environ.get("TETRISERVE_LOG_FORMAT", "text"))
