"""Collectives without process groups, four processes on one GPU: whether they are right, also when a process dies.

How fast they are between GPUs is not shown: processes take turns on one GPU. About seven minutes:

    python benchmarks/gpu/collectives.py [--dry-run]

With `--dry-run` the same steps run on the CPU, on shared memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import torch
from exchange import STATUS_NAMES, WAITED
from members import Context, Members, gathered
from recording import Recording, add_options, begin, median

LIMIT_S = 400.0
NUM_RANKS = 4
SETS = ((0, 1), (2, 3), (0, 2), (3, 1), (0, 1, 2, 3), (2, 0, 3), (3, 1, 0, 2))
WAIT_LIMIT_S = 60.0
"""Longer than a compilation, for which peers wait too."""
READ_S = 0.5


@dataclass(frozen=True)
class Setting:
    """sizes: bytes that a rank puts into an exchange, divisible by 2, 3 and 4."""

    device: torch.device
    context: Context
    region_bytes: int
    sizes: tuple[int, ...]
    num_times: int
    compiler: str
    side: int

    def gathered(self) -> AbstractContextManager[Members]:
        return gathered(self.context, NUM_RANKS, self.device, self.region_bytes)


def setting_of(*, is_dry_run: bool) -> Setting:
    if is_dry_run:
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["members", "torch._dynamo"])
        return Setting(torch.device("cpu"), forking, 2**21, (12 * 2**10,), 5, "aot_eager", 16)
    sizes = tuple(12 * 2**power for power in (12, 16, 20))
    # Not forked: what CUDA has begun in a process, its children cannot use.
    spawning = multiprocessing.get_context("spawn")
    return Setting(torch.device("cuda:0"), spawning, 2**26, sizes, 20, "inductor", 1024)


def name_of(ranks: Sequence[int]) -> str:
    return "ranks " + " ".join(map(str, ranks))


def exchange_everywhere(recording: Recording, setting: Setting) -> None:
    """All-to-all among sets of ranks, aligned or not and in any order, and pairs side by side."""
    with setting.gathered() as members:
        started_at = time.perf_counter()
        mapping_s = members.connect(WAIT_LIMIT_S)
        figures = {"us": median(mapping_s, 1e6), "took_s": time.perf_counter() - started_at}
        recording.row("mappings", count=len(mapping_s), **figures)
        for num_bytes in setting.sizes:
            for ranks in SETS:
                _exchange(recording, members, (ranks,), num_bytes, setting)
        for pair in ((0, 1), (0, 2), (0, 3)):
            other = tuple(sorted({0, 1, 2, 3} - set(pair)))
            _exchange(recording, members, (pair, other), setting.sizes[0], setting)


def _exchange(
    recording: Recording, members: Members, sets: Sequence[tuple[int, ...]], num_bytes: int, setting: Setting
) -> None:
    """Of all `sets` at once, which share no rank."""
    case = " beside ".join(map(name_of, sets))
    with recording.case(f"{case}, {num_bytes} B"):
        for ranks in sets:
            token = members.next_token()
            for rank in ranks:
                members[rank].begin("exchange", ranks, token, num_bytes, setting.num_times)
        answers = [members[rank].answer() for ranks in sets for rank in ranks]
        recording.row(f"{case}, {num_bytes} B", **_outcome(answers))


def _outcome(answers: Sequence[tuple[str, float]]) -> dict[str, object]:
    """Of one exchange on all its members: the slowest time, and the status if any did not just wait."""
    figures: dict[str, object] = {"us": median([max(seconds for _, seconds in answers)], 1e6)}
    problems = sorted({status for status, _ in answers} - {STATUS_NAMES[WAITED]})
    return figures | ({"problem": ", ".join(problems)} if problems else {"right": True})


def exchange_with_gloo(recording: Recording, setting: Setting) -> None:
    """The same through torch's process groups, which want the ranks of a set in order."""
    sets = [ranks for ranks in SETS if list(ranks) == sorted(ranks)]
    with setting.gathered() as members, tempfile.TemporaryDirectory() as directory:
        started_at = time.perf_counter()
        members.call(range(NUM_RANKS), "form_groups", Path(directory) / "store", NUM_RANKS, sets)
        recording.row("groups formed", count=len(sets), took_s=time.perf_counter() - started_at)
        for num_bytes, ranks in product(setting.sizes, sets):
            with recording.case(f"{name_of(ranks)}, {num_bytes} B"):
                answers = members.call(ranks, "exchange_with_gloo", ranks, num_bytes, setting.num_times)
                recording.row(f"{name_of(ranks)}, {num_bytes} B", **_outcome(answers))


def kill_an_owner(recording: Recording, setting: Setting) -> None:
    """Rank 1 reads the memory of rank 0, which is killed meanwhile, and is replaced."""
    with setting.gathered() as members:
        members.connect(WAIT_LIMIT_S)
        members[1].begin("read", 0, 3 * READ_S)
        time.sleep(READ_S)  # it reads now, and on after the death
        members[0].kill()
        num_reads, num_wrong = members[1].answer()
        recording.row("read over the death of its owner", reads=num_reads, wrong=num_wrong)
        num_reads, num_wrong = members[1].call("read", 0, READ_S)
        recording.row("read after it", reads=num_reads, wrong=num_wrong)
        for rank in (2, 3):
            members[rank].call("unmap", 0)
        recording.row("freed with the last mapping", mib=members[1].call("unmap", 0) / 2**20)
        recording.row("replaced", took_s=members.replace(0, WAIT_LIMIT_S))
        for ranks in ((0, 1), (0, 1, 2, 3)):
            _exchange(recording, members, (ranks,), setting.sizes[0], setting)


def kill_an_owner_by_ipc(recording: Recording, setting: Setting) -> None:
    """As `kill_an_owner`, with memory that torch's own allocator shares."""
    if setting.device.type == "cpu":
        recording.row("memory shared by torch", skipped="CUDA IPC needs a GPU")
        return
    with setting.gathered() as members:
        members[1].call("take", 0, members[0].call("share", setting.region_bytes))
        members[1].begin("read", 0, 3 * READ_S)
        time.sleep(READ_S)  # it reads now, and on after the death
        members[0].kill()
        with recording.case("memory shared by torch, its owner killed"):
            num_reads, num_wrong = members[1].answer()
            recording.row("memory shared by torch, its owner killed", reads=num_reads, wrong=num_wrong)


def abort_waits(recording: Recording, setting: Setting) -> None:
    """A rank waits for a peer that does not come, until the abort word names its task."""
    with setting.gathered() as members:
        members.connect(WAIT_LIMIT_S)
        for number in range(3):
            token = members.next_token()
            members[1].begin("fail_to_meet", (0, 1), token)
            time.sleep(READ_S)  # it waits by now
            written_at = members.abort(token)
            _record_abort(recording, f"abort word, {number + 1}", members[1].answer(), written_at)
            _exchange(recording, members, ((0, 1),), setting.sizes[0], setting)
        token = members.next_token()
        for rank in (1, 2, 3):
            members[rank].begin("fail_to_meet", (0, 1, 2, 3), token)
        time.sleep(READ_S)  # they wait by now
        started_at = time.monotonic()
        members[0].kill()
        members.abort(token)
        for rank in (1, 2, 3):
            _record_abort(recording, f"rank 0 killed, rank {rank} freed", members[rank].answer(), started_at)
        _exchange(recording, members, ((1, 2, 3),), setting.sizes[0], setting)


def _record_abort(recording: Recording, case: str, answer: tuple[str, float, float], begun_at: float) -> None:
    status, ended_at, total = answer
    figures = {"us": median([ended_at - begun_at], 1e6), "device_works": total == 64}
    recording.row(case, **figures, **({} if status == "aborted" else {"problem": status}))


def compile_across_sets(recording: Recording, setting: Setting) -> None:
    """One compiled function over every set of ranks: how many graphs each rank has after it."""
    with setting.gathered() as members:
        members.connect(WAIT_LIMIT_S)
        for ranks in (*SETS, *combinations(range(NUM_RANKS), 3)):
            with recording.case(name_of(ranks)):
                started_at = time.perf_counter()
                graphs = members.call(
                    ranks, "run_compiled", ranks, members.next_token(), setting.compiler, setting.side
                )
                recording.row(name_of(ranks), graphs=max(graphs), took_s=time.perf_counter() - started_at)


def replay_graphs(recording: Recording, setting: Setting) -> None:
    """Two exchanges captured in one graph and replayed; on the CPU they are run again."""
    with setting.gathered() as members:
        members.connect(WAIT_LIMIT_S)
        for ranks in ((0, 1), (0, 1, 2, 3)):
            _exchange(recording, members, (ranks,), setting.sizes[0], setting)  # loads the kernels
            with recording.case(f"{name_of(ranks)}, replayed"):
                arguments = (ranks, members.next_token(), setting.sizes[0], setting.num_times)
                recording.row(f"{name_of(ranks)}, replayed", **_outcome(members.call(ranks, "replay", *arguments)))


def exchange_symmetrically(recording: Recording, setting: Setting) -> None:
    """Through torch's symmetric memory, whose waits end a process by a trap: the last, on processes of its own."""
    if setting.device.type == "cpu":
        recording.row("symmetric memory of torch", skipped="it needs a GPU")
        return
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with setting.gathered() as members, tempfile.TemporaryDirectory() as directory:
        started_at = time.perf_counter()
        arguments = (Path(directory) / "store", NUM_RANKS, SETS, setting.sizes[0])
        members.call(range(NUM_RANKS), "exchange_symmetrically", *arguments)
        recording.row("symmetric memory of torch", sets=len(SETS), took_s=time.perf_counter() - started_at)


SECTIONS = {
    "all-to-all": (exchange_everywhere, 90),
    "killed owner": (kill_an_owner, 50),
    "killed owner, IPC": (kill_an_owner_by_ipc, 30),
    "abort word": (abort_waits, 50),
    "compile": (compile_across_sets, 120),
    "graph": (replay_graphs, 50),
    "gloo": (exchange_with_gloo, 60),
    "symmetric memory": (exchange_symmetrically, 50),
}
"""With their limits in seconds, what is new first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "collectives")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here
    recording = begin(options, LIMIT_S)
    setting = setting_of(is_dry_run=options.dry_run)
    for name, (run, limit_s) in SECTIONS.items():
        with recording.section(name, limit_s) as runs:
            if runs:
                run(recording, setting)
    recording.end()


if __name__ == "__main__":
    main()
