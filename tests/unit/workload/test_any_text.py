"""Whatever an operator writes as a mix, arrivals, deadlines or a trace is taken, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetriserve.bench.load import parse_slo_table
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Shape
from tetriserve.workload.arrivals import parse_arrivals
from tetriserve.workload.mixes import parse_mix
from tetriserve.workload.traces import load_trace

words = st.sampled_from(
    ["uniform", "skewed", "homogeneous", ":", "x", "256", "0", "-1", "nan", "inf", "1e999", "256x256", ",", "=", "cv",
     "gamma", "on-off", "step", "on_s", "at_s", "poisson", " ", "\u0663", "\0", "\n", "9" * 400]
)  # fmt: skip
texts = st.lists(words, max_size=6).map("".join) | st.text(max_size=10)
fields = st.sampled_from(
    ["arrival_s", "height", "width", "frames", "num_steps", "slo_ms", "seed", "priority", "request_id", "prompt",
     "status", "deadline_s"]
)  # fmt: skip
values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.lists(st.integers(), max_size=2) | st.sampled_from(["1" * 5000, 10**400, "\u0663", "1_0", " 5 "])
)  # fmt: skip
cells = st.lists(st.sampled_from(["arrival_s", "height", "width", '"', "1", "a\0", "\r", "x" * 200_000]), max_size=4)
any_path = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class FiveSeconds:
    def slo_s(self, request: Request) -> float:
        return 5.0


def check(read: Callable[[], Any]) -> None:
    try:
        read()
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "parse",
    [
        lambda text: parse_mix(text, [Shape(256, 256), Shape(512, 512)]),
        lambda text: parse_arrivals(text, 12.0),
        parse_slo_table,
    ],
    ids=["mix", "arrivals", "deadlines"],
)
def test_any_text(parse: Callable[[str], Any]) -> None:
    @settings(max_examples=300, deadline=None)
    @given(text=texts)
    def holds(text: str) -> None:
        check(lambda: parse(text))

    holds()


@any_path
@given(row=st.dictionaries(fields, values, max_size=8), is_complete=st.booleans(), junk=st.binary(max_size=20))
def test_any_line_of_a_trace(tmp_path: Path, row: dict[str, Any], is_complete: bool, junk: bytes) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"arrival_s": 0, "height": 256, "width": 256} | row if is_complete else row
    path.write_bytes(json.dumps(row).encode() + (b"" if is_complete else b"\n" + junk))
    check(lambda: load_trace(path, default_steps=3, deadlines=FiveSeconds()))


@any_path
@given(
    content=st.binary(max_size=60)
    | st.lists(cells, max_size=4).map(lambda rows: "\n".join(map(",".join, rows)).encode())
)
def test_any_table_as_a_trace(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    check(lambda: load_trace(path, default_steps=3, deadlines=FiveSeconds()))
