"""Exchanges among any sets of ranks, over shared memory and over gloo; and members that die, stop or fail in them."""

from __future__ import annotations

import os
import random
import signal
import time
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tests.ranks import ranks
from tests.waiting import HANG_S
from tetriserve.config import COLLECTIVES
from tetriserve.models import collectives
from tetriserve.models.team import PeerLost
from tetriserve.worker.team.shm import ShmTeam

NUM_RANKS = 4
HEADS, WIDTH = 12, 8
TEAMS = [ranks for degree in (2, 3, 4) for ranks in combinations(range(NUM_RANKS), degree)]
NUM_TASKS, EXCHANGES_PER_TASK = 40, 5
MOST_TOKENS = 200
"""Some exceed a slot of the tests, so that they go in pieces."""


def tasks(seed: int) -> list[tuple[tuple[int, ...], int]]:
    """Teams and their tokens, the same for all ranks."""
    chosen = random.Random(seed)
    return [(chosen.choice(TEAMS), token) for token in range(1, NUM_TASKS + 1)]


def tokens_of(team: tuple[int, ...], token: int, number: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What each member has: (B, own tokens, H, D)."""
    chosen = random.Random(1000 * token + number)
    batch = chosen.choice((1, 3))
    generator = torch.Generator().manual_seed(1000 * token + number)
    counts = [chosen.choice((0, 1, chosen.randint(1, MOST_TOKENS))) for _ in team]
    return [torch.randn(batch, count, HEADS, WIDTH, generator=generator).to(dtype) for count in counts]


def exchange_and_check(team: ShmTeam, members: tuple[int, ...], token: int, number: int) -> None:
    """Ulysses' two exchanges and a gather, of tensors that each member can compute by itself."""
    dtype = (torch.float32, torch.bfloat16, torch.uint8)[number % 3]
    whole = tokens_of(members, token, number, dtype)
    counts, mine, degree = [each.shape[1] for each in whole], whole[team.index], len(members)
    strided = mine.transpose(2, 3).contiguous().transpose(2, 3)
    heads = slice(team.index * HEADS // degree, (team.index + 1) * HEADS // degree)
    for tensor in (mine, strided):
        gathered = torch.ops.tetriserve.all_to_all(tensor, counts, sum(counts), True)
        assert torch.equal(gathered, torch.cat(whole, 1)[:, :, heads])
    assert torch.equal(torch.ops.tetriserve.all_to_all(gathered, counts, mine.shape[1], False), mine)
    assert torch.equal(torch.ops.tetriserve.all_gather(mine, 1, counts), torch.cat(whole, 1))
    assert torch.equal(torch.ops.tetriserve.all_gather(mine[0], 0, counts), torch.cat(whole, 1)[0])


def random_tasks(team: ShmTeam, rank: int, end: Connection, seed: int) -> int:
    """All tasks that this rank is a member of. As in a pool, ranks get a task when all have ended the one before."""
    num_done = 0
    for members, token in tasks(seed):
        if rank not in members:
            continue
        end.send(("begin", token))
        assert end.recv() == token
        team.enter(members, token)
        collectives.set_team(team)
        for number in range(EXCHANGES_PER_TASK):
            exchange_and_check(team, members, token, number)
        end.send(("end", token))
        num_done += 1
    return num_done


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_any_sets_of_ranks_exchange_one_after_the_other_and_side_by_side(kind: str, tmp_path: Path) -> None:
    running: dict[tuple[int, ...], int] = {}
    everybody = tuple(range(NUM_RANKS))
    with ranks(random_tasks, kind, NUM_RANKS, tmp_path, 7) as made:
        for members, token in [*tasks(7), (everybody, 0)]:
            for others in [others for others in running if {*others} & {*members}]:
                ended = running.pop(others)
                assert [made.hear(rank) for rank in others] == [("end", ended)] * len(others)
            if token:
                assert [made.hear(rank) for rank in members] == [("begin", token)] * len(members)
                for rank in members:
                    made.ends[rank].send(token)
                running[members] = token
        assert sum(made.hear(rank) for rank in everybody) == sum(len(members) for members, _ in tasks(7))


def take_orders(team: ShmTeam, rank: int, end: Connection) -> None:
    """Run tasks as ordered: (members, token, fault, exchange before which this rank has it)."""
    while True:
        members, token, fault, at = end.recv()
        try:
            team.enter(members, token)
            collectives.set_team(team)
            for number in range(EXCHANGES_PER_TASK):
                if number == at:
                    commit(fault)
                exchange_and_check(team, members, token, number)
            answer = "done"
        except PeerLost:
            answer = "peer lost"
        except ArithmeticError:
            answer = "failed"
        if answer != "done":
            team.abort()
        end.send((token, answer))


def commit(fault: str) -> None:
    match fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "fail":
            raise ArithmeticError


@pytest.mark.parametrize("fault", ["kill", "stop", "fail"])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_whoever_waits_for_a_member_that_is_lost_is_freed_and_works_on(kind: str, fault: str, tmp_path: Path) -> None:
    """With 2, 3 and 4 members, odd sets too. The test aborts as the executor does: when a process has ended."""
    teams = [(0, 1), (0, 3), (1, 2), (0, 1, 3), (1, 2, 3), (0, 1, 2, 3)]
    with ranks(take_orders, kind, NUM_RANKS, tmp_path) as made:
        for token, members in enumerate(teams, start=1):
            unlucky = members[token % len(members)]
            for rank in members:
                order = (members, 2 * token, fault if rank == unlucky else "", 1 + token % (EXCHANGES_PER_TASK - 1))
                made.ends[rank].send(order)
            if fault == "fail":
                assert made.hear(unlucky) == (2 * token, "failed")
            else:
                if fault == "stop":
                    _wait_for_stop(made.processes[unlucky].pid)
                    made.processes[unlucky].kill()
                made.processes[unlucky].join()
                made.region.abort(range(NUM_RANKS), 2 * token)
                made.start(unlucky)
            survivors = [rank for rank in members if rank != unlucky]
            assert [made.hear(rank) for rank in survivors] == [(2 * token, "peer lost")] * len(survivors)
            for rank in members:  # the same set, at once, and with the replacement
                made.ends[rank].send((members, 2 * token + 1, "", -1))
            assert [made.hear(rank) for rank in members] == [(2 * token + 1, "done")] * len(members)
            assert not (tmp_path / f"team-{2 * token}").exists()


def _wait_for_stop(pid: int | None) -> None:
    give_up_at = time.monotonic() + HANG_S
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < give_up_at
        time.sleep(0.005)
