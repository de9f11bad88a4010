"""What the fork server runs first: it ends with the server, and logs as every process does before libraries warn."""

import os

from tetriserve.logs import set_up_logging
from tetriserve.worker.parent import end_with_parent

end_with_parent()
set_up_logging("info", os.environ.get("TETRISERVE_LOG_FORMAT", "text"))
