"""The few tests that `make smoke` runs exist, and touch every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LISTED = (ROOT / "tests/smoke.txt").read_text(encoding="utf-8").split()
ROOMS = sorted(
    f"tttc.{path.parent.relative_to(ROOT / 'tttc')}".replace("/", ".")
    for path in [*(ROOT / "tttc").glob("*/__init__.py"), *(ROOT / "tttc/backends").glob("*/__init__.py")]
)
INSIDE = {
    "tttc.backends.tvm_common": "tttc.backends.tvm_cpu",
    "tttc.examples": "tests.test_examples",
}  # reached by these


@pytest.mark.parametrize("test", LISTED)
def test_what_is_listed_exists(test: str) -> None:
    file, _, name = test.partition("::")
    assert (ROOT / file).exists()
    assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_touched(room: str) -> None:
    """A file of the list imports something of it."""
    wanted = re.compile(rf"{re.escape(INSIDE.get(room, room))}(\.|$)")
    imported: set[str] = set()
    for file in {test.partition("::")[0] for test in LISTED}:
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert any(wanted.match(module) for module in imported)
