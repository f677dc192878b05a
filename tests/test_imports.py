"""Who may import whom, and who may know whom."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VARIANT_NAME = re.compile(
    r"ttt_?(linear|mlp|video)|linear_?attention|gated_?three|delta_?net|ret_?net|titans|lact\b|mttt|mamba|\bgla\b"
    r"|\bkda\b|longhorn|moneta|yaad|vittt",
    re.IGNORECASE,
)
OWN = {"tttc", "ir", "backends", "benchmarks", "examples", "tests"}


def sources(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imported(path):
    """Every module that a file imports, wherever in it; `from a import b` counts as a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def strangers(folder, allowed):
    """The imports of the project's own modules from outside the allowed packages."""
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(folder)
        for module in imported(path)
        if module.split(".")[0] in OWN
        and not any(module == package or module.startswith(f"{package}.") for package in allowed)
        and not any(package.startswith(f"{module}.") for package in allowed)  # `from tttc.ir import x` names tttc.ir
    ]


def test_the_ir_imports_nothing_else_of_the_project():
    assert not strangers("ir", ["tttc.ir"])


def test_backends_import_the_ir_only():
    assert not strangers("backends", ["tttc.ir", "tttc.backends"])


def test_the_ir_needs_numpy_and_sympy_alone():
    third_party = (
        {module.split(".")[0] for path in sources("ir") for module in imported(path)} - sys.stdlib_module_names - OWN
    )
    assert third_party <= {"numpy", "sympy"}


def test_the_oracle_imports_nothing_of_the_compiler():
    own = {m for m in imported(ROOT / "tttc" / "reference.py") if m.split(".")[0] in OWN}
    declared = ("tttc.declare.variant", "tttc.declare.specs", "tttc.declare.update_rules", "tttc.declare.read")
    assert all(m.startswith(declared) for m in own)


@pytest.mark.parametrize("name", ["ir", "backends"])
def test_a_package_has_one_name(name):
    """Imported as `ir`, it would be a second copy with an intern table of its own."""
    sys.modules.pop(name, None)
    with pytest.raises(ImportError, match=f"import this package as tttc.{name}"):
        importlib.import_module(name)
    assert name not in sys.modules


@pytest.mark.parametrize("folder", ["ir", "backends"])
def test_nothing_below_knows_a_variant(folder):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources(folder)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if VARIANT_NAME.search(line)
    ]
    assert not found


def test_the_pattern_of_variant_names_covers_the_library():
    from tttc import library

    assert all(VARIANT_NAME.search(name) for name in library.__all__)
