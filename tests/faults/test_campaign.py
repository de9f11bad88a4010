"""A minute of faults on a real server. `benchmarks/fault_soak.py` is the same for as long as wanted.

What the faults happen to hit depends on the machine's load; only the soak counts it.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tests.faults.campaign import Campaign, run
from tests.faults.verdict import print_verdict, promises


async def test_no_request_is_lost_and_no_image_is_wrong_while_workers_die_hang_and_starve(tmp_path: Path) -> None:
    campaign = Campaign(duration_s=20.0, num_strikes=11, seed=6, num_clients=3, is_patient=True, folder=tmp_path)
    result = await run(campaign)
    print_verdict(result, Console(width=120))  # shown if the test fails
    broken = [f"{promise.text}: {promise.found}" for promise in promises(result) if not promise.is_kept]
    assert broken == []
    assert result.damage.losses
    assert result.tally.distances
