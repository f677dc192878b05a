"""The whole file: what it says of itself, the program, the layer, the definition and the test."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from pathlib import Path
from textwrap import indent, wrap

import torch

from tttc.backends import generated
from tttc.backends.torch.functions import adjoint_function, block_function, helpers_of
from tttc.compiler.driver import compile
from tttc.explain.update_rule import read_text, update_lines
from tttc.export.onnx import ExportMismatch
from tttc.export.python import glue
from tttc.export.python.definition import declared_functions, definition, self_test, values
from tttc.export.python.facts import LONGEST_TESTED, WORDS, Facts
from tttc.export.python.module import loops, module, state_class
from tttc.ir.names import spelled, worded
from tttc.ir.program import ScanKind, TokenProgram
from tttc.ir.program_text import function_text
from tttc.ir.structure import digest
from tttc.runtime.layer import Layer
from tttc.verification.comparison import relative_error
from tttc.verification.inputs import random_inputs
from tttc.version import __version__

FILE_TOLERANCE = 1e-9  # relative, of float64
LICENSE = """\
# Written by tttc. Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""
IMPORTS = """\
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
"""
MAIN = """\
if __name__ == "__main__":
    if not self_test():
        sys.exit("the layer is not what its definition says")
    print("the layer is what its definition says")
"""


def save(layer: Layer, path: str | Path) -> Path:
    """Write the layer as a Python file, once it was seen to compute what the layer does.

    Raises:
        BackendRefusal: the layer has no such file yet; the reason is said.
        ExportMismatch: what the file computes is not what the layer does.
    """
    made, path = checked(layer), Path(path)
    path.write_text(made, encoding="utf-8")
    return path


def checked(layer: Layer) -> str:
    """The file, once it was seen to compute what the layer does."""
    made = text(layer)
    _compare(layer, made)
    return made


def text(layer: Layer) -> str:
    """The file: equal for equal layers."""
    of = Facts(plain(layer, torch.float32))
    made = worded(_marked_text(of)).text
    return of.kernels.within(made) if of.kernels else made


def plain(layer: Layer, dtype: torch.dtype) -> Layer:
    """The same layer in operations of PyTorch; an open mini-batch is carried as sums where it can be."""
    given = dict(vars(layer.settings))
    changed = {"dtype": dtype, "device": "cpu", "backend": "torch", "config": None, "telemetry": False}
    wanted = {**given, **changed, "decode": "sums"}
    same = {**wanted, "device": torch.device("cpu")} == given
    return layer if same else compile(layer.signature.variant, **wanted)


@torch.no_grad()
def _compare(layer: Layer, made: str) -> None:
    """A call of the file against the layer, both in float64; raises `ExportMismatch`."""
    exact = plain(layer, torch.float64)
    facts = Facts(exact)
    inputs = random_inputs(
        exact.signature, exact.dims, 1, min(facts.mini_batch or LONGEST_TESTED, LONGEST_TESTED) + 3, 2
    )
    z, state = exact(inputs.q, inputs.k, inputs.v, **inputs.keywords())
    given = {**inputs.params, **{n: x[0] for n, x in inputs.state.items()}}
    kind = getattr(generated.module(made, "exported", "<exported>"), facts.title)
    module = kind(num_heads=2, **{spelled(p.name): given[p.name] for p in facts.drawn}).double()
    for name, word in facts.attributes.items():
        getattr(module, word).copy_(given[name])
    found, after = module(inputs.q, inputs.k, inputs.v, *inputs.tokens.values(), *inputs.gates.values())
    pairs = [("z", found, z), *((n, x, state[n]) for n, x in zip(state, after, strict=False))]
    for name, x, wanted in pairs:
        if not (error := relative_error(x, wanted)) <= FILE_TOLERANCE:
            said = f"{name} differs by {error:.1e} in the file, more than {FILE_TOLERANCE:.0e}"
            raise ExportMismatch(f"variant `{facts.declared.name}`: {said}.\n  Nothing was written.")


def _marked_text(of: Facts) -> str:
    """The file, its names marked, and its kernels not there yet."""
    program, kernels = of.program, of.kernels
    functions, roots = [], values(of)
    for kind in WORDS:
        if (scan := of.scans.get(kind)) is None:
            continue
        functions.append(block_function(WORDS[kind], scan.params, scan.block, program, scan.doc))
        roots += [a.value for a in scan.block.assigns]
        if kind in (ScanKind.WHOLE, ScanKind.OPEN):
            adjoint = program.adjoint_of(scan)
            functions.append(adjoint_function(f"{WORDS[kind]}_adjoint", adjoint, program))
            roots += [a.value for b in (adjoint.forward, adjoint.backward) for a in b.assigns]
    made = hashlib.sha256("\n".join(functions).encode()).hexdigest()[:12]
    constant = f"MINI_BATCH = {of.mini_batch}  # tokens that share one gradient point: it changes the result"
    parts = [
        constant if of.mini_batch else "",
        *_section("what one chunk of tokens does, and its derivative: derived from the declaration"),
        "aten = torch.ops.aten" if "aten." in "".join(functions) else "",
        *helpers_of(roots),
        *functions,
        *([*_section("the same as kernels, laid out as they are printed"), kernels.place] if kernels else []),
        *_section("loops over chunks"),
        *(_glue(*kernels.names, of=kernels.source) if kernels else []),
        *_glue("Loop", "chunks", "forward", "backward", "Derived", "register", "own", "run"),
        loops(of, made),
        *_section("the layer"),
        *_glue("flat", "spread", *(["windows"] if of.of("taps") else [])),
        *(_glue("exact") if {ScanKind.CLOSE, ScanKind.BEGIN} & of.scans.keys() else []),
        state_class(of),
        module(of, _about(of)),
        *_section("the definition"),
        *declared_functions(of),
        definition(of),
        *_glue("gradients"),
        *_section("the test: python this_file.py"),
        *_glue("compare", "expected", "relative"),
        self_test(of),
        MAIN,
    ]
    body = "\n\n\n".join(p for p in parts if p)
    imports = f"{IMPORTS}import torch.nn.functional as F\n" if re.search(r"\bF\.\w", body) else IMPORTS
    imports += f"\n{kernels.imports}" if kernels else ""
    return "\n".join([LICENSE, _docstring(of), "", imports, body])


def _section(title: str) -> list[str]:
    return [f"# -- {title} {'-' * (114 - len(title))}"]


# -- what is said ------------------------------------------------------------------------------------------------------


def _docstring(of: Facts) -> str:
    declared, program = of.declared, of.program
    first = " ".join((declared.variant.__doc__ or "").split("\n\n")[0].split())
    lines = wrap(f"{declared.name}: {first}" if first else declared.name, 117)
    token = of.layer.stages.of(TokenProgram)
    functions = "\n\n".join(function_text(token[n], token) for n in ("loss", "output"))
    rule = [("  " * line.deep) + line.text for line in update_lines(program.update, program.gradients, program.plan)]
    lines += [
        "",
        "What one token asks for, and what it reads:",
        "",
        *indent(worded(functions).text, "    ").splitlines(),
    ]
    lines += [
        "",
        "The rule:",
        "",
        *(f"    {line}" for line in rule),
        f"    read {read_text(program.update, declared.read)}",
    ]
    lines += [
        "",
        f"Sizes: {', '.join(f'{d} = {n}' for d, n in program.dims.items())}; any batch, length and number of heads.",
    ]
    lines += ["", *(f"    {x}" for x in _usage(of))]
    torch_version = torch.__version__.partition("+")[0]
    lines += ["", f"Made by tttc {__version__} with torch {torch_version}, of the declaration", f"{digest(token)}."]
    lines += ["Run by itself, this file compares the layer with its definition, token by token with torch.autograd."]
    lines += ["", *of.kernels.about.splitlines()] if of.kernels else []
    said = "\n".join(x.rstrip() for x in lines).replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{said}\n"""'


def _usage(of: Facts) -> list[str]:
    tokens = ", ".join(map(spelled, of.sequences))
    drawn = "".join(f", {spelled(p.name)}=..." for p in of.drawn)
    return [
        f"layer = {of.title}(num_heads=12{drawn})",
        f"z, state = layer({tokens})  # a sequence begins",
        f"z, state = layer({tokens}, state=state)  # and goes on, from any token",
    ]


def _about(of: Facts) -> str:
    first = " ".join((of.declared.variant.__doc__ or "").split("\n\n")[0].split()) or of.declared.name
    said = "\n".join(wrap(first.replace("\\", "\\\\").replace('"""', "'''"), 110))
    return indent(f'"""{said}"""' if "\n" not in said else f'"""{said}\n"""', "    ")


@cache
def _sources(path: Path) -> dict[str, str]:
    """The functions and classes of a file as text, by name."""
    whole = path.read_text(encoding="utf-8")
    lines = whole.splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(whole).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def _glue(*names: str, of: Path = Path(glue.__file__)) -> list[str]:
    """What every file has a copy of."""
    return [_sources(of)[n] for n in names]
