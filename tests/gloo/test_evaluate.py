"""`tetriserve evaluate` on real processes."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from tetriserve.cli import app


def test_pictures_are_judged_and_held_against_the_first_schedule(profile_path: str, tmp_path: Path) -> None:
    sheet, curve, results = (tmp_path / name for name in ("sheet.png", "curve.png", "results.json"))
    asked = ["--prompts", "2", "--objects", "1", "--steps", "2,3", "--policies", "fixed:1,unsteady", "--ranks", "2"]
    files = ["--sheet", str(sheet), "--curve", str(curve), "--output-file", str(results), "--profile", profile_path]
    run = CliRunner().invoke(app, ["evaluate", *asked, *files])
    assert run.exit_code == 0, run.output
    rows = json.loads(results.read_text())["rows"]
    assert [(row["policy"], row["num_steps"]) for row in rows] == [
        ("fixed:1", 2), ("fixed:1", 3), ("unsteady", 2), ("unsteady", 3)
    ]  # fmt: skip
    assert all(row["objects"]["total"] == 2 for row in rows)
    assert "psnr_db_min" not in rows[0]
    assert all(row["psnr_db_min"] >= 60 for row in rows[2:]), "pictures do not depend on the schedule"
    assert all(Image.open(picture).width > 1000 for picture in (sheet, curve))
    assert "unsteady" in run.output
