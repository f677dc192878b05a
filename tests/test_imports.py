"""Who may import whom, and who may know whom."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tttc
from tests import house
from tttc.runtime.state import State

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
    declared = tuple(f"tttc.declare.{m}" for m in ("variant", "specs", "update_rules", "read", "upstream"))
    assert all(m.startswith(declared) for m in own)


@pytest.mark.parametrize("name", ["ir", "backends"])
def test_a_package_has_one_name(name):
    """Imported as `ir`, it would be a second copy with an intern table of its own."""
    sys.modules.pop(name, None)
    with pytest.raises(ImportError, match=f"import this package as tttc.{name}"):
        importlib.import_module(name)
    assert name not in sys.modules


NAMED_BY_ONNX = 'RECURRENCE = "LinearAttention"  #'  # an operator is called as a variant of the library is


@pytest.mark.parametrize("folder", ["ir", "backends"])
def test_nothing_below_knows_a_variant(folder):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources(folder)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if VARIANT_NAME.search(line) and not line.startswith(NAMED_BY_ONNX)
    ]
    assert not found


def test_the_pattern_of_variant_names_covers_the_library():
    from tttc import library

    assert all(VARIANT_NAME.search(name) for name in library.__all__)


@pytest.mark.parametrize("figure", [house.circles, house.inner_imports])
def test_no_module_imports_in_a_circle_or_inside_a_function(figure):
    """But through the doors of what is loaded when it is asked for, which name a module in a text."""
    assert not figure()


# -- what is imported when ---------------------------------------------------------------------------------------------


def modules_after(code: str) -> set[str]:
    """What a process of its own has imported in the end."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].split())


def test_importing_the_package_brings_torch_and_little_else_and_what_compiles_no_compiler_of_graphs():
    imported = modules_after(
        "import sys\nimport torch\nbefore = {*sys.modules}\n"
        "import tttc\nnew = {*sys.modules} - before\n"
        "assert not new & {'torch._dynamo', 'sympy', 'rich', 'typer', 'triton', 'tvm'}, new\n"
        "assert len(new) < 10, new\n"
        "tttc.compile"
    )
    assert not imported & {"torch._dynamo", "matplotlib", "tvm"}


def test_the_version_is_said_without_torch():
    run = "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('tttc', run_name='__main__')"
    assert not modules_after(run) & {"torch", "sympy", "rich", "typer"}


def test_torch_reads_a_state_where_the_package_is_imported(tmp_path):
    file = tmp_path / "state.pt"
    torch.save(State({"W": torch.ones(1, 2)}), file)
    modules_after(f"import tttc, torch; assert torch.load({str(file)!r}).W.sum() == 2")


def test_every_public_name_is_there_and_is_no_module_of_the_same_name():
    """`import tttc.compile` must not be something else than `tttc.compile`."""
    modules = {m.name for m in pkgutil.iter_modules(tttc.__path__)}
    for name in tttc.__all__:
        assert isinstance(getattr(tttc, name), ModuleType) == (name in modules), name
    assert set(tttc.__all__) <= set(dir(tttc))


@pytest.mark.parametrize("command", ["list", "explain ttt_linear", "verify ttt_linear --dim D=2 --tokens 3", "demo"])
def test_only_the_demo_needs_what_its_report_is_written_with(command):
    absent = ("matplotlib", "jinja2", "markupsafe", "pygments")
    code = (
        "import sys, importlib.util as u\n"
        f"found, absent = u.find_spec, {absent}\n"
        "u.find_spec = lambda name, *rest: None if name in absent else found(name, *rest)\n"
        "sys.modules.update(dict.fromkeys(absent))\n"  # whose import is then an ImportError
        f"sys.argv[1:] = {command.split()}\n"
        "from tttc.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    if command == "demo":
        assert done.returncode == 2
        assert "matplotlib, jinja2, markupsafe, pygments are not installed" in done.stderr
        assert "pip install 'tttc[demo]'" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout
