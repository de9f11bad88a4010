"""The bundled model: reproducible, safe to build from several processes, and complete."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tetriserve.core.request import Shape
from tetriserve.models import bundled
from tetriserve.models.card import read_card


def digests(directory: Path) -> dict[str, str]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_racing_processes_both_get_the_one_model_that_every_run_builds(bundled_dir: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tetriserve.models.bundled import ensure; " + (
        "print(ensure(Path(sys.argv[1])))"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    outputs = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert outputs == [str(bundled.location(tmp_path))] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == [f"tetriserve-tiny-{bundled.BUNDLED_VERSION}"]
    built = digests(bundled.location(tmp_path))
    assert built == digests(bundled_dir)
    assert sum(name.endswith(".safetensors") for name in built) == 4


def test_ensure_needs_no_torch_once_the_model_is_built(bundled_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tetriserve.models.bundled import ensure; "
        "print(ensure(Path(sys.argv[1])), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, bundled_dir.parent], capture_output=True, text=True, check=True)
    assert run.stdout == f"{bundled_dir} False\n"


def test_a_build_replaces_nothing_that_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_save", Path.mkdir)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("kept")
    with pytest.raises(OSError, match="precious"):
        bundled.build(tmp_path / "precious")
    assert [file.name for file in tmp_path.rglob("*")] == ["precious", "file"]


def test_the_card_of_the_bundled_model(bundled_dir: Path) -> None:
    card = read_card(bundled_dir)
    assert (card.name, card.dtype, card.default_num_steps) == ("tetriserve-tiny", "float32", 20)
    assert [card.num_tokens(Shape(side, side)) for side in (256, 512, 1024)] == [64, 256, 1024]
    assert (card.num_heads, card.num_text_tokens) == (8, 64)
    assert card.valid_degrees(Shape(256, 256), (1, 2, 4, 8)) == (1, 2, 4, 8)
    assert sum(file.stat().st_size for file in bundled_dir.rglob("*.safetensors")) < 42e6


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_any_text_becomes_tokens_of_its_own(bundled_dir: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(bundled_dir / name)
    texts = ["a red circle", "a blue circle", "", "zyzzyva 12", "zyzzyva 21", "東京", "大阪", "🙂", "🙃", "Ünïcödé\x07"]
    ids = [tuple(tokenizer(text).input_ids) for text in texts]
    assert len(set(ids)) == len(texts)
    assert tokenizer("A  RED circle").input_ids == tokenizer("a red circle").input_ids
    prompt = "a red circle on a blue background"
    assert tokenizer.tokenize(prompt) == [f"{word}</w>" for word in prompt.split()]
