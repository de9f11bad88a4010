"""How tests wait: for an event, with a limit that only a hang reaches, also on a machine at load 10."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

HANG_S = 120.0


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(HANG_S):
        while not is_so():
            await asyncio.sleep(0.005)
