"""The structure of the sources, measured: `python -m tests.house` prints it, tests/test_house.py holds it to LIMITS.

Sources are `ir`, `backends`, `tttc` and `examples/demo`; of each figure the places are printed too, with `--places`.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ir", "backends", "tttc", "examples/demo")
LONG_FILE, LONG_FUNCTION = 400, 40  # lines
BACKENDS = re.compile(r"\b(tvm|triton)\b")
CARRIED = re.compile(r"_(open|close|token|rows|begin|coefficients)\b")  # what scans used to be told apart by
PARTS = ("plan", "update", "loss", "signature", "adjoints", "scans", "tokens", "gradients")  # of a program

# What tests/test_house.py allows, by the name of the figure.
LIMITS = {
    "import circles": 0,
    "own imports inside functions": 0,
    ".arg[0] outside ir/expr.py": 10,
    "comparisons of scan names": 0,
    "asserts that a part of a program is there": 5,
    "names of classes and constants in two modules": 12,
    "backends named in tttc": 0,
    "files that parse sm_": 1,
    f"files over {LONG_FILE} lines": 4,
    f"functions over {LONG_FUNCTION} lines": 3,
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every source file by its path, parsed; what is a link in `tttc/` counts once, where it lies."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.resolve() == path:
                found[str(path.relative_to(ROOT))] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def module_of(path: str) -> str:
    """`ir/expr.py` is imported as tttc.ir.expr."""
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted if dotted.split(".")[0] == "tttc" else f"tttc.{dotted}"


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, ast.AST]]:
    """The own modules that a file imports, or names for what does, and where."""
    known = {module_of(p) for p in sources()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_lazy":
            yield from ((x.value, node) for x in node.args if isinstance(x, ast.Constant) and x.value in known)
        elif isinstance(node, ast.Import):
            yield from ((a.name, node) for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tttc":
            inner = {f"{node.module}.{a.name}" for a in node.names} & known
            yield from ((name, node) for name in inner)
            if len(inner) < len(node.names) and node.module in known:
                yield node.module, node


def _checked_only(tree: ast.Module) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING:`, and is never run."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {x for block in blocks for x in ast.walk(block)}


def _inside_functions(tree: ast.Module) -> set[ast.AST]:
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    return {x for f in functions for x in ast.walk(f) if x is not f}


def circles() -> list[str]:
    """Sets of modules that import one another, whether at their top or inside functions."""
    graph: dict[str, set[str]] = {}
    for path, tree in sources().items():
        module, skipped = module_of(path), _checked_only(tree)
        graph[module] = {name for name, node in imports(tree, module) if node not in skipped and name != module}
    return [" <-> ".join(sorted(group)) for group in _components(graph) if len(group) > 1]


def _components(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(stack[at:])
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def inner_imports() -> list[str]:
    """Own modules imported inside a function, but for the one lazy door of each backend: `backends/registry.py`."""
    places = []
    for path, tree in sources().items():
        inside = _inside_functions(tree)
        if path != "backends/registry.py":
            places += [f"{path}:{node.lineno} {name}" for name, node in imports(tree, "") if node in inside]
    return places


def first_arguments() -> list[str]:
    """`e.arg[0]`, where the node has a word for what it means."""
    return [
        f"{path}:{n.lineno} {ast.unparse(n)}"
        for path, tree in sources().items()
        for n in ast.walk(tree)
        if path != "ir/expr.py" and isinstance(n, ast.Subscript) and re.search(r"\.arg\[0\]$", ast.unparse(n))
    ]


def scan_names() -> list[str]:
    """Comparisons of what a scan is called, where its kind is meant."""
    found = []
    for path, tree in sources().items():
        for n in ast.walk(tree):
            compared = isinstance(n, ast.Compare) or (
                isinstance(n, ast.Call) and _called(n) in ("endswith", "startswith")
            )
            if compared and CARRIED.search(ast.unparse(n)) and re.search(r"\bname\b", ast.unparse(n)):
                found.append(f"{path}:{n.lineno} {ast.unparse(n)}")
    return found


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def asserted_parts() -> list[str]:
    """`assert program.plan is not None` and its like: a field that is empty until some stage fills it."""
    found = []
    for path, tree in sources().items():
        for n in ast.walk(tree):
            if isinstance(n, ast.Assert) and any(re.search(rf"\.{p} is not None", ast.unparse(n.test)) for p in PARTS):
                found.append(f"{path}:{n.lineno} {ast.unparse(n.test)}")
    return found


def repeated_names() -> list[str]:
    """Classes and constants of one name in several modules; what every backend has under the same name is apart."""
    places: dict[str, set[str]] = defaultdict(set)
    for path, tree in sources().items():
        for n in tree.body:
            targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
            names = [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper() and len(t.id) > 1]
            names += [n.name] if isinstance(n, ast.ClassDef) else []
            for name in names:
                places[name].add(re.sub(r"^backends/(torch|triton|tvm_cpu|tvm_cuda)/", "backends/*/", path))
    return [f"{name}: {', '.join(sorted(p))}" for name, p in sorted(places.items()) if len(p) > 1]


def named_backends() -> list[str]:
    """Strings of code in `tttc/` that name a backend; docstrings and the help of the command line are for people."""
    found = []
    for path, tree in sources().items():
        if not path.startswith("tttc/"):
            continue
        told = {id(x) for x in ast.walk(tree) if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)}
        shown = {id(c) for x in ast.walk(tree) if id(x) in told for c in ast.walk(x)} | _help_texts(tree)
        for n in ast.walk(tree):
            named = isinstance(n, ast.Constant) and isinstance(n.value, str) and BACKENDS.search(n.value)
            imported = isinstance(n, ast.ImportFrom) and BACKENDS.search(f"{n.module} {[a.name for a in n.names]}")
            if (named and id(n) not in shown) or imported:
                found.append(f"{path}:{n.lineno} {ast.unparse(n)[:80]}")
    return found


def _help_texts(tree: ast.Module) -> set[int]:
    """What is passed as `help=` or to an option of the command line."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    texts = [k.value for call in calls for k in call.keywords if k.arg in ("help", "metavar")]
    return {id(x) for text in texts for x in ast.walk(text)}


def architectures() -> list[str]:
    """Files that take "sm_90" apart, or put it together."""
    return [path for path, tree in sources().items() if any(_takes_apart(n) for n in ast.walk(tree))]


def _takes_apart(n: ast.AST) -> bool:
    if isinstance(n, ast.Call) and _called(n) in ("removeprefix", "startswith", "split", "match", "fullmatch", "sub"):
        return any(isinstance(a, ast.Constant) and "sm_" in str(a.value) for a in n.args)
    if isinstance(n, ast.Call) and _called(n) == "compile":
        return any(isinstance(a, ast.Constant) and "sm_" in str(a.value) for a in n.args)
    return isinstance(n, ast.JoinedStr) and any(
        isinstance(v, ast.Constant) and str(v.value).endswith("sm_") for v in n.values
    )


def long_files() -> list[str]:
    counts = {p: len((ROOT / p).read_text(encoding="utf-8").splitlines()) for p in sources()}
    return [f"{p}: {n}" for p, n in sorted(counts.items(), key=lambda x: -x[1]) if n > LONG_FILE]


def long_functions() -> list[str]:
    """Functions by the lines of their bodies; a docstring is for readers and does not count."""
    found = []
    for path, tree in sources().items():
        for n in ast.walk(tree):
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = n.body[1] if ast.get_docstring(n) and len(n.body) > 1 else n.body[0]
                lines = (n.end_lineno or n.lineno) - first.lineno + 1
                if lines > LONG_FUNCTION:
                    found.append(f"{path}:{n.lineno} {n.name}: {lines}")
    return found


FIGURES: dict[str, Callable[[], list[str]]] = dict(
    zip(
        LIMITS,
        (
            circles,
            inner_imports,
            first_arguments,
            scan_names,
            asserted_parts,
            repeated_names,
            named_backends,
            architectures,
            long_files,
            long_functions,
        ),
        strict=True,
    )
)


def lines() -> dict[str, int]:
    """Lines of the sources, by folder."""
    found = dict.fromkeys(FOLDERS, 0)
    for path in sources():
        folder = next(f for f in FOLDERS if path.startswith(f"{f}/"))
        found[folder] += len((ROOT / path).read_text(encoding="utf-8").splitlines())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.house", description=__doc__)
    parser.add_argument("--places", action="store_true", help="also where each is found")
    options = parser.parse_args()
    for name, figure in FIGURES.items():
        places = figure()
        print(f"{name:50} {len(places):4}   at most {LIMITS[name]}")
        for place in places if options.places else ():
            print(f"    {place}")
    print("lines: " + ", ".join(f"{f} {n}" for f, n in lines().items()) + f"; {sum(lines().values())} in all")


if __name__ == "__main__":
    main()
