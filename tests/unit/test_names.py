"""One name means one thing: no two modules have a public class of the same name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import tetriserve

PACKAGE = Path(tetriserve.__file__).parent


def test_public_classes_have_different_names() -> None:
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].append(str(path.relative_to(PACKAGE)))
    assert len(modules) > 100
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}
