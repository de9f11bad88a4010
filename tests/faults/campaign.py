"""One run: a server, a load, faults, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.clients import Clients, Tally
from tests.faults.faults import Aim, Fault, Kind, draw_faults
from tests.faults.feed import Feed
from tests.faults.losses import Damage, assess
from tests.faults.marksman import Marksman
from tests.faults.pictures import Gallery, make_catalogue
from tests.faults.server import Server, serving
from tests.faults.vitals import Sample, files_left, take_sample
from tests.waiting import HANG_S, until


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """
    num_strikes: workers killed or stopped; 0 leaves all other faults out too.
    pause_s: of each client between two requests, on average.
    is_patient: strike only when all ranks are up, in whatever time that takes; client faults keep their times.
    folder: where the server's log is kept; None: nowhere.
    """

    duration_s: float
    num_strikes: int
    seed: int
    num_ranks: int = 4
    policy: str = "unsteady"
    num_clients: int = 4
    pause_s: float = 0.5
    sample_every_s: float = 5.0
    is_patient: bool = False
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    campaign: Campaign
    tally: Tally
    damage: Damage
    feed: Feed
    faults: list[Fault]
    samples: list[Sample]
    files_left: list[str]
    elapsed_s: float


async def run(campaign: Campaign) -> Result:
    """Everything is drawn from the campaign's seed; what a fault meets depends on the machine's timing too."""
    if campaign.folder is not None:
        campaign.folder.mkdir(parents=True, exist_ok=True)
        return await _run(campaign, campaign.folder)
    with tempfile.TemporaryDirectory() as folder:
        return await _run(campaign, Path(folder))


async def _run(campaign: Campaign, folder: Path) -> Result:
    catalogue = make_catalogue()
    pictures = [picture for pair in catalogue for picture in pair]
    painting = asyncio.create_task(asyncio.to_thread(Gallery.paint, pictures))
    async with serving(folder, campaign.num_ranks, campaign.policy) as server:
        gallery = await painting
        feed = Feed()
        following = asyncio.create_task(feed.follow(server.url))
        await feed.until(lambda: feed.ranks or None, HANG_S)
        clients = Clients(server, catalogue, gallery, Random(f"{campaign.seed} clients"))
        faults = _faults(campaign)
        samples: list[Sample] = []
        start = time.monotonic()
        sampling = asyncio.create_task(_sample(server, samples, campaign.sample_every_s))
        asking = [asyncio.create_task(clients.ask_for_long(campaign.pause_s)) for _ in range(campaign.num_clients)]
        marksman = Marksman(server, feed, Random(f"{campaign.seed} marksman"))
        committing = [
            _commit(fault, marksman, clients) for fault in faults if not (campaign.is_patient and fault.is_strike)
        ]
        if campaign.is_patient:
            strikes = sorted(
                (fault for fault in faults if fault.is_strike), key=lambda fault: fault.aim is Aim.FORK_SERVER
            )
            committing.append(_strike_patiently(strikes, marksman, feed, campaign.num_ranks))
        await asyncio.gather(asyncio.sleep(campaign.duration_s), *committing)
        clients.finish()
        await asyncio.gather(*asking)
        await feed.until(lambda: len(feed.ranks) == campaign.num_ranks or None, HANG_S)
        elapsed_s = time.monotonic() - start
        await feed.until(lambda: feed.arrived == set(feed.ended) or None, HANG_S)
        sampling.cancel()
        await clients.close()
        with contextlib.suppress(TimeoutError):  # tasks may still run of requests whose clients have left
            await until(lambda: not files_left(server.pid))
        left = files_left(server.pid)
        damage = assess(server, feed, marksman)
    await following
    return Result(
        campaign=campaign, tally=clients.tally, damage=damage, feed=feed, faults=faults, samples=samples,
        files_left=left, elapsed_s=elapsed_s,
    )  # fmt: skip


def _faults(campaign: Campaign) -> list[Fault]:
    if campaign.num_strikes == 0:
        return []
    return draw_faults(Random(f"{campaign.seed} faults"), campaign.duration_s, campaign.num_strikes)


async def _commit(fault: Fault, marksman: Marksman, clients: Clients) -> None:
    await asyncio.sleep(fault.at_s)
    match fault.kind:
        case Kind.LEAVE:
            await clients.leave()
        case Kind.GARBAGE:
            await clients.send_garbage()
        case Kind.FLOOD:
            await clients.flood()
        case _:
            await marksman.strike(fault)


async def _strike_patiently(faults: Sequence[Fault], marksman: Marksman, feed: Feed, num_ranks: int) -> None:
    """The feed tells of a loss a moment later: those struck before must be back, or the next finds no one to strike."""

    def is_whole() -> bool:
        deadly = (strike for strike in marksman.strikes if strike.kind in (Kind.KILL, Kind.STOP))
        are_back = all(feed.back_at(strike.rank, strike.time_s) < float("inf") for strike in deadly)
        return are_back and len(feed.ranks) == num_ranks

    for fault in faults:
        await feed.until(lambda: is_whole() or None, HANG_S)
        await marksman.strike(fault)


async def _sample(server: Server, samples: list[Sample], every_s: float) -> None:
    while True:
        samples.append(await asyncio.to_thread(take_sample, server.pid))
        await asyncio.sleep(every_s)
