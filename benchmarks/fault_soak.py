"""The fault campaign for as long as wanted: a server under load whose workers are killed, stopped, slowed and starved.

Every request has to be answered once, with its own image and no other; docs/faults.md says what is promised and how it
is measured. Ends with 1 when a promise is broken. Run with

    python benchmarks/fault_soak.py --minutes 30 --ranks 4 --faults 500 --seed 1
    python benchmarks/fault_soak.py --minutes 30 --ranks 4 --no-faults
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # the campaign is the tests' own

from tests.faults.campaign import Campaign, run  # noqa: E402
from tests.faults.verdict import bars, coverage, print_verdict, promises  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--faults", type=int, default=500, help="workers killed or stopped; other faults come on top")
    parser.add_argument("--no-faults", action="store_true", help="watch memory, threads and files instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", default="unsteady", help="the default changes degree and ranks at every step")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.5, help="of a client between two requests, seconds on average")
    parser.add_argument("--folder", type=Path, help="keep the server's log here")
    options = parser.parse_args()
    campaign = Campaign(
        duration_s=60 * options.minutes,
        num_strikes=0 if options.no_faults else options.faults,
        seed=options.seed,
        num_ranks=options.ranks,
        policy=options.policy,
        num_clients=options.clients,
        pause_s=options.pause,
        folder=options.folder,
    )
    result = asyncio.run(run(campaign))
    print_verdict(result, Console(highlight=False, width=120))
    found = (*promises(result), *bars(result), *coverage(result))
    raise SystemExit(0 if all(promise.is_kept for promise in found) else 1)


if __name__ == "__main__":
    main()
