"""What signals do to a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.waiting import HANG_S

WORK = """
import asyncio, sys
from tetriserve.stopping import Interrupted, run_until_signal

async def work():
    print("at work", flush=True)
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0)
        print("cleaned up", flush=True)

try:
    run_until_signal(work())
except Interrupted as error:
    print(error)
    sys.exit(error.exit_code)
"""
HANGING = """
import asyncio, logging, threading
from tetriserve.stopping import HardStop

logging.basicConfig()
hard_stop = HardStop(0.1)

async def main():
    asyncio.ensure_future(asyncio.to_thread(threading.Event().wait))
    await asyncio.sleep(0)
    hard_stop.exit_code = 7
    hard_stop.arm()

with hard_stop:
    asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_work_that_a_signal_breaks_off_cleans_up_and_says_so(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "at work\n"
        program.send_signal(number)
        assert program.wait(HANG_S) == 128 + number
        assert program.stdout.read() == f"cleaned up\nstopped by {number.name}\n"


def test_a_thread_that_hangs_does_not_keep_the_process_nor_change_its_exit_code() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 7
    assert "still not stopped after 0.1 s; threads at work: ['asyncio_0'" in ended.stderr
