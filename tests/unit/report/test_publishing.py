"""`simulate --report` and `simulate --paper` as a user runs them."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tetriserve.cli import app
from tetriserve.report.paper.exhibits import EXHIBITS


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TETRISERVE_"):
            monkeypatch.delenv(name)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole evaluation of five requests."""
    folder = tmp_path_factory.mktemp("paper") / "new" / "out"
    result = run("--paper", folder, "--requests", 5, "--steps", 2, "--seeds", 1, "--policies", "fcfs")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    return folder


def test_every_exhibit_has_its_files_and_its_place_on_the_page(paper: Path) -> None:
    page = (paper / "index.html").read_text()
    names = [path.stem for path in sorted(paper.glob("*.csv"))]
    assert len(names) == len(EXHIBITS)
    for name in names:
        assert f'<section id="{name}">' in page
        if not name.startswith(("overview", "table")):
            assert (paper / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("<svg") == len(list(paper.glob("*.png"))) == 13


def test_a_sweep_has_all_its_cells_with_the_bound_and_the_policies_asked_for(paper: Path) -> None:
    rows = rows_of(paper / "figure-08-slo-scale-skewed.csv")
    policies = [row["policy"] for row in rows[:10]]
    assert policies == [
        "fixed:1", "fixed:2", "fixed:4", "fixed:8", "rssp", "edf-best-fit", "tetriserve", "lookahead", "fcfs",
        "upper bound",
    ]  # fmt: skip
    cells = dict.fromkeys((row["per minute"], row["SLO scale"]) for row in rows)
    assert len(cells) == 3 * 6
    assert len(rows) == 10 * len(cells)
    for start in range(0, len(rows), 10):
        *results, bound = rows[start : start + 10]
        assert max(float(row["SAR"]) for row in results) <= float(bound["SAR"])


def test_the_overview_is_the_mean_over_scales_and_says_what_each_size_gets(paper: Path) -> None:
    rows = {row["policy"]: row for row in rows_of(paper / "overview.csv")}
    cells = [
        row
        for mix in ("07-slo-scale-uniform", "08-slo-scale-skewed")
        for row in rows_of(paper / f"figure-{mix}.csv")
        if row["policy"] == "lookahead"
    ]
    sars = [float(row["SAR"]) for row in cells[-6:]]  # skewed, 36 per minute
    assert float(rows["lookahead"]["skewed 36/min"]) == pytest.approx(sum(sars) / 6)
    large = [float(row["SAR 2048x2048"]) for row in cells if row["SAR 2048x2048"]]
    assert float(rows["lookahead"]["2048x2048"]) == pytest.approx(sum(large) / len(large))
    assert float(rows["upper bound"]["skewed 36/min"]) >= sum(sars) / 6
    assert rows["upper bound"]["2048x2048"] == ""


def test_the_same_cell_has_the_same_numbers_in_every_figure(paper: Path) -> None:
    by_scale = rows_of(paper / "figure-07-slo-scale-uniform.csv")
    by_rate = rows_of(paper / "figure-13-arrival-rate.csv")
    one = [row for row in by_scale if (row["per minute"], row["SLO scale"]) == ("24.0", "1.2")]
    other = [row for row in by_rate if (row["mix"], row["per minute"]) == ("uniform", "24.0")]
    assert [(row["policy"], row["SAR"]) for row in one] == [(row["policy"], row["SAR"]) for row in other]


def test_the_command_under_a_figure_prints_its_numbers(paper: Path) -> None:
    page = (paper / "index.html").read_text()
    section = page.split('<section id="figure-08-slo-scale-skewed">')[1]
    command = shlex.split(section.split("<code>")[1].split("</code>")[0])
    assert command[:2] == ["tetriserve", "simulate"]
    printed = json.loads(run(*command[2:], "--format", "json").stdout)
    rows = rows_of(paper / "figure-08-slo-scale-skewed.csv")
    cell = [row for row in rows if (row["per minute"], row["SLO scale"]) == ("24.0", "1.2")]
    assert [(p["policy"], p["sar"]) for p in printed["policies"]] == [
        (row["policy"], float(row["SAR"])) for row in cell[:-1]
    ]
    assert printed["bound"] == float(cell[-1]["SAR"])


def test_the_ablation_adds_one_mechanism_after_the_other_beside_the_papers_numbers(paper: Path) -> None:
    rows = rows_of(paper / "table-05-ablation.csv")
    assert [row["mechanisms"] for row in rows[:5]] == [
        "schedule", "+ placement", "+ scale-up", "+ fill", "+ adaptive rounds",
    ]  # fmt: skip
    assert [row["paper: SAR"] for row in rows[:4]] == ["0.54", "0.56", "0.63", ""]
    assert len(rows) == 5 * 4 * 3


def test_a_cache_is_compared_with_none(paper: Path) -> None:
    rows = rows_of(paper / "table-03-approximate-cache.csv")
    first = {
        (row["cache"], row["policy"]): row for row in rows if (row["mix"], row["per minute"]) == ("skewed", "12.0")
    }
    assert first["nirvana", "tetriserve"]["paper: SAR"] == "0.75"
    assert float(first["nirvana", "tetriserve"]["GPU s"]) < float(first["none", "tetriserve"]["GPU s"])


def test_a_search_is_timed_beside_the_papers_seconds(paper: Path) -> None:
    rows = rows_of(paper / "table-06-exhaustive-search.csv")
    assert [(row["GPUs"], row["requests"]) for row in rows] == [("4", n) for n in "1234"] + [("8", n) for n in "123"]
    assert rows[1]["paper: s"] == "0.27"
    assert rows[0]["searched to the end"] == "1 of 1"
    assert all(float(row["exhaustive s"]) > 0 and float(row["tetriserve ms"]) > 0 for row in rows)
    nodes = [float(row["partial schedules"]) for row in rows]
    assert nodes[0] < nodes[1] < nodes[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "24"], "rate is 24.0 beside paper, whose figures set it; leave out --rate or --paper"),
        (["--mix", "skewed"], "mix is skewed beside paper, whose figures set it; leave out --mix or --paper"),
        (
            ["--profile", "a=flux.1-dev-8xh100"],
            "profile names 1 models beside paper, whose figures are of",
        ),
        (["--out", "o.jsonl"], "out is o.jsonl beside paper, which writes files of its own; leave one out"),
        (["--report", "r.html"], "report is r.html beside paper, which writes files of its own; leave one out"),
        (["--seeds", "0"], "seeds is 0; allowed: 1 to 10000"),
        (["--policies", "guesswork"], "unknown policy 'guesswork'; choose one of: "),
    ],
)
def test_a_mistake_beside_paper_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("--paper", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"tetriserve: {message}")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "out", "Not a directory")):
        result = run("--paper", folder)
        assert result.exit_code == 2
        assert result.stderr == f"tetriserve: {folder} cannot be written: {reason}\n"


def test_a_report_has_the_printed_numbers_and_all_drawings(tmp_path: Path) -> None:
    arguments = ["--mix", "skewed", "--rate", 30, "--requests", 12, "--seeds", 2, "--policies", "tetriserve,fixed:4"]
    result = run(*arguments, "--report", tmp_path / "r.html", "--format", "json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    page = (tmp_path / "r.html").read_text()
    for policy in printed["policies"]:
        assert f'<td class="word">{policy["policy"]}</td><td>{policy["sar"]:.3f}</td>' in page
    assert "12 requests x 2 seeds, skewed, 30/min poisson, SLO scale 1" in page
    assert page.count("<svg") == 5
    assert page.count("tetriserve simulate --mix skewed --rate 30 --requests 12 --policies tetriserve,fixed:4") == 5


def test_a_report_that_cannot_be_written_is_one_line_before_anything_runs() -> None:
    result = run("--report", "/nonexistent/r.html", "--requests", 1_000_000)
    assert result.exit_code == 2
    assert result.stderr == "tetriserve: /nonexistent/r.html cannot be written: No such file or directory\n"


@pytest.mark.parametrize("second", ["0,512,512\n", "1,512,512\n", ""])
def test_a_trace_of_hardly_anything_can_be_reported(tmp_path: Path, second: str) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,height,width\n0,256,256\n" + second)
    result = run("--trace", trace, "--policies", "fcfs", "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.stderr
    assert f"--trace {trace}" in (tmp_path / "r.html").read_text()


def test_matplotlib_is_loaded_for_a_report_only(tmp_path: Path) -> None:
    code = (
        "import sys; from tetriserve.cli import app\n"
        "try: app(['simulate', '--requests', '3', '--seeds', '1', '--policies', 'fcfs', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "print('loaded:', [name for name in ('matplotlib', 'matplotlib.pyplot', 'torch') if name in sys.modules])"
    )
    for arguments, loaded in (([], []), (["--report", str(tmp_path / "r.html")], ["matplotlib"])):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"loaded: {loaded}"


def test_gf_dits_comparison_has_every_model_load_and_policy_and_compares_with_the_worst_fixed_degree(
    paper: Path,
) -> None:
    rows = rows_of(paper / "gf-dit-fixed-pipelines.csv")
    of_wan = [row for row in rows if row["model"] == "Wan 2.2 TI2V-5B" and row["load"] == "1.2"]
    assert [row["policy"] for row in of_wan[:4]] == ["fixed:1", "fixed:2", "fixed:4", "fixed:8"]
    assert {row["load"] for row in rows} == {"0.5", "0.8", "1.2"}
    assert {row["model"] for row in rows} == {"Qwen-Image", "Wan 2.2 TI2V-5B"}
    worst = min(float(row["finished per minute"]) for row in of_wan[:4])
    for row in of_wan:
        assert float(row["throughput, × worst fixed"]) == pytest.approx(float(row["finished per minute"]) / worst)
        assert 0 <= float(row["late"]) <= 1
