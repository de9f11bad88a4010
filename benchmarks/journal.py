"""What the journal costs: milliseconds until an acceptance, a checkpoint and an image are on disk.

Sizes are those of the bundled model at 512x512 and of FLUX.1 at 1024x1024. Callers at once share commits. Run with

    python benchmarks/journal.py [--directory .] [--repeats 100] [--clients 1 8]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tetriserve.core.events import Checkpoint
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, image_stages
from tetriserve.journal import Entry, Journal, Key, Model
from tetriserve.workload.outcome import Outcome, Status

sys.path.append(str(Path(__file__).parents[1]))

from tests.states import MemoryStates  # noqa: E402

SIZES = {"bundled, 512x512": (512, 40 * 64 * 4, 2**16), "FLUX.1, 1024x1024": (1024, 512 * 4096 * 2, 2**19)}
"""Side, and bytes of embeddings and latents."""


def make_request(request_id: str, side: int) -> Request:
    return Request(
        request_id=request_id,
        prompt="a red circle above a blue square",
        shape=Shape(side, side),
        stages=image_stages(20),
        seed=1,
        arrival_s=0.0,
        deadline_s=5.0,
    )


def ms(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} / {1000 * statistics.quantiles(seconds, n=100)[-1]:.1f}"


def measure(directory: Path, side: int, num_embeds: int, num_latents: int, repeats: int, num_clients: int) -> None:
    journal = Journal(directory, Model("m", "f"))
    pixels = bytes(side * side * 3)
    state = {ENCODE: bytes(num_embeds), DENOISE: bytes(num_latents)}
    store = MemoryStates()
    times: dict[str, list[float]] = {"accept": [], "checkpoint": [], "image": []}

    def timed(name: str, start: float) -> None:
        times[name].append(time.perf_counter() - start)

    def live(number: int) -> None:
        request = make_request(f"r{number}", side)
        entry = Entry(
            key=Key("t", str(number)), digest="d", model="m", fingerprint="f", arrived_at=0.0, requests=(request,)
        )
        start = time.perf_counter()
        journal.accept(entry).result()
        timed("accept", start)
        start = time.perf_counter()
        states = {stage: store.put(f"{request.request_id}.{stage}.1.1", data) for stage, data in state.items()}
        journal.advance(request.request_id, 0, Checkpoint(1, 1, states, ()), store)
        while journal.num_waiting:
            time.sleep(0.0002)
        timed("checkpoint", start)
        outcome = Outcome(request=request, status=Status.FINISHED, runs=(), predicted_finish_s=1.0, finish_s=1.0)
        start = time.perf_counter()
        journal.keep_picture(outcome, (side, side, 3), pixels, 0.0).result()
        timed("image", start)
        journal.drop(request.request_id).result()

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(live, range(repeats)))
    journal.close()
    figures = ", ".join(f"{name} {ms(seconds)}" for name, seconds in times.items())
    print(f"  {num_clients} at once: {figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    print("milliseconds, p50 / p99")
    for name, sizes in SIZES.items():
        print(name)
        for num_clients in options.clients:
            with tempfile.TemporaryDirectory(dir=options.directory) as directory:
                measure(Path(directory) / "journal", *sizes, options.repeats, num_clients)


if __name__ == "__main__":
    main()
