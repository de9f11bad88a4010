"""Whether a campaign's promises were kept, for people and for an exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.faults.campaign import Result
from tests.faults.faults import Kind
from tests.faults.feed import Task
from tests.faults.losses import Damage, Hit
from tests.faults.server import HEARTBEAT_TIMEOUT_S
from tests.faults.vitals import courses

KILL_BAR_S = 0.1
STOP_BAR_S = HEARTBEAT_TIMEOUT_S * 1.2 + 0.1
"""The timeout, and a fifth of it until the server looks again."""
USEFUL_BAR_S = 5.0
GROWTH_BAR = 0.02
_AT_ONCE_S = 0.001
_NUM_COSTLIEST = 20


@dataclass(frozen=True, slots=True)
class Promise:
    text: str
    found: str
    is_kept: bool


def promises(result: Result) -> list[Promise]:
    """What has to hold in every campaign."""
    tally, damage, feed = result.tally, result.damage, result.feed
    num_answered = sum(tally.answers.values())
    lost = feed.arrived - set(feed.ended)
    late = late_repeats(damage)
    overtaken = overtaken_repeats(damage)
    twice = [name for name, count in feed.ended.items() if count > 1]
    found = [
        Promise("every request has an answer", f"{num_answered} of {tally.sent}", num_answered == tally.sent),
        Promise("no answer is an error of the server, and none hangs", f"{len(tally.broken)}", not tally.broken),
        Promise("every admitted image ends", f"{len(lost)} of {len(feed.arrived)} did not", not lost),
        Promise("and ends once", f"{len(twice)} more often", not twice),
        Promise("no image is wrong", f"{tally.num_wrong} of {sum(tally.distances.values())}", tally.num_wrong == 0),
        Promise("no request and no rank has two tasks at once", f"{len(damage.overlaps)}", not damage.overlaps),
        Promise("nothing of them is left", f"{len(result.files_left)} files", not result.files_left),
        Promise("a lost task is done again at once if a rank is idle", f"{len(late)} were not", not late),
        Promise("and else before anything else starts", f"{len(overtaken)} were not", not overtaken),
        Promise("every kill and stop is noticed", f"{len(damage.unnoticed)} were not", not damage.unnoticed),
    ]
    return found


def bars(result: Result) -> Iterator[Promise]:
    """What a machine with time to spare keeps; the worst of each."""
    damage = result.damage
    for kind, bar_s in ((Kind.KILL, KILL_BAR_S), (Kind.STOP, STOP_BAR_S)):
        if noticed := damage.noticed_s[kind]:
            num_late = sum(seconds > bar_s for seconds in noticed)
            yield Promise(f"{kind} noticed within {bar_s:.2g} s", f"{num_late} of {len(noticed)} later", num_late == 0)
    if damage.useful_s:
        num_late = sum(seconds > USEFUL_BAR_S for seconds in damage.useful_s)
        text = f"{num_late} of {len(damage.useful_s)} later"
        yield Promise(f"a lost rank works again within {USEFUL_BAR_S:g} s", text, num_late == 0)
    if hits := damage.hits:
        num_over = sum(hit.excess_s > 0 for hit in hits)
        num_alone = sum(hit.excess_s > 0 and hit.num_idle == 0 for hit in hits)
        num_slowed = sum(hit.excess_s > 0 for hit in damage.held_up)
        text = f"{num_over} of {len(hits)} more; of these {num_alone} when no rank was idle"
        text += f" (and {num_slowed} of {len(damage.held_up)} that were slowed down before)"
        yield Promise("a loss costs one task and noticing", text, num_over == 0)
    if not result.faults:
        for course in courses(result.samples):
            is_flat = course.growth <= GROWTH_BAR
            yield Promise(f"flat: {course.name}", f"{course.growth:+.1%}", is_flat)


def coverage(result: Result) -> Iterator[Promise]:
    """What has to be hit for the promises to mean something. On a busy machine some faults hit nothing."""
    struck = result.damage.hit_stages
    for wanted in (Kind.KILL, Kind.STOP):
        aims = {fault.aim.value for fault in result.faults if fault.kind is wanted}
        missed = aims - {aim for kind, aim, _ in struck if kind == wanted}
        text = f"{len(aims) - len(missed)} of {len(aims)}"
        yield Promise(f"a {wanted} cost a worker at every aim", ", not at ".join((text, *sorted(missed))), not missed)
    if any(fault.is_strike for fault in result.faults):
        num_split = sum(count for (_, _, stage), count in struck.items() if stage in ("denoise at 2", "denoise at 4"))
        yield Promise("a task on several ranks was struck", f"{num_split}", num_split > 0)


def late_repeats(damage: Damage) -> list[Hit]:
    """Lost tasks that were not done again at once although a rank was idle."""
    return [hit for hit in (*damage.hits, *damage.held_up) if hit.num_idle and hit.wait_s > _AT_ONCE_S]


def overtaken_repeats(damage: Damage) -> list[Hit]:
    """Lost tasks that waited for a rank while others were given one."""
    return [hit for hit in (*damage.hits, *damage.held_up) if hit.num_overtaking]


def print_verdict(result: Result, console: Console) -> None:
    campaign, tally, damage = result.campaign, result.tally, result.damage
    console.print(
        f"seed {campaign.seed}, policy {campaign.policy}, {campaign.num_ranks} ranks, {result.elapsed_s:.0f} s, "
        f"{len(result.feed.ran)} tasks, {result.feed.num_snapshots} snapshots"
    )
    _print_counts(console, f"{tally.sent} requests by answer", tally.answers)
    _print_counts(console, "images by largest difference, of 255", tally.distances)
    _print_counts(console, "faults", Counter(fault.kind.value for fault in result.faults))
    stages = Table("fault", "aimed at", "hit during", "losses", title="losses", title_justify="left")
    for (kind, aim, stage), count in sorted(damage.hit_stages.items()):
        stages.add_row(kind, aim, stage, str(count))
    console.print(stages)
    _print_counts(console, "requests by losses in a row", damage.in_a_row)
    _print_times(result, console)
    _print_costliest(damage, console)
    _print_courses(result, console)
    verdict = Table("promise", "found", "kept", title="verdict", title_justify="left")
    for promise in (*promises(result), *bars(result), *coverage(result)):
        verdict.add_row(promise.text, promise.found, "yes" if promise.is_kept else "NO")
    console.print(verdict)
    for text in tally.broken[:10]:
        console.print(f"broken: {text}", markup=False)
    for hit in late_repeats(damage):
        console.print(f"not done again at once: {hit}", markup=False)
    for hit in overtaken_repeats(damage):
        console.print(f"overtaken: {hit}", markup=False)
    for strike in damage.unnoticed:
        console.print(f"not noticed: {strike}", markup=False)


def _print_counts(console: Console, title: str, counts: Counter[str] | Counter[int]) -> None:
    table = Table(title, "number", title_justify="left")
    for name, count in sorted(counts.items()):
        table.add_row(str(name), str(count))
    console.print(table)


def _print_times(result: Result, console: Console) -> None:
    damage = result.damage
    table = Table("seconds", "number", "p50", "p90", "p99", "max", title="times", title_justify="left")
    rows = {f"{kind} until noticed": seconds for kind, seconds in damage.noticed_s.items()}
    rows |= {
        "stop until noticed, while it starts": damage.starting_noticed_s,
        "loss until its task is over": damage.over_s,
        "loss until the rank is up": damage.back_s,
        "the same, with a dead fork server": damage.late_back_s,
        "loss until its first task": damage.useful_s,
        "extra latency of a hit request": [hit.extra_s for hit in damage.hits],
        "of which it waited for ranks": [hit.wait_s for hit in damage.hits],
        "the lost task, beyond its length and noticing": [hit.failing_s for hit in damage.hits],
        "beyond one task and noticing": [hit.excess_s for hit in damage.hits],
        "extra latency of those the campaign had slowed down": [hit.extra_s for hit in damage.held_up],
        "latency of all answers": result.tally.latencies_s,
    }
    for name, seconds in rows.items():
        if seconds:
            quantiles = [f"{_quantile(seconds, q):.3f}" for q in (0.5, 0.9, 0.99, 1.0)]
            table.add_row(name, str(len(seconds)), *quantiles)
    console.print(table)


def _print_costliest(damage: Damage, console: Console) -> None:
    costly = sorted((hit for hit in damage.hits if hit.excess_s > 0), key=lambda hit: -hit.excess_s)
    table = Table("task", "ranks", "took", "instead of", "waited", "idle ranks", "then", title_justify="left")
    table.title = f"{len(costly)} losses that cost more than one task and noticing"
    for hit in costly[:_NUM_COSTLIEST]:
        took_s = hit.failed.end_s - hit.failed.start_s
        seconds = (f"{value:.3f}" for value in (took_s, hit.expected_s, hit.wait_s))
        table.add_row(hit.failed.stage, _ranks(hit.failed), *seconds, str(hit.num_idle), _ranks(hit.again))
    console.print(table)


def _ranks(task: Task) -> str:
    return " ".join(map(str, task.ranks))


def _print_courses(result: Result, console: Console) -> None:
    table = Table("held", "early", "late", "growth", "highest", title="after the warm-up", title_justify="left")
    for course in courses(result.samples):
        table.add_row(
            course.name, f"{course.first:.1f}", f"{course.last:.1f}", f"{course.growth:+.1%}", f"{course.highest:.1f}"
        )
    console.print(table)


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]
