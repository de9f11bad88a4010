"""`python -m tetriserve.examples.small_wan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tetriserve.examples.small_wan import KINDS, write
from tetriserve.models.checkpoint import read_card

app = typer.Typer()
app.command()(write)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_checkpoint_that_can_be_served(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new" / kind
    result = CliRunner().invoke(app, [str(path), "--kind", kind])
    assert result.exit_code == 0, result.output
    assert "Its videos are noise." in result.output
    assert f"tetriserve serve --model {path}" in result.output
    card = read_card(path)
    assert (card.name, card.family, card.execution.dtype) == (f"small-wan-{kind}", "wan", "float32")
    assert card.valid_degrees((1, 2, 4)) == (1, 2, 4)
    assert all(shape.frames > 1 for shape in card.sizes)
    scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "UniPCMultistepScheduler"


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for directory, line in (
        (tmp_path / "full", "is not empty; name a new directory, or an empty one"),
        (tmp_path / "full" / "file", "is no directory; name a new one, or an empty one"),
        (tmp_path / "full" / "file" / "below", "cannot be written: Not a directory"),
    ):
        result = CliRunner().invoke(app, [str(directory)])
        assert result.exit_code == 2
        assert result.stderr == f"tetriserve: {directory} {line}\n"
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["file"]


def test_another_kind_is_one_line_with_those_that_are_allowed(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "new"), "--kind", "v2v"])
    assert result.exit_code == 2
    assert result.stderr == "tetriserve: kind is 'v2v'; allowed: t2v, t2v-a14b, ti2v-5b, i2v, i2v-a14b\n"
    assert not (tmp_path / "new").exists()
