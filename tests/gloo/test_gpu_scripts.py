"""The scripts of `benchmarks/gpu`, dry: they run to their ends, and leave the rows that they leave on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HANG_S = 600.0
SCRIPTS = Path(__file__).parents[2] / "benchmarks/gpu"
WIDTH = 80

Rows = list[dict[str, Any]]


def run_dry(name: str, folder: Path, *options: str) -> Rows:
    """What the script wrote."""
    out = folder / f"{name}.jsonl"
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--dry-run", "--out", str(out), *options]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    rows: Rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"hardware", "date", "libraries"} <= rows[0].keys()
    assert [row for row in rows if "error" in row or "problem" in row] == []
    return rows


def cases(rows: Rows, section: str) -> list[str]:
    """Of the section's measured rows."""
    return [row["case"] for row in rows if row["section"] == section and row.keys() - {"section", "case", "skipped"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def ceilings(folder: Path) -> Rows:
    return run_dry("ceilings", folder, "--write-model", str(folder / "model"))


def test_the_ceilings_and_the_steps_of_every_size_are_measured(ceilings: Rows) -> None:
    sides = (32, 64)
    assert {"product, 512", "copy", "copy to the host"} <= set(cases(ceilings, "ceilings"))
    assert {f"eager, native, {side}" for side in sides} <= set(cases(ceilings, "eager"))
    for way in ("any size", "a graph per size"):
        assert {f"native, {way}, {side}" for side in sides} <= set(cases(ceilings, "compiled"))
    assert {f"{way}, {side}" for way in ("plain", "channels_last", "tiled") for side in sides} <= set(
        cases(ceilings, "decode")
    )
    assert {"eager, 32", "eager, 64"} <= set(cases(ceilings, "graph"))
    steps = [row for row in ceilings if row["section"] == "eager" and "mfu" in row]
    assert all(row["ms"] > 0 and row["host_ms"] > 0 and row["mfu"] > 0 for row in steps)
    assert [row["difference"] for row in ceilings if "difference" in row] == [0, 0, 0, 0]
    assert {row["case"]: row for row in ceilings}["written"]["exit_code"] == 0


def test_the_checkpoint_that_was_written_is_served_loaded_and_repaired(ceilings: Rows, folder: Path) -> None:
    rows = run_dry("serving", folder, "--model", str(folder / "model"))
    assert cases(rows, "checkpoint") == [], "it was there already"
    for section in ("server", "plain server"):
        assert {"memory", "bench", "64 alone, 4 steps"} <= set(cases(rows, section))
    benches = [row for row in rows if row["case"] == "bench"]
    assert [row["failed"] for row in benches] == [0, 0]
    assert benches[0]["done"] == benches[1]["done"] > 0
    tasks = {row["case"]: row for row in rows if row["section"] == "tasks"}
    assert {f"{side}, tasks of {num_steps}" for side in (32, 64) for num_steps in (1, 5)} <= tasks.keys()
    killed = tasks["kill -9, 64"]
    assert killed["task"] == "failed"
    assert 0 < killed["lost_s"] <= killed["failed_s"] < killed["replaced_s"]
    assert tasks["a task on both ranks after it"]["right"]


def test_exchanges_are_right_survive_deaths_and_compile_once(folder: Path) -> None:
    rows = run_dry("collectives", folder)
    by_section = {row["section"]: [each for each in rows if each["section"] == row["section"]] for row in rows}
    right = [row for row in by_section["all-to-all"] if row.get("right")]
    assert len(right) == 10, "seven sets of ranks, and three pairs side by side"
    killed = {row["case"]: row for row in by_section["killed owner"]}
    for case in ("read over the death of its owner", "read after it"):
        assert killed[case]["reads"] > 0
        assert killed[case]["wrong"] == 0
    assert sum(bool(row.get("right")) for row in killed.values()) == 2, "with the replacement"
    aborted = [row for row in by_section["abort word"] if "device_works" in row]
    assert len(aborted) == 6
    assert all(row["device_works"] for row in aborted)
    assert {row["graphs"] for row in by_section["compile"] if "graphs" in row} == {1}
    assert sum(bool(row.get("right")) for row in by_section["graph"]) == 4
    assert sum(bool(row.get("right")) for row in by_section["gloo"]) == 4, "sets in order"
