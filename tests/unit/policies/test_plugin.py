"""The example of a third party's policy: found by its entry point, held to the contract, simulated by its name."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tetriserve.cli import app
from tetriserve.core.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "examples" / "policy_plugin"


@pytest.fixture
def installed(tmp_path, monkeypatch) -> None:
    """What `pip install examples/policy_plugin` leaves behind: the module's folder and its metadata on the path."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "least_slack", raising=False)


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_it_keeps_the_contract_under_overload_jitter_and_dying_ranks(
    num_ranks, installed, drive, make, poisson, death, flux
) -> None:
    requests = poisson(120, 40, seed=num_ranks)
    run = drive(
        make("least-slack", flux, num_ranks),
        requests,
        flux,
        num_ranks=num_ranks,
        jitter=0.1,
        deaths=[death(2.0, 0, 4.0), death(5.0, num_ranks - 1, 5.5)],
    )
    assert set(run.finish_s) == {request.request_id for request in requests}


def test_the_tight_request_gets_ranks_before_the_loose_ones_and_no_more_than_it_needs(
    installed, drive, make, request_of, flux
) -> None:
    loose = [request_of(2048, request_id=f"loose{index}", deadline_s=200.0) for index in range(12)]
    tight = request_of(2048, request_id="tight", arrival_s=0.1, deadline_s=9.0)
    run = drive(make("least-slack", flux), [*loose, tight], flux)
    assert run.finish_s["tight"] <= 9.0
    assert 2 < run.mean_degree("tight") < 4.5  # of 8; at 4 it takes 6.4 s
    assert all(run.mean_degree(request.request_id) == 1 for request in loose)


def test_it_is_simulated_by_its_name(installed) -> None:
    arguments = ["--requests", "40", "--seeds", "1", "--rate", "12", "--no-bound", "--format", "json"]
    result = CliRunner().invoke(app, ["simulate", "--policies", "least-slack,fixed:1", *arguments])
    assert result.exit_code == 0, result.stderr
    own, fixed = json.loads(result.stdout)["policies"]
    assert (own["policy"], fixed["policy"]) == ("least-slack", "fixed:1")
    assert own["sar"] > fixed["sar"] + 0.2


def test_its_mistakes_are_told_like_those_of_any_other(installed, make, flux) -> None:
    with pytest.raises(ConfigError, match="'least-slack:fast': it takes no argument"):
        make("least-slack:fast", flux)


def test_without_the_package_the_name_is_unknown(make, flux) -> None:
    with pytest.raises(ConfigError, match="unknown policy 'least-slack'"):
        make("least-slack", flux)
