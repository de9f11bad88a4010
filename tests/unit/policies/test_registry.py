"""Names to policies, and what a wrong name is told."""

from __future__ import annotations

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Shape
from tetriserve.policies import POLICIES, make_policy
from tetriserve.policies.fixed import FirstComeFirstServed, FixedDegree
from tetriserve.policies.registry import warn_of_long_rounds
from tetriserve.policies.tetriserve import TetriServe


def test_builds_the_named_policy(make, flux):
    assert isinstance(make("fcfs", flux), FirstComeFirstServed)
    fixed = make("fixed:4", flux)
    assert isinstance(fixed, FixedDegree)
    assert fixed.degree == 4
    policy = make("tetriserve:step_granularity=3,placement=off,fill=off", flux)
    assert isinstance(policy, TetriServe)
    assert (policy.placement, policy.scale_up, policy.fill) == (False, True, False)
    assert policy.clock.round_s == pytest.approx(3 * 0.1218 + 0.001)


def test_a_round_spans_at_most_five_steps_of_the_largest_shape_at_its_fastest_degree_on_the_pool(make, flux):
    for spec in ("tetriserve", "tetriserve:step_granularity=5"):
        assert make(spec, flux).clock.round_s == pytest.approx(5 * 0.1218 + 0.001)
        assert make(spec, flux, 4).clock.round_s == pytest.approx(5 * 0.2184 + 0.001)


def test_a_named_granularity_fixes_the_length_of_rounds(make, flux):
    assert make("tetriserve:step_granularity=5", flux).shortest_s == pytest.approx(5 * 0.1218 + 0.001)
    assert make("tetriserve", flux).shortest_s == pytest.approx(0.4086 + 0.001)  # one step at degree 2


def warnings_of(spec, flux, slack_s, caplog):
    policy = make_policy(spec, flux, num_ranks=8, shapes=flux.shapes, slack_s=slack_s)
    caplog.clear()
    warn_of_long_rounds(spec, policy, slack_s)
    return caplog.messages


def test_a_round_longer_than_the_smallest_size_can_wait_is_warned_of_in_one_line(flux, caplog):
    fixed, adaptive = "tetriserve:step_granularity=5", "tetriserve"
    (line,) = warnings_of(fixed, flux, 0.5, caplog)
    assert "takes 0.61 s" in line
    assert "can wait 0.5 s" in line
    assert "without step_granularity" in line
    assert "\n" not in line
    assert warnings_of(adaptive, flux, 0.5, caplog) == []
    (line,) = warnings_of(adaptive, flux, 0.1, caplog)  # one step takes longer
    assert "takes 0.123 s" in line
    assert "step_granularity" not in line
    assert warnings_of(fixed, flux, 0.7, caplog) == []
    assert warnings_of("lookahead", flux, 0.1, caplog) == []


@pytest.mark.parametrize(
    ("spec", "num_ranks", "told"),
    [
        ("edd", 8, ["'edd'", "fcfs", "fixed:K", "tetriserve"]),
        ("fixed:3", 4, ["'fixed:3'", "1, 2, 4 on 4 ranks"]),
        ("fixed:8", 4, ["'fixed:8'", "1, 2, 4 on 4 ranks"]),
        ("fixed:", 8, ["'fixed:'", "1, 2, 4, 8"]),
        ("fixed", 8, ["1, 2, 4, 8"]),
        ("fcfs:2", 8, ["'fcfs:2'", "fcfs[:batch=N]"]),
        ("tetriserve:fast=yes", 8, ["'fast=yes'", "placement=on|off"]),
        ("tetriserve:step_granularity=0", 8, ["'step_granularity=0'"]),
        ("lookahead:widen=1", 8, ["'widen=1'", "widen=on|off"]),
        ("rssp:fill=on", 8, ["'fill=on'", "backfill=on|off"]),
        ("edf-best-fit:2", 8, ["'edf-best-fit:2'", "no argument"]),
        ("disaggregate:8", 8, ["'disaggregate:8'", "1 to 7"]),
        ("disaggregate:two", 8, ["'disaggregate:two'", "1 to 7"]),
        ("exhaustive:nodes=0", 8, ["'nodes=0'", "nodes=N"]),
        ("exhaustive:5", 8, ["'5'", "nodes=N"]),
    ],
)
def test_a_wrong_name_or_argument_is_told_what_is_allowed(spec, num_ranks, told, make, flux):
    with pytest.raises(ConfigError) as caught:
        make(spec, flux, num_ranks)
    assert all(part in str(caught.value) for part in told)
    assert "\n" not in str(caught.value)


def test_a_profile_without_shapes_is_refused(flux):
    with pytest.raises(ConfigError, match="no measured shape"):
        make_policy("tetriserve", flux, num_ranks=8, shapes=[])


def test_every_entry_says_how_to_write_it():
    for name, spec in POLICIES.items():
        assert spec.usage.startswith(name)
        assert spec.summary


def test_an_installed_package_adds_a_policy(tmp_path, monkeypatch, flux):
    (tmp_path / "idle_policy.py").write_text(
        "from tetriserve.core.plan import Plan\n"
        "class Idle:\n"
        "    def __init__(self, context): self.context = context\n"
        "    def plan(self, state, now): return Plan()\n"
    )
    metadata = tmp_path / "idle_policy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: idle-policy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[tetriserve.policies]\nidle = idle_policy:Idle\n")
    monkeypatch.syspath_prepend(tmp_path)

    policy = make_policy("idle:fast", flux, num_ranks=4, shapes=[Shape(256, 256)])
    assert type(policy).__name__ == "Idle"
    assert (policy.context.argument, policy.context.num_ranks, policy.context.degrees) == ("fast", 4, (1, 2, 4))
    with pytest.raises(ConfigError, match="idle"):
        make_policy("nothing", flux, num_ranks=4, shapes=[Shape(256, 256)])
