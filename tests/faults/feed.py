"""What a server tells its board, as it comes: which tasks run where, which ranks live, what ended how."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Task:
    """Times are the engine's; `end_s` of one that runs is the expected one."""

    request_id: str
    stage: str
    ranks: tuple[int, ...]
    num_steps: int
    start_s: float
    end_s: float
    failure: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Task:
        return cls(
            row["id"], row["stage"], tuple(row["ranks"]), row["num_steps"], row["start_s"], row["end_s"],
            row.get("failure"),
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, float]:
        return self.request_id, self.start_s


class Feed:
    """
    origin_s: when the engine's clock stood at 0, in seconds since the epoch.
    ran: tasks that ended, in that order.
    expected_s: length that the scheduler expected of tasks that were seen running.
    arrived, ended: how often each request was heard of.
    joined: (time since the epoch, rank) whenever a rank came up.
    num_snapshots: more than one, and the feed was too slow to hear everything.
    """

    def __init__(self) -> None:
        self.origin_s = float("inf")
        self.ranks: tuple[int, ...] = ()
        self.running: list[Task] = []
        self.ran: list[Task] = []
        self.expected_s: dict[tuple[str, float], float] = {}
        self.last_ranks: dict[str, tuple[int, ...]] = {}
        self.arrived: set[str] = set()
        self.ended: Counter[str] = Counter()
        self.joined: list[tuple[float, int]] = []
        self.num_snapshots = 0
        self._news = asyncio.Condition()

    @property
    def now_s(self) -> float:
        """The engine's clock."""
        return time.time() - self.origin_s

    async def follow(self, url: str) -> None:
        """Listen until the server ends the stream."""
        async with (
            httpx.AsyncClient(timeout=None) as client,
            client.stream("GET", f"{url}/board/events") as response,
        ):
            name = ""
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self._take(name, json.loads(line.removeprefix("data: ")))
                    async with self._news:
                        self._news.notify_all()

    async def until(self, find: Callable[[], _Found | None], timeout_s: float) -> _Found | None:
        """What `find` finds, asked again at all news; None if there is nothing in time."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                while (found := find()) is None:
                    await self._news.wait()
                return found
        except TimeoutError:
            return None

    def back_at(self, rank: int, after_s: float) -> float:
        """When `rank` came up next after `after_s`, since the epoch; infinity if it never did."""
        return next((at for at, joined in self.joined if joined == rank and at > after_s), float("inf"))

    def is_handed_over(self, task: Task) -> bool:
        """Whether the request's task before this one ran on other ranks."""
        return set(self.last_ranks.get(task.request_id, task.ranks)) != set(task.ranks)

    def _take(self, name: str, data: Mapping[str, Any]) -> None:
        is_snapshot = name == "snapshot"
        self.num_snapshots += is_snapshot
        self.origin_s = min(self.origin_s, time.time() - data["now_s"])
        self.joined += [(time.time(), rank) for rank in data["ranks"] if rank not in self.ranks and not is_snapshot]
        self.ranks = tuple(data["ranks"])
        ran = [Task.of(row) for row in data.get("ran", ())]
        if is_snapshot and self.ran:
            known = {task.key for task in self.ran[-5000:]}
            ran = [task for task in ran if task.key not in known]
        self.ran += ran
        self.last_ranks |= {task.request_id: task.ranks for task in ran}
        self.running = [Task.of(row) for row in data["running"]]
        self.expected_s |= {task.key: task.end_s - task.start_s for task in self.running}
        self.arrived |= {row["id"] for row in data.get("arrived", data.get("requests", ()))}
        for row in data.get("ended", ()):
            if not (is_snapshot and row["id"] in self.ended):
                self.ended[row["id"]] += 1
                self.arrived.add(row["id"])
