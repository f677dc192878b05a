"""The walks of CONTRIBUTING.md, walked: on a copy of the sources, into which its blocks are put."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.test_readme import code_blocks

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LONGEST = 80  # lines
RECURRENCES = ("Add an operation", "Add an update rule", "Add a backend")


def edits_and_uses() -> tuple[list[tuple[str, str]], list[str]]:
    """What is added to which file, and what is run then."""
    edits, uses = [], []
    for block in code_blocks(TEXT, "python"):
        file = re.match(r"# (\S+\.py)\b.*\n", block)
        if file is None:
            uses.append(block)
        else:
            edits.append((file[1], block[file.end() :]))
    return edits, uses


def test_it_is_short_and_has_three_walks() -> None:
    assert len(TEXT.splitlines()) <= LONGEST
    assert re.findall(r"^## (Add .*)$", TEXT, re.MULTILINE) == list(RECURRENCES)
    for walk in RECURRENCES:
        assert re.search(
            r"^assert tttc\.verify\(.*\)\.ok$", TEXT.split(f"## {walk}")[1].split("\n## ")[0], re.MULTILINE
        )


# A structural operation that is made of others, as ir/README.md counts it.
STRUCTURAL = {
    "ir/ops.py": """
def _lower_log_softmax(node: Expr) -> Expr:
    (x,), (axis,) = node.src, node.arg
    below = b.sub(x, b.stop_gradient(b.maximum(x, (axis,))))
    return b.sub(below, b.apply("log", b.total(b.apply("exp", below), (axis,))))


_make = partial(b.normalize, "log_softmax")
OPS["log_softmax"] = Op(
    "log_softmax", _normalized_axes, _lowered_numpy, None, hint="n", lower=_lower_log_softmax, make=_make
)
""",
    "ir/numerics.py": """
def log_softmax(x: Any, axis: int = -1) -> Any:
    below = x - np.max(x, axis=axis, keepdims=True)
    return below - np.log(np.sum(np.exp(below), axis=axis, keepdims=True))
""",
    "tttc/declare/traced_functions.py": """
def _log_softmax(values: list[Traced]) -> Traced:
    (x,) = values
    return Traced(Expr("log_softmax", (x.expr,), (x.axes[-1],)), x.axes)


_SPECIAL["log_softmax"] = _Special(_log_softmax)
""",
    "tttc/declare/functions.py": """
log_softmax = _dispatch("log_softmax", lambda x: torch.log_softmax(x, -1), "log(softmax(x)) over the last axis.")
""",
    "tttc/public.py": """
from tttc.declare.functions import log_softmax
__all__ += ["log_softmax"]
""",
}
USES_IT = """
class Logs(tttc.Variant):
    W = tttc.state("D", "D", init=tttc.normal(0.1))
    learner = lambda self, x: tttc.log_softmax(x @ self.W)
    loss = lambda self, k, v: 0.5 * tttc.sum((self.learner(k) - v) ** 2)
    update = tttc.sgd(lr=tttc.gate("lr"))
assert all(tttc.verify(Logs, backend=b).ok for b in ("torch", "toy"))
"""


def test_operations_and_a_rule_are_in_as_many_files_as_it_says() -> None:
    assert len(STRUCTURAL) == 5
    assert [file for file, _ in edits_and_uses()[0]] == [
        "ir/scalars.py",
        "tttc/declare/functions.py",
        "tttc/public.py",
        "tttc/declare/update_rules.py",
        "tttc/public.py",
    ]


def test_the_walks_lead_where_they_say(tmp_path: Path) -> None:
    for folder in ("tttc", "ir", "backends", "examples", "tests/backends"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests/__init__.py").touch()
    edits, uses = edits_and_uses()
    for file, block in [*edits, *STRUCTURAL.items()]:
        with (tmp_path / file).open("a", encoding="utf-8") as written:
            written.write(f"\n\n{block}")
    (tmp_path / "walk.py").write_text("import tttc\n\n" + "\n".join([*uses, USES_IT]) + "\nprint(tttc.__file__)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TTTC_TUNING": "0"}
    done = subprocess.run(
        [sys.executable, "walk.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "tttc/__init__.py")
