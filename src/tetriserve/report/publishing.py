"""Reports as files: the paper's evaluation as a folder, one comparison as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from tetriserve.core.bounds import check_seeds
from tetriserve.core.errors import ConfigError
from tetriserve.report.exhibit import Exhibit
from tetriserve.report.page import one_line_error, render_page, reserve_page, write_page
from tetriserve.report.paper.exhibits import EXHIBITS
from tetriserve.report.paper.experiment import BASELINES, OURS, Experiment, fixed_degrees_of
from tetriserve.report.style import save_png, styled
from tetriserve.simulator.scenario import ALL_POLICIES, Scenario, Setting, prepare
from tetriserve.simulator.study import Study

INDEX = "index.html"


def publish_paper(
    scenario: Scenario,
    folder: Path,
    *,
    policies: str,
    num_seeds: int,
    first_seed: int,
    has_bound: bool,
    num_processes: int,
    clock: Callable[[], float],
    progress: Console,
) -> None:
    """Draw the paper's evaluation: into `folder`, a PNG and a CSV file per exhibit and `index.html` with all of them.

    Files of the same names are replaced.

    Args:
        scenario: profile, pool, number of requests, steps, arrivals and noise; figures set mix, rate and SLO.
        policies: further policies for the comparisons; `all` adds none.
        clock: seconds.

    Raises:
        ConfigError: an option cannot be used here, or the folder cannot be written.
    """
    _refuse_what_figures_set(scenario)
    check_seeds(first_seed, num_seeds)
    setting = prepare(scenario)
    further = () if policies == ALL_POLICIES else setting.policies(policies)
    fixed = fixed_degrees_of(setting)
    others = tuple(name for name in dict.fromkeys((*BASELINES, *OURS, *further)) if name not in fixed)
    with one_line_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    reserve_page(folder / INDEX)
    exhibits: list[Exhibit] = []
    with progress.status("starting", spinner="line") as status, styled():
        label = ""

        def show(done: int, total: int) -> None:
            status.update(f"{label} ({len(exhibits) + 1} of {len(EXHIBITS)}): run {done} of {total}")

        seeds = range(first_seed, first_seed + num_seeds)
        with Study(seeds, num_processes=num_processes, on_progress=show) as study:
            experiment = Experiment(
                study=study, base=scenario, fixed=fixed, others=others, has_bound=has_bound, clock=clock
            )
            for entry in EXHIBITS:
                label = entry.label
                exhibit = entry.make(experiment)
                _save_files(exhibit, folder)
                exhibits.append(exhibit)
        page = render_page("The TetriServe evaluation, simulated", _introduction(scenario, setting, seeds), exhibits)
    write_page(page, folder / INDEX)
    progress.print(f"written to {folder / INDEX}", markup=False, soft_wrap=True)


def _refuse_what_figures_set(scenario: Scenario) -> None:
    if scenario.models:
        raise ConfigError(
            f"profile names {len(scenario.models)} models beside paper, whose figures are of one; write one profile "
            "without a name"
        )
    usual = Scenario()
    for name, field in (
        ("mix", "mix"),
        ("rate", "rate_per_min"),
        ("slo-scale", "slo_scale"),
        ("slo-multiple", "slo_multiple"),
        ("trace", "trace"),
        ("cache", "cache"),
    ):
        value = getattr(scenario, field)
        if value != getattr(usual, field):
            raise ConfigError(f"{name} is {value} beside paper, whose figures set it; leave out --{name} or --paper")


def _save_files(exhibit: Exhibit, folder: Path) -> None:
    with one_line_error(folder):
        exhibit.sheet.save_csv(folder / f"{exhibit.name}.csv")
        if exhibit.figure is not None:
            save_png(exhibit.figure, folder / f"{exhibit.name}.png")


def _introduction(scenario: Scenario, setting: Setting, seeds: Sequence[int]) -> list[str]:
    return [
        f"{scenario.profile_name} on {setting.num_ranks} GPUs; {scenario.num_requests} requests of "
        f"{setting.models[0].num_steps} steps, {scenario.arrivals} arrivals; each point is the mean over "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}. "
        "SAR is the SLO attainment ratio: the share of requests that finish by their deadline.",
        "Figures and tables are numbered as in the TetriServe paper (R. Lu et al., ASPLOS 2026, arXiv 2510.01565, "
        "section 6). Its hardware is not this profile: compare policies with each other, not these numbers with the "
        "paper's. The command under a figure prints one of its points again.",
    ]
