"""The tensor store's directory lives as long as its owner, and what a killed owner left is removed by the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tetriserve.core.events import TensorRef
from tetriserve.core.states import StateGone
from tetriserve.worker.store import StoreDirectory, TensorStore

OWNER = """
import sys
from tetriserve.worker.store import StoreDirectory
directory = StoreDirectory()
(directory.path / "r.latents.1.safetensors").write_text("state")
print(directory.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another server's process with a store directory of its own."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=-1, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_a_living_owners_directory_is_kept_and_a_killed_owners_is_removed_by_the_next(
    owner: tuple[subprocess.Popen[str], Path],
) -> None:
    process, theirs = owner
    ours = StoreDirectory()
    assert theirs.is_dir()
    assert ours.path.parent == theirs.parent
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (theirs / "r.latents.1.safetensors").read_text() == "state"
    third = StoreDirectory()
    assert not theirs.exists()
    assert ours.path.is_dir()
    for directory in (ours, third):
        directory.remove()
        assert not directory.path.exists()


def test_an_owner_keeps_its_directory_while_others_of_its_process_come_and_go() -> None:
    ours, other = StoreDirectory(), StoreDirectory()
    other.remove()
    StoreDirectory().remove()
    assert ours.path.is_dir()
    ours.remove()


def test_dropping_a_request_drops_its_files_and_nobody_elses(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    kept = ["ab.latents.3.safetensors", "b.embeds.safetensors", "lock", "group-1-0-1"]
    dropped = ["a.embeds.safetensors", "a.latents.3.safetensors", f"a.pixels.{os.getpid()}.tmp.safetensors"]
    for name in (*kept, *dropped):
        (tmp_path / name).touch()
    store.drop_request("a")
    store.drop_request("a")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)
    store.drop(TensorRef("b.embeds", 0))
    store.drop(TensorRef("b.embeds", 0))
    assert not (tmp_path / "b.embeds.safetensors").exists()


def test_a_copy_outlives_what_it_was_made_from_and_stays_as_it_was(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    first = store.put("a.denoise.1.0", b"one step")
    copied = store.copy(first, "b.denoise.1.0")
    assert copied == TensorRef("b.denoise.1.0", 8)
    assert store.copy(first, "b.denoise.1.0") == copied, "again, over itself"
    store.put("a.denoise.1.0", b"another")
    assert (store.get(first), store.get(copied)) == (b"another", b"one step")
    store.drop_request("a")
    assert store.get(copied) == b"one step"
    assert [path.name for path in tmp_path.iterdir()] == ["b.denoise.1.0.safetensors"]


def test_what_is_gone_says_so(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    ref = store.put("a.denoise.1.0", b"x")
    store.drop(ref)
    for ask in (lambda: store.get(ref), lambda: store.copy(ref, "a.denoise.2.0")):
        with pytest.raises(StateGone, match="a copy was removed from the tensor store"):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_a_list_names_what_is_whole_of_one_request(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    (tmp_path / f"a.pixels.{os.getpid()}.tmp.safetensors").touch()
    for key in ("a.encode.0.0", "ab.encode.0.2", "a.denoise.1.1"):
        store.put(key, b"xyz")
    assert store.list("a") == (TensorRef("a.denoise.1.1", 3), TensorRef("a.encode.0.0", 3))
    assert store.list("b") == ()


def test_the_directory_is_its_owners_alone() -> None:
    directory = StoreDirectory()
    assert directory.path.stat().st_mode & 0o777 == 0o700
    directory.remove()


FULL_STORE = """
import resource, signal, sys
from pathlib import Path
from tetriserve.worker.store import TensorStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
store = TensorStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, most))  # room for a part of it
try:
    store.put("a.latents.1", b"x" * 10000)
except OSError as error:
    print(error.strerror)
"""


def test_what_there_is_no_room_for_leaves_no_half_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_STORE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert list(tmp_path.iterdir()) == []
