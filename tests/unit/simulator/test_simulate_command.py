"""`tetriserve simulate`: its table, its files, its mistakes, its start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tetriserve.cli import app


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TETRISERVE_"):
            monkeypatch.delenv(name)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_the_table_has_a_row_per_policy_and_the_bound() -> None:
    result = run("--mix", "skewed", "--rate", 24, "--requests", 30, "--seeds", 2, "--policies", "fcfs,fixed:2")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "flux.1-dev-8xh100 on 8 ranks: 30 requests x 2 seeds, skewed, 24/min poisson, SLO scale 1"
    )
    for heading in ("policy", "SAR", "256x256", "2048x2048", "mean s", "p50 s", "p99 s", "GPU s"):
        assert heading in lines[2]
    names = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert names == ["fcfs", "fixed:2", "upper bound"]


def test_json_has_the_same_numbers_for_programs() -> None:
    result = run("--requests", 20, "--seeds", 1, "--policies", "fixed:8", "--format", "json")
    document = json.loads(result.stdout)
    (row,) = document["policies"]
    assert row["policy"] == "fixed:8"
    assert 0 < row["sar"] <= document["bound"] <= 1
    assert set(row["sar_by_shape"]) == {"256x256", "512x512", "1024x1024", "2048x2048"}
    assert row["sar_half_width"] is None


def test_options_come_from_a_file_under_their_own_names(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("format: json\nrequests: 7\nseeds: 1\npolicies: [fcfs, 'fixed:2']\nbound: false\nslo-scale: 1.5\n")
    document = json.loads(run("--config", path).stdout)
    assert document["bound"] is None
    assert [row["policy"] for row in document["policies"]] == ["fcfs", "fixed:2"]
    twice = json.loads(run("--config", path, "--slo-scale", 50).stdout)
    assert twice["policies"][0]["sar"] == 1.0


def test_outcomes_of_all_runs_are_written_and_can_be_replayed(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--requests", 20, "--policies", "fcfs,fixed:2", "--no-bound", "--format", "json"]
    first = run(*arguments, "--seeds", 2, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(line["policy"], line["workload_seed"]) for line in lines} == {
        (policy, seed) for policy in ("fcfs", "fixed:2") for seed in (0, 1)
    }
    assert len(lines) == 80
    one = tmp_path / "one.jsonl"
    one.write_text("".join(json.dumps(line) + "\n" for line in lines[:20]))
    replayed = json.loads(run(*arguments, "--seeds", 5, "--trace", one).stdout)
    assert replayed["num_seeds"] == 1  # the same every time
    attained = sum(line["attained"] for line in lines[:20])
    assert replayed["policies"][0]["sar"] == pytest.approx(attained / 20)
    assert first.stdout == run(*arguments, "--seeds", 2).stdout


def test_the_trace_has_a_row_per_rank_a_block_per_task_and_every_deadline(tmp_path: Path) -> None:
    out, trace_out = tmp_path / "out.jsonl", tmp_path / "run.json"
    result = run(
        "--requests", 15, "--seeds", 2, "--policies", "tetriserve,fcfs", "--out", out, "--trace-out", trace_out
    )
    assert result.exit_code == 0, result.stderr
    events = json.loads(trace_out.read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows == {rank: f"rank {rank}" for rank in range(8)} | {8: "deadlines"}
    (process,) = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert process == "tetriserve, seed 0"
    lines = [json.loads(line) for line in out.read_text().splitlines()][:15]
    blocks = [event for event in events if event["ph"] == "X"]
    assert sum(block["dur"] for block in blocks) / 1e6 == pytest.approx(sum(line["gpu_time_s"] for line in lines))
    denoised = sum(
        block["args"]["steps"] / int(block["name"].split(" x")[1]) for block in blocks if block["cat"] == "denoise"
    )
    assert denoised == pytest.approx(15 * 28)
    for rank in range(8):
        own = sorted((block["ts"], block["dur"]) for block in blocks if block["tid"] == rank)
        assert all(ts + dur <= later + 1e-3 for (ts, dur), (later, _) in zip(own, own[1:], strict=False))
    deadlines = [event for event in events if event["ph"] == "i"]
    assert [event["name"] for event in deadlines] == [
        f"{line['request_id']} {'attained' if line['attained'] else 'missed'}" for line in lines
    ]
    assert [event["ts"] / 1e6 for event in deadlines] == pytest.approx([line["deadline_s"] for line in lines])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "guesswork"], "unknown policy 'guesswork'; choose one of: "),
        (["--policies", "fixed:3"], "policy 'fixed:3': the degree must be one of 1, 2, 4, 8 on 8 ranks"),
        (["--mix", "zipf"], "unknown mix 'zipf'; choose one of: uniform, skewed[:ALPHA], homogeneous:WxH, or weights"),
        (["--rate", "-1"], "rate is -1; allowed: 0.001 to 1e+06"),
        (["--requests", "0"], "requests is 0; allowed: 1 to 1000000"),
        (["--seeds", "0"], "seeds is 0; allowed: 1 to 10000"),
        (["--profile", "nowhere"], "profile 'nowhere' is neither a file nor bundled; bundled: flux.1-dev-8xh100, "),
        (["--mix", "homogeneous:64x64"], "profile flux.1-dev-8xh100 does not cover 64x64: "),
        (["--format", "xml"], "format is 'xml'; allowed: table, json"),
        (["--trace", "/nonexistent.csv"], "trace /nonexistent.csv cannot be read: No such file or directory"),
        (["--steps", "many"], "steps is 'many'; it must be a whole number, or NAME=NUMBER with commas"),
        (["--profile", "a=nowhere", "--mix", "a:1"], "profile 'nowhere' is neither a file nor bundled"),
        (
            ["--slo-multiple", "videos=2"],
            "slo-multiple 'videos=2': unknown model 'videos'; models: one, which has",
        ),
        (["--out", "/nonexistent/o.jsonl"], "/nonexistent/o.jsonl cannot be written: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_a_failing_exit_code(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"tetriserve: {message}")


def test_several_profiles_come_from_the_command_line_or_a_file(tmp_path: Path) -> None:
    arguments = [
        "--profile", "images=flux.1-dev-8xh100", "--profile", "videos=wan2.2-ti2v-5b-8xh100",
        "--mix", "images:4,videos:1", "--slo-multiple", "videos=2", "--slo-scale", "images=1.5", "--steps", "videos=20",
    ]  # fmt: skip
    out = tmp_path / "out.jsonl"
    common = ["--requests", "15", "--seeds", "1", "--policies", "srtf", "--format", "json"]
    result = run(*arguments, *common, "--out", out)
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["policies"]
    assert set(row["sar_by_model"]) == {"images", "videos"}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(line["model"], line["num_steps"], line["frames"] > 1) for line in lines} == {
        ("images", 28, False),
        ("videos", 20, True),
    }
    path = tmp_path / "c.yaml"
    path.write_text(
        "profile: [images=flux.1-dev-8xh100, videos=wan2.2-ti2v-5b-8xh100]\nmix: 'images:4,videos:1'\n"
        "slo-multiple: videos=2\nslo-scale: images=1.5\nsteps: videos=20\n"
    )
    assert run("--config", path, *common).stdout == result.stdout
    replayed = json.loads(run(*arguments, *common, "--trace", out).stdout)
    assert replayed["policies"] == [{**row, "sar_half_width": None}]


def test_it_starts_without_torch_and_without_scipy_when_no_bound_is_asked_for() -> None:
    code = (
        "import sys; from tetriserve.cli import app\n"
        "try: app(['simulate', '--requests', '3', '--seeds', '1', '--policies', 'fcfs', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'fastapi', 'numpy', 'scipy'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))"
    )
    for arguments, heavy in ((["--no-bound"], "heavy: []"), ([], "heavy: ['numpy', 'scipy']")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == heavy


def test_on_nodes_no_task_is_wider_than_one_and_mistakes_are_one_line() -> None:
    options = ("--rate", 60, "--requests", 20, "--seeds", 1, "--policies", "fcfs", "--no-bound")
    result = run("--nodes", "4x2", *options)
    assert result.exit_code == 0, result.stderr
    assert "on 8 ranks" in result.stdout and "nodes of 2" in result.stdout
    many, one = (json.loads(run(*pool, *options, "--format", "json").stdout) for pool in (("--nodes", "1x8"), ()))
    assert many["policies"] == one["policies"], "one node is a pool of as many ranks"
    for arguments, message in (
        (("--nodes", "4y8"), "nodes is '4y8'; write the number of nodes and of ranks on each, such as 4x8"),
        (("--nodes", "4x8", "--ranks", 3), "ranks is 3 beside nodes, which says how many there are; leave one out"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
