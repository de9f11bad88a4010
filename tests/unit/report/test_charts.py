"""What is drawn is what was measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tetriserve.report.charts import add_legend, add_radar, draw_courses, draw_latencies, draw_ranking, draw_sars
from tetriserve.report.style import look_of
from tetriserve.simulator.comparison import Comparison, PolicyTally
from tetriserve.workload.outcome import Outcome, Status


@pytest.fixture
def axes() -> Axes:
    return Figure().add_subplot()


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def test_lines_are_the_sars_and_the_bound(axes: Axes, comparisons: list[Comparison]) -> None:
    draw_sars(axes, [12, 36], comparisons)
    drawn = lines(axes)
    assert list(drawn) == ["fixed:2", "rssp", "tetriserve", "lookahead", "upper bound"]
    for index, policy in enumerate(("fixed:2", "rssp", "tetriserve", "lookahead")):
        assert list(drawn[policy].get_xdata()) == [12, 36]
        assert list(drawn[policy].get_ydata()) == [comparison.results[index].sar for comparison in comparisons]
    assert list(drawn["upper bound"].get_ydata()) == [comparison.bound for comparison in comparisons]


def test_bands_are_the_confidence_intervals_of_featured_policies_within_0_and_1(
    axes: Axes, comparisons: list[Comparison]
) -> None:
    draw_sars(axes, [12, 36], comparisons)
    assert len(axes.collections) == 2
    band = axes.collections[0].get_paths()[0].vertices
    for x, comparison in zip((12, 36), comparisons, strict=True):
        result = comparison.results[2]
        assert result.sar_half_width
        ys = {round(y, 9) for at, y in band if at == x}
        assert ys == {
            round(max(0.0, result.sar - result.sar_half_width), 9),
            round(min(1.0, result.sar + result.sar_half_width), 9),
        }


def test_without_bounds_there_is_no_line_for_them(axes: Axes, comparisons: list[Comparison]) -> None:
    unbounded = [Comparison(results=c.results, bound=None, num_seeds=c.num_seeds) for c in comparisons]
    draw_sars(axes, [12, 36], unbounded)
    assert "upper bound" not in lines(axes)


def test_a_policy_has_one_colour_in_every_chart(comparisons: list[Comparison]) -> None:
    figure = Figure()
    grid = figure.add_gridspec(1, 4)
    draw_sars(figure.add_subplot(grid[0]), [12, 36], comparisons)
    draw_latencies(figure.add_subplot(grid[1]), comparisons[0])
    add_radar(figure, grid[2], comparisons[0])
    courses = {result.policy: [(0.0, 1.0), (60.0, 0.5)] for result in comparisons[0].results}
    draw_courses(figure.add_subplot(grid[3]), courses)
    for result in comparisons[0].results:
        colours = {to_hex(lines(axes)[result.policy].get_color()) for axes in figure.axes}
        assert colours == {look_of(result.policy).colour}


def test_the_legend_names_each_policy_once(comparisons: list[Comparison]) -> None:
    figure = Figure()
    for number in (1, 2):
        draw_sars(figure.add_subplot(1, 2, number), [12, 36], comparisons)
    add_legend(figure)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["fixed:2", "rssp", "tetriserve", "lookahead", "upper bound"]


def test_latencies_rise_from_the_quickest_request_to_all_of_them(axes: Axes, comparisons: list[Comparison]) -> None:
    draw_latencies(axes, comparisons[0])
    result = comparisons[0].results[2]
    drawn = lines(axes)["tetriserve"]
    xs, ys = list(drawn.get_xdata()), list(drawn.get_ydata())
    assert (xs[0], xs[-1]) == (result.latencies_s[0], result.latencies_s[-1])
    assert (ys[0], ys[-1]) == (1 / 80, 1.0)
    assert (xs[39], ys[39]) == (result.latencies_s[39], 0.5)


def test_a_radar_has_the_sar_of_each_size(comparisons: list[Comparison]) -> None:
    figure = Figure()
    axes = add_radar(figure, figure.add_gridspec(1, 1)[0], comparisons[1])
    result = comparisons[1].results[3]
    sars = list(result.sar_by_shape.values())
    assert list(lines(axes)["lookahead"].get_ydata()) == [*sars, sars[0]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256²", "512²", "1024²", "2048²"]


def test_the_ranking_has_the_best_on_top_and_says_every_sar(axes: Axes, comparisons: list[Comparison]) -> None:
    draw_ranking(axes, comparisons[1])
    ranked = sorted(comparisons[1].results, key=lambda result: result.sar)
    assert [label.get_text() for label in axes.get_yticklabels()] == [result.policy for result in ranked]
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"{result.sar:.3f}" for result in ranked] + [f"upper bound {comparisons[1].bound:.3f}"]


def test_a_policy_that_finished_nothing_and_a_single_seed_can_be_drawn(
    axes: Axes, outcome_of: Callable[..., Outcome]
) -> None:
    tally = PolicyTally()
    tally.take_run([outcome_of("r0", 0.0, 50.0, status=Status.FAILED)])
    result = tally.result("mine")
    assert result.sar == 0.0
    assert result.mean_latency_s != result.mean_latency_s  # NaN
    comparison = Comparison(results=(result,), bound=None, num_seeds=1)
    draw_sars(axes, [1.0], [comparison])
    assert list(lines(axes)["mine"].get_ydata()) == [0.0]
    figure = Figure()
    draw_latencies(figure.add_subplot(2, 1, 1), comparison)
    assert lines(figure.axes[0]) == {}
    add_legend(figure)
    assert figure.legends == []
    draw_ranking(figure.add_subplot(2, 1, 2), comparison)
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["mine"]
    figure.canvas.draw()
