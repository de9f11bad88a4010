"""`tetriserve plan`: how many GPUs hold a target, printed as an answer, a curve and the policies at the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from tetriserve.core.bounds import check_seeds
from tetriserve.report.comparing import describe_workload
from tetriserve.report.printing import print_table
from tetriserve.simulator.planner import PolicyScore, PoolSize, Sizing, find_smallest_pool
from tetriserve.simulator.scenario import Scenario


def plan_and_print(
    scenario: Scenario,
    *,
    target: float,
    policies: str,
    num_seeds: int,
    first_seed: int,
    max_ranks: int,
    is_json: bool,
    progress: Console,
) -> bool:
    """Search, print the answer on stdout, and say whether there is one.

    Raises:
        ConfigError: the scenario, a policy or the target cannot be used; said before anything runs.
    """
    check_seeds(first_seed, num_seeds)
    with progress.status("starting", spinner="line") as status:
        sizing = find_smallest_pool(
            scenario,
            target=target,
            policies=policies,
            seeds=range(first_seed, first_seed + num_seeds),
            max_ranks=max_ranks,
            on_simulate=lambda text: status.update(text),
        )
    if is_json:
        print(json.dumps(sizing_json(sizing), indent=1, allow_nan=False))
    else:
        title = f"{scenario.profile_name}: {describe_workload(scenario, f'up to {sizing.num_seeds} seeds')}"
        shown = sizing.answer or sizing.sizes[-1]
        tables = [curve_table(sizing, title), *([scores_table(shown)] if shown.scores else [])]
        print_table(*tables, answer_text(sizing))
    return sizing.answer is not None


def answer_text(sizing: Sizing) -> str:
    """The answer in a sentence or two."""
    answer = sizing.answer
    if answer is not None and answer.best is not None:
        text = f"{answer.title} hold {sizing.target:g} with {answer.best.policy}: SAR {_sar(answer.best)}."
        for size in sizing.sizes:
            if size.num_ranks > answer.num_ranks and not size.is_held:
                text += f" {size.title} do not: more seeds tell such sizes apart."
        return text
    largest = sizing.sizes[-1]
    bound = "" if largest.bound is None else f"the bound at {largest.title} is {largest.bound:.3f}"
    if largest.best is None:
        return f"{sizing.target:g} cannot be met: {bound}."
    best = f"at {largest.title} {largest.best.policy} has SAR {_sar(largest.best)}"
    return f"{sizing.target:g} is not held by these policies: {best}{bound and f'; {bound}'}."


def curve_table(sizing: Sizing, title: str) -> Table:
    """One row per pool that was looked at."""
    table = Table(title=title, title_justify="left")
    for heading in ("GPUs", "best policy", "SAR", "seeds", "upper bound", f"holds {sizing.target:g}"):
        table.add_column(heading, justify="left" if heading == "best policy" else "right", no_wrap=True)
    for size in sizing.sizes:
        best = size.best
        table.add_row(
            str(size.num_ranks),
            best.policy if best else "none can",
            _sar(best) if best else "",
            str(len(best.sars)) if best else "",
            "" if size.bound is None else f"{size.bound:.3f}",
            "yes" if size.is_held else "no",
            style="bold" if size is sizing.answer else None,
        )
    return table


def scores_table(size: PoolSize) -> Table:
    """One row per policy on one pool; fewer seeds are those of a policy that was given up early."""
    table = Table(title=f"policies at {size.title}", title_justify="left")
    for heading in ("policy", "SAR", "seeds", "holds"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for score in size.scores:
        table.add_row(score.policy, _sar(score), str(len(score.sars)), "yes" if score.is_held else "no")
    return table


def sizing_json(sizing: Sizing) -> dict[str, object]:
    """The same for programs, unrounded; `answer` is null where no pool holds the target."""
    return {
        "target": sizing.target,
        "num_seeds": sizing.num_seeds,
        "answer": None if sizing.answer is None else _size_json(sizing.answer),
        "sizes": [_size_json(size) for size in sizing.sizes],
    }


def _size_json(size: PoolSize) -> dict[str, object]:
    return {
        "num_ranks": size.num_ranks,
        "num_nodes": size.num_nodes,
        "bound": size.bound,
        "is_held": size.is_held,
        "policies": _scores_json(size.scores),
    }


def _scores_json(scores: Iterable[PolicyScore]) -> list[dict[str, object]]:
    return [
        {
            "policy": score.policy,
            "sar": score.sar,
            "sar_half_width": score.half_width,
            "num_seeds": len(score.sars),
            "is_held": score.is_held,
        }
        for score in scores
    ]


def _sar(score: PolicyScore) -> str:
    return f"{score.sar:.4f}" + ("" if score.half_width is None else f" ± {score.half_width:.4f}")
