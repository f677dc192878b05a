"""The README is true: its code runs, its names exist."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

import tttc
from tttc import library

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    found: list[str] = []
    opened: str | None = None
    for line in README.splitlines():
        if not line.startswith("```"):
            if opened == language:
                found[-1] += line + "\n"
        elif opened is not None:
            opened = None
        else:
            opened = line[3:]
            found += [""] if opened == language else []
    return found


def test_the_declaration_runs(capsys) -> None:
    """The first Python block declares, compiles, runs and verifies."""
    scope: dict = {}
    exec(code_blocks("python")[0], scope)
    assert scope["z"].shape == (2, 100, 12, 64)
    assert scope["state"].W1.shape == (2, 12, 64, 256)
    assert scope["state"].position == 100 % 16
    assert "equal to the oracle" in capsys.readouterr().out


def test_the_dual_form_is_what_is_printed() -> None:
    """Every line of the shown program is a line of the derived one."""
    layer = tttc.compile(library.TTTMLP, {"D": 64, "F": 256})
    printed = {line.strip() for line in str(layer.stages["dualize"]).splitlines()}
    shown = [line.strip() for line in code_blocks("python")[1].splitlines() if line.strip() not in ("", "...")]
    assert shown
    assert [line for line in shown if line not in printed] == []


def test_the_rule_of_ones_own_runs(tmp_path, capsys) -> None:
    """The third block declares a rule in a file, as a reader would, and verifies."""
    file = tmp_path / "memory.py"
    file.write_text(code_blocks("python")[2])
    exec(compile(file.read_text(), str(file), "exec"), {"__name__": "memory"})
    assert "equal to the oracle" in capsys.readouterr().out


def test_the_pipeline_is_the_one_that_runs() -> None:
    """The stages are listed in their order."""
    assert re.findall(r'Stage\("(\w+)"', code_blocks("python")[3]) == [stage.name for stage in tttc.PIPELINE]


def test_the_module_is_compiled_whole(monkeypatch) -> None:
    """The fifth block runs; inductor, whose compiler takes its time, has a test of its own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    scope: dict = {"torch": torch, "tttc": tttc}
    exec(code_blocks("python")[4], scope)
    assert scope["y"].shape == (2, 1, 64)
    assert scope["cache"].position == 33


def test_every_ready_declaration_is_listed() -> None:
    """The table of declarations is the library."""
    section = README.split("## Ready declarations")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(library.__all__)


def test_every_make_target_exists() -> None:
    """`make x` in the README is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in code_blocks("") for line in block.splitlines() if line.startswith("make ")]
    named = {word for line in lines for word in line.split("#")[0].split()[1:]}
    assert named
    assert named <= targets


def test_every_command_exists() -> None:
    """`tttc x` in the README is a command."""
    from typer.main import get_command

    from tttc.cli.main import app

    named = set(re.findall(r"^tttc (\w+)", "\n".join(code_blocks("")), re.MULTILINE))
    assert named
    assert named <= set(get_command(app).commands)  # type: ignore[attr-defined]


def test_every_link_leads_somewhere() -> None:
    """Relative links name files of the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
