"""A `.pt2` file of `torch.export.save`, looked through before torch reads it: torch would run what pickles and
expressions of such a file say, and call whatever a graph names.

    operators = checked(path)      # {"ttt_linear_f9c3...": its program as text}

What is let through are numbers, a graph of operators of PyTorch and of tttc, sizes made of integers and symbols, and
the programs of these operators, which are data (program_file.py).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from tttc.errors import FileRefused
from tttc.export.json_checks import Malformed, fail, shown, table

PROGRAMS = "tttc.json"
OURS = "torch.ops.tttc."
FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
    rf"|data/sample_inputs/model\.pt|models/model\.json|extra/{re.escape(PROGRAMS)}"
)
NEEDED = ("models/model.json", f"extra/{PROGRAMS}", "data/sample_inputs/model.pt")
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|tttc|higher_order)\.\w+(\.\w+)?|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")
SIZES = re.compile(r"(?:[A-Za-z]\w*(?=\()|true|false|-?\d{1,18}(\.\d+)?|[(), ])*", re.ASCII)
OF_SIZES = {
    *(
        "Integer",
        "Rational",
        "Float",
        "Add",
        "Mul",
        "Max",
        "Min",
        "Mod",
        "PythonMod",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
    ),
    *("Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And", "Or", "Not"),
}


def checked(path: Path) -> dict[str, str]:
    """The programs of the operators that a file's graph calls, by name.

    Raises:
        FileRefused: with the reason; nothing of the file was run.
    """
    try:
        with ZipFile(path) as archive:
            return _checked(archive)
    except (BadZipFile, EOFError, NotImplementedError) as error:
        raise FileRefused(f"{path.name} is no .pt2 file, or not all of one: {error}.") from None
    except RecursionError:
        raise FileRefused(f"{path.name} is refused: it is nested too deeply.") from None
    except ValueError as error:
        raise FileRefused(f"{path.name} is refused: {error}.") from None


def _checked(archive: ZipFile) -> dict[str, str]:
    files = {}
    for info in archive.infolist():
        inside = info.filename.partition("/")[2]
        if inside in files or not FILES.fullmatch(inside) or info.compress_type != ZIP_STORED:
            fail(f"it holds {shown(info.filename)}, which no such file has")
        files[inside] = info
    missing = [n for n in NEEDED if n not in files]
    if missing:
        fail(f"it lacks {', '.join(missing)}")
    contents = {n: archive.read(info) for n, info in files.items() if n in (*NEEDED, *CONFIGS)}
    for name in CONFIGS:
        _refuse_pickles(_json(contents.get(name, b'{"config": {}}'), name))
    try:
        torch.load(io.BytesIO(contents["data/sample_inputs/model.pt"]), weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        fail(f"its example holds more than tensors ({type(error).__name__})")
    called = _called(_json(contents["models/model.json"], "its graph"))
    programs = table(_json(contents[f"extra/{PROGRAMS}"], PROGRAMS), PROGRAMS)
    if set(programs) != called or not all(isinstance(x, str) for x in programs.values()):
        fail(f"it has programs of {', '.join(map(shown, programs)) or 'none'}, its graph calls {', '.join(called)}")
    return programs


def _json(content: bytes, what: str) -> Any:
    try:
        return json.loads(content.decode())
    except ValueError as error:
        raise Malformed(f"{what} is no JSON ({error})") from None


def _refuse_pickles(config: Any) -> None:
    for name, entry in table(table(config, "a config").get("config"), "a config").items():
        entry = table(entry, name)
        if entry.get("use_pickle") is not False or not re.fullmatch(
            r"(weight|tensor)_\d+", str(entry.get("path_name"))
        ):
            fail(f"{shown(name)} is no plain tensor")


def _called(graph: Any) -> set[str]:
    """The names of the operators of tttc that a graph calls; all that it calls and computes is of a known kind."""
    found = set()
    for key, value in _entries(graph):
        if key == "target" and isinstance(value, str):
            if not TARGETS.fullmatch(value):
                fail(f"its graph calls {shown(value)}")
            if value.startswith(OURS):
                found.add(value.removeprefix(OURS).partition(".")[0])
        elif key == "expr_str":
            _refuse_other_sizes(value)
    return found


def _refuse_other_sizes(text: Any) -> None:
    rest = SYMBOL.sub("0", text) if isinstance(text, str) and len(text) < 10_000 else "?"
    words = set(re.findall(r"[A-Za-z]\w*", rest)) - {"true", "false"}
    if not SIZES.fullmatch(rest) or not words <= OF_SIZES:
        fail(f"its graph has a size {shown(text)}")


def _entries(x: Any) -> Iterator[tuple[str, Any]]:
    """Every name of an object with its value, at any depth."""
    waiting = [x]
    while waiting:
        y = waiting.pop()
        if isinstance(y, dict):
            yield from y.items()
            waiting.extend(y.values())
        elif isinstance(y, list):
            waiting.extend(y)
