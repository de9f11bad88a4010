"""`tetriserve bench`: what it prints and writes, its mistakes, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.waiting import HANG_S
from tetriserve.cli import app
from tetriserve.core.request import Shape
from tetriserve.workload.slo import TableRule
from tetriserve.workload.traces import load_trace


def answer(document: object, status: str = "200 OK") -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


PICTURE = answer({"data": [{"b64_json": "iVBORw0KGgo="}]})
MODEL = {
    "id": "flux",
    "sizes": ["256x256", "512x512"],
    "default_num_inference_steps": 20,
    "num_ranks": 2,
    "policy": "lookahead",
}
ALL_AT_ONCE = ("--request-rate", "inf", "--warmup-requests", 0)


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env=env)


def only_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("tetriserve: ")


def test_a_run_prints_a_row_per_size_and_writes_all_its_files(stub, tmp_path: Path) -> None:
    stub.models = answer({"object": "list", "data": [MODEL]})
    output, out, report = tmp_path / "r.json", tmp_path / "r.jsonl", tmp_path / "r.html"
    result = run(
        "--base-url", f"{stub.url}/v1", "--num-prompts", 30, "--request-rate", 300, "--slo-table",
        "256x256:60,512x512:60", "--output-file", output, "--out", out, "--report", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"flux at {stub.url} under lookahead: 30 requests, uniform, 18000/min poisson, SLO scale 1"
    rows = {row[0]: row[1:] for row in ([c.strip() for c in x.split("│")[1:-1]] for x in lines if x.startswith("│"))}
    assert list(rows) == ["256x256", "512x512", "all"]
    assert rows["all"][:3] == ["30", "0", "1.000"]
    document = json.loads(output.read_text())
    assert (document["completed_requests"], document["slo_attainment_rate"], document["policy"]) == (
        30,
        1.0,
        "lookahead",
    )
    assert document["request_rate"] == 5 * 60
    assert document["by_size"]["256x256"]["completed_requests"] == int(rows["256x256"][0])
    replayed = load_trace(out, default_steps=1, deadlines=TableRule())
    assert len(replayed) == 30
    assert {request.num_steps for request in replayed} == {20}
    assert len(stub.bodies) == 32  # one more of each size to warm up
    assert all("slo_ms" not in body for body in stub.bodies[:2])
    assert all(body["slo_ms"] <= 60_000 and body["model"] == "flux" for body in stub.bodies[2:])
    page = report.read_text()
    assert f"tetriserve bench --base-url {stub.url} --num-prompts 30 --rate 18000" in page


def test_errors_are_counted_by_kind_and_do_not_stop_the_run(stub) -> None:
    replies = iter([answer({"error": {"message": "busy"}}, "429 Too Many Requests"), b"", answer([])] * 4)

    def reply(body: dict[str, Any]) -> bytes | None:
        return next(replies)

    stub.reply = reply
    result = run("--base-url", stub.url, "--num-prompts", 12, *ALL_AT_ONCE, "--format", "json")
    assert result.exit_code == 1  # nothing finished
    document = json.loads(result.stdout)
    assert {kind: fault["count"] for kind, fault in document["errors"].items()} == {
        "http_429": 4, "closed": 4, "bad_answer": 4,
    }  # fmt: skip
    assert document["errors"]["http_429"]["example"] == "busy"
    assert document["failed_requests"] == 12


def test_deadlines_can_be_a_multiple_of_what_the_warm_up_took(stub) -> None:
    result = run(
        "--base-url", stub.url, "--width", 96, "--height", 64, "--slo", "--slo-scale", 1e6, "--num-prompts", 2,
        "--request-rate", "inf", "--warmup-requests", 3, "--format", "json",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert (document["slo_scale"], document["slo_attainment_rate"]) == (1e6, 1.0)
    assert [body["size"] for body in stub.bodies] == ["96x64"] * 5
    assert document["requests"][0]["deadline_s"] > 10  # a million times a loopback exchange


def test_a_size_that_cannot_be_warmed_up_has_no_deadline(stub) -> None:
    stub.reply = lambda body: answer({"error": {"message": "size is odd"}}, "400 Bad Request")
    line = only_line(run("--base-url", stub.url, "--mix", "homogeneous:65x65", "--slo-multiple", 3))
    assert line == ("warm-up of 65x65: 1 of 1 failed, http_400: size is odd; slo-multiple needs one to finish")


def test_a_warm_up_that_fails_is_said_and_the_run_goes_on(stub) -> None:
    stub.reply = lambda body: answer({"error": {"message": "cold"}}, "500 Oops") if len(stub.bodies) == 1 else PICTURE
    result = run("--base-url", stub.url, "--mix", "512x512", "--num-prompts", 2, "--request-rate", "inf")
    assert result.exit_code == 0
    assert result.stderr == "warm-up of 512x512: 1 of 1 failed, http_500: cold\n"


def test_the_key_comes_from_openais_variable_and_is_not_written_down(stub, tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    result = run(
        "--base-url", stub.url, "--num-prompts", 1, *ALL_AT_ONCE, "--report", report,
        env={"OPENAI_API_KEY": "sk-secret"},
    )  # fmt: skip
    assert result.exit_code == 0
    assert all("Authorization: Bearer sk-secret" in head for head in stub.heads)
    assert "sk-secret" not in report.read_text()


def test_equal_seeds_ask_for_the_same_pictures(stub) -> None:
    for seed in (5, 5, 6):
        run("--base-url", stub.url, "--num-prompts", 4, *ALL_AT_ONCE, "--seed", seed, "--no-send-slo")
    first, again, other = (sorted(json.dumps(body) for body in stub.bodies[at : at + 4]) for at in (0, 4, 8))
    assert first == again != other


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        (
            answer({"error": {"message": "no"}}, "401 Unauthorized"),
            [],
            "the server refuses the API key (401); set OPENAI_",
        ),
        (answer({"error": {"message": "loading"}}, "503 Busy"), [], "the server is not ready: loading"),
        (answer({"data": [MODEL]}), ["--model", "sd"], "model 'sd' is not served; served: flux"),
        (b"", [], "no server to measure: the server closed the connection before its answer was complete; --no-check"),
    ],
)
def test_a_server_that_cannot_be_measured_is_one_line(stub, models: bytes, arguments: list[str], message: str) -> None:
    stub.models = models
    assert only_line(run("--base-url", stub.url, *arguments)).startswith(message)
    assert stub.bodies == []


def test_an_unreachable_server_is_one_line_unless_not_checked() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        line = only_line(run("--port", port))
        assert line == (
            f"no server to measure: nothing listens at http://127.0.0.1:{port}; --no-check goes on all the same"
        )
        result = run("--port", port, "--no-check", "--num-prompts", 3, *ALL_AT_ONCE, "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["errors"]["refused"]["count"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base-url", "localhost"], "base-url is 'localhost'; write it as http://HOST:PORT or https://HOST"),
        (["--task", "t2v"], "task is 't2v'; allowed: t2i"),
        (["--dataset", "vbench"], "dataset is 'vbench'; allowed: random, trace"),
        (["--dataset", "trace"], "dataset is trace without a trace file"),
        (["--width", "512"], "width is set alone; set both, or --mix"),
        (["--max-concurrency", "0"], "max-concurrency is 0; allowed: 1 to 1000000"),
        (["--warmup-requests", "-1"], "warmup-requests is -1; allowed: 0 to 1000000"),
        (["--slo", "--warmup-requests", "0"], "warmup-requests is 0 beside slo-multiple, which the warm-up measures"),
        (["--timeout", "0"], "timeout is 0; allowed: 0.001 to 604800"),
        (["--num-inference-steps", "0"], "num-inference-steps is 0; allowed: 1 to 1000"),
        (["--extra-body", "[1]"], "extra-body is [1]; it must be a JSON object"),
        (["--extra-body", "{"], "extra-body is not JSON: "),
        (["--format", "xml"], "format is 'xml'; allowed: table, json"),
        (["--output-file", "/nonexistent/r.json"], "/nonexistent/r.json cannot be written: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_a_failing_exit_code(arguments: list[str], message: str) -> None:
    assert only_line(run(*arguments)).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts", "0"], "num-prompts is 0; allowed: 1 to 1000000"),
        (["--rate", "-1"], "rate is -1; allowed: 0.001 to 1e+06"),
        (["--request-rate", "-inf"], "rate is -inf; allowed: 0.001 to 1e+06"),
        (["--mix", "zipf"], "unknown mix 'zipf'; choose one of: "),
        (
            ["--mix", "homogeneous:64x64"],
            "no deadline is known for 64x64, only from 256x256 to 2048x2048; set --slo-multip",
        ),
        (["--slo-table", "256"], "slo-table is '256'; write seconds by size, such as 256x256:1.5,512x512:2"),
        (["--prompts", "/nonexistent.txt"], "prompts /nonexistent.txt cannot be read: No such file or directory"),
    ],
)
def test_a_load_that_cannot_be_is_one_line_before_anything_is_sent(stub, arguments: list[str], message: str) -> None:
    assert only_line(run("--base-url", stub.url, *arguments)).startswith(message)
    assert stub.bodies == []


def start_bench(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "bench", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupt_prints_what_is_known_by_then(stub) -> None:
    def reply(body: dict[str, Any]) -> bytes | None:
        if len(stub.bodies) == 1:
            return answer({"data": [{"b64_json": "aaaa"}]})
        os.kill(process.pid, signal.SIGINT)
        return None

    stub.reply = reply
    process = start_bench(
        "--base-url", stub.url, "--num-prompts", 5, "--arrivals", "constant", "--request-rate", 5,
        "--warmup-requests", 0, "--slo-scale", 1000,
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert stderr == ""
    assert "interrupted: 3 of 5 not sent, 1 cut short before their deadlines and left out" in stdout
    (row,) = [line.split() for line in stdout.splitlines() if line.startswith("│ all")]
    assert row[3] == "1"
    assert row[7] == "1.000"


def test_it_starts_without_torch_and_without_a_server() -> None:
    code = (
        "import sys; from tetriserve.cli import app\n"
        "try: app(['bench', '--no-check', '--num-prompts', '1', '--request-rate', 'inf', '--port', '9'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'fastapi', 'numpy', 'scipy', 'matplotlib', 'httpx'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_shapes_of_a_table_are_sent_width_first(stub) -> None:
    run("--base-url", stub.url, "--num-prompts", 2, *ALL_AT_ONCE, "--slo-table", f"{Shape(64, 128)}:5")
    assert [body["size"] for body in stub.bodies] == ["128x64"] * 2
