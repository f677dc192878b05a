"""The glossary of ir/README.md is that of the code: what it names exists, and the main classes are named."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("ir", "backends", "tttc")
MAIN = (
    "ir/expr.py",
    "ir/program.py",
    "ir/response.py",
    "backends/interface.py",
    "backends/registry.py",
    "tttc/compiler/pipeline.py",
)


def glossary() -> dict[str, list[str]]:
    """What stands for each word in the code."""
    text = (ROOT / "ir/README.md").read_text(encoding="utf-8").split("## Glossary")[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    return {word.strip(): re.findall(r"`(\w+)`", code) for word, code, _ in rows}


@cache
def names() -> set[str]:
    """Modules, classes, functions, their parameters, and what classes and modules assign."""
    found: set[str] = set()
    for path in (p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def classes(file: str) -> set[str]:
    """The public classes of a file, but for errors."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    found = [n for n in body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    return {
        n.name for n in found if not any("Error" in ast.unparse(b) or "Exception" in ast.unparse(b) for b in n.bases)
    }


def test_each_word_is_one_of_the_code() -> None:
    named = glossary()
    assert len(named) > 20
    assert {
        word: [n for n in code if n not in names()] for word, code in named.items() if not names() >= set(code)
    } == {}
    assert [word for word, code in named.items() if not code] == []


def test_the_main_classes_are_in_it() -> None:
    named = {name for code in glossary().values() for name in code}
    assert {file: sorted(classes(file) - named) for file in MAIN if not named >= classes(file)} == {}


def test_no_name_stands_for_two_words() -> None:
    code = [name for names_of_word in glossary().values() for name in names_of_word]
    assert sorted({name for name in code if code.count(name) > 1}) == []
