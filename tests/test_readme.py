"""What a newcomer reads is true: the code of README and docs runs, their commands, names, links and numbers hold."""

from __future__ import annotations

import functools
import inspect
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import tttc
from tests.test_examples import run as run_example
from tttc import library
from tttc.cli.main import app
from tttc.export.package import Example, inlined_program

ROOT = Path(__file__).parent.parent
LONGEST = 200  # lines of the README
README, GUIDE, MEASURED, NETWORKS = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/guide.md", "docs/measured.md", "docs/networks.md")
)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ir/README.md", ROOT / "backends/README.md"]


def code_blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, in order."""
    found: list[str] = []
    opened: str | None = None
    for line in text.splitlines():
        if not line.startswith("```"):
            if opened == language:
                found[-1] += line + "\n"
        elif opened is not None:
            opened = None
        else:
            opened = line[3:]
            found += [""] if opened == language else []
    return found


def commands(text: str) -> list[str]:
    """The lines of the blocks without a language, without what they say of themselves."""
    lines = [line.split(" #")[0].strip() for block in code_blocks(text) for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|tttc|python) ", line)]


def in_a_file(text: str, folder: Path, name: str) -> dict:
    """Runs a block from a file, as a reader would: the compiler shows its lines."""
    file = folder / f"{name}.py"
    file.write_text(text)
    scope: dict = {"__name__": name}
    exec(compile(text, str(file), "exec"), scope)
    return scope


# -- code --------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST


def test_the_layer_goes_into_a_model_learns_samples_and_is_saved(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = in_a_file(code_blocks(README, "python")[0], tmp_path, "into_a_model")
    assert scope["loss"] < 0.5  # of 5.5 nats that an untrained model needs
    assert capsys.readouterr().out == "that learns while it reads, a memory tha"
    weights, cache = torch.load("model.pt")
    scope["model"].load_state_dict(weights)
    assert cache.position == 9 + 39


def test_the_declaration_is_short_and_runs(tmp_path, capsys) -> None:
    """A learner in twelve lines; it prints the program that is shown below it, and what `verify` says."""
    block, shown = code_blocks(README, "python")[1:3]
    declaration = block[block.index("class ") : block.index("layer =")].strip()
    assert len(declaration.splitlines()) == 12
    scope = in_a_file(block, tmp_path, "declaration")
    printed = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert [line for line in shown.splitlines() if line.strip() not in printed] == []
    assert "..." not in shown
    q, k, v = torch.randn(3, 2, 20, 4, 64)
    z, _ = scope["layer"](q, k, v, gates={"lr": torch.rand(2, 20, 4) / 64})
    assert z.shape == q.shape


def test_the_verification_is_that_of_the_declaration(tmp_path) -> None:
    """Its lines, but for the last digits and the backend."""
    said = next(block for block in code_blocks(README) if "equal to the oracle" in block)
    scope = in_a_file(code_blocks(README, "python")[1], tmp_path, "declaration")
    found = str(tttc.verify(scope["Memory"]))

    def told(text: str) -> list[str]:
        return [re.sub(r"\d\.\de-\d+|backend \w+", "", line) for line in text.splitlines() if "computed by" not in line]

    assert told(said) == told(found)


def test_the_rule_of_ones_own_runs(tmp_path, capsys) -> None:
    in_a_file(code_blocks(GUIDE, "python")[0], tmp_path, "rule")
    assert "equal to the oracle" in capsys.readouterr().out


def test_the_module_is_compiled_whole(monkeypatch) -> None:
    """Inductor, whose compiler takes its time, has a test of its own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    scope: dict = {"torch": torch, "tttc": tttc}
    exec(code_blocks(GUIDE, "python")[1], scope)
    assert scope["y"].shape == (2, 1, 64)
    assert scope["cache"].position == 33


def test_sequences_are_saved_and_served(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = in_a_file(next(x for x in code_blocks(GUIDE, "python") if "pool" in x), tmp_path, "serving")
    assert scope["z"].shape == (1, 12, 4, 64)
    assert (scope["pool"].available, scope["pool"].position(scope["two"])) == (7, 21 % 16)


def test_a_network_of_ones_own_learns_and_writes(tmp_path, capsys) -> None:
    scope = in_a_file(code_blocks(NETWORKS, "python")[0], tmp_path, "network")
    assert scope["out"].nll.shape == (4, 100)
    assert scope["out"].chunks.shape == (4, 7)
    assert scope["text"].shape == (4, 28)
    assert scope["model"].suffix.prime[0].weight.grad.abs().max() > 0
    assert "fast weights" in capsys.readouterr().out


def test_the_pipeline_is_the_one_that_runs() -> None:
    """The stages are listed in their order."""
    assert re.findall(r'Stage\("(\w+)"', code_blocks(GUIDE, "python")[2]) == [stage.name for stage in tttc.PIPELINE]


# -- tables ------------------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_ready_declaration_is_listed() -> None:
    named = re.findall(r"`(\w+)`", "\n".join(row[1] for row in rows(section("Ready declarations"))))
    assert sorted(named) == sorted(library.__all__)


def test_the_glossary_has_seven_words() -> None:
    assert len(rows(section("Seven words"))) == 7


class Wrapped(torch.nn.Module):
    """A layer as a module, which is what is exported."""

    def __init__(self, layer: tttc.Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x stands for q, k and v: [B, T, H, D]."""
        rates = torch.ones_like(x[..., 0]) / 64
        return self.layer(x, x, x, gates={"lr": rates, "tau": rates})[0]


def _layer() -> tuple[torch.nn.Module, torch.Tensor]:
    return Wrapped(tttc.compile(library.TTTLinear, {"D": 8})), torch.randn(2, 20, 2, 8, requires_grad=True)


def _module() -> tuple[torch.nn.Module, torch.Tensor]:
    return tttc.nn.TTT(library.TTTLinear, hidden_size=16, num_heads=2), torch.randn(2, 20, 16, requires_grad=True)


def _trains(module: torch.nn.Module, x: torch.Tensor) -> bool:
    module(x).square().sum().backward()
    return all(p.grad is not None and p.grad.isfinite().all() for p in [x, *module.parameters()])


@torch.no_grad()
def _decodes(module: torch.nn.Module, x: torch.Tensor) -> bool:
    outputs, state = [], None
    for t in range(x.shape[1]):
        now = x[:, t : t + 1]
        if isinstance(module, Wrapped):
            rates = torch.ones_like(now[..., 0]) / 64
            z, state = module.layer(now, now, now, gates={"lr": rates, "tau": rates}, state=state)
        else:
            z, state = module(now, state, return_state=True)
        outputs.append(z)
    return torch.allclose(torch.cat(outputs, 1), module(x), atol=1e-5)


@torch.no_grad()
def _compiles(module: torch.nn.Module, x: torch.Tensor) -> bool:
    return torch.allclose(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x), atol=1e-5)


@torch.no_grad()
def _exports(module: torch.nn.Module, x: torch.Tensor) -> bool:
    return torch.allclose(torch.export.export(module, (x,)).module()(x), module(x), atol=1e-5)


def _takes(*names: str) -> Callable[[torch.nn.Module, torch.Tensor], bool]:
    """Whether what is called has such a parameter."""

    def asked(module: torch.nn.Module, x: torch.Tensor) -> bool:
        called = module.layer.__call__ if isinstance(module, Wrapped) else module.forward
        return any(name in parameter for name in names for parameter in inspect.signature(called).parameters)

    return asked


@torch.no_grad()
def _in_files(module: torch.nn.Module, x: torch.Tensor) -> bool:
    if isinstance(module, Wrapped):
        rates = torch.ones_like(x[..., 0]) / 64
        of, (_, state) = module.layer, module.layer(x, x, x, gates={"lr": rates, "tau": rates})
    else:
        of, (_, state) = module, module(x, return_state=True)
    with tempfile.TemporaryDirectory() as folder:
        again = type(state).load(state.save(Path(folder) / "state", of), of)
    return all(torch.equal(a, b) for a, b in zip(*map(tree_leaves, (again, state)), strict=True) if torch.is_tensor(a))


def _to_onnx(module: torch.nn.Module, x: torch.Tensor) -> bool:
    if isinstance(module, Wrapped):
        return bool(tttc.export.onnx.model(module.layer).graph.node)
    with tempfile.TemporaryDirectory() as folder:
        return tttc.export.onnx.save_model(module, Path(folder) / "model.onnx", (x,)).exists()


@torch.no_grad()
def _packs(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """As operations of torch alone, which are compared with the module; tests/test_packages.py compiles them."""
    return bool(inlined_program(Example.of(module, x))[1])


@torch.no_grad()
def _saves(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """As a file, which here is read where the operators are known; tests/test_program_files.py reads it elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        again = tttc.export.load(tttc.export.save(module, Path(folder) / "model.pt2", (x,)))
    return torch.allclose(again(x), module(x), atol=1e-5)


PROBES: dict[str, Callable[[torch.nn.Module, torch.Tensor], bool]] = {
    "train": _trains,
    "decode": _decodes,
    "`torch.compile": _compiles,
    "`torch.export`": _exports,
    "a package": _packs,
    "a file": _saves,
    "packed": _takes("cu_seqlens"),
    "padded": _takes("mask", "lengths"),
    "states in files": _in_files,
    "slots": lambda module, x: hasattr(getattr(module, "layer", module), "pool"),
    "ONNX": _to_onnx,
}


@pytest.mark.parametrize("row", rows(section("What is supported")), ids=lambda row: row[0].split()[0].strip("`:,"))
def test_what_is_said_to_be_supported_is(row: list[str]) -> None:
    """A layer and a module on a CPU; no word about a GPU but that nothing ran there."""
    name, *said, gpu = row
    probe = next(probe for start, probe in PROBES.items() if name.startswith(start))
    assert said == ["yes" if probe(*made()) else "no" for made in (_layer, _module)]
    assert gpu in ("not run yet", "no")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_context_are_those_that_were_measured() -> None:
    report = json.loads((ROOT / "benchmarks/results/context_x86_64_1threads.json").read_text())
    medians = {row["T"]: {n: x["median"] for n, x in row["ms"].items()} for row in report["rows"]}
    times = {n: {t: m["SDPA"] / m[n] for t, m in medians.items()} for n in ("TTT-Linear", "TTT-MLP")}
    text = " ".join(section("Cost does not grow with context").split())
    assert f"and {times['TTT-Linear'][8192]:.1f} times faster at 8192" in text
    assert f"is {times['TTT-MLP'][8192]:.1f} times faster at 8192" in text
    assert min(times["TTT-Linear"].values()) > 1
    assert times["TTT-MLP"][1024] < 1 < times["TTT-MLP"][2048]
    table = rows(MEASURED.split("## Milliseconds against context")[1].split("\n## ")[0])
    shown = {int(row[0].replace(",", "")): [float(x) for x in row[1:4]] for row in table}
    assert shown == {t: [float(f"{x:.3g}") for x in m.values()] for t, m in medians.items()}


def test_the_speedups_are_those_of_the_table() -> None:
    """The least and the largest of the columns of docs/measured.md."""
    table = rows(MEASURED.split("## Every ready variant on a CPU")[1].split("\n## ")[0])

    def column(at: int) -> list[float]:
        return [float(row[at]) for row in table if row[at] != "–"]

    forward, both, best = column(3), column(8), column(4) + column(9)
    text = " ".join(section("Cost does not grow with context").split())
    assert f"{min(forward)} to {max(forward)} times faster forward" in text
    assert f"{min(both)} to {max(both)} times with the backward, at least {min(best)} times" in text


# -- commands ----------------------------------------------------------------------------------------------------------

SHORTER = {"--budget 60s": "--budget 2s --dim D=8 --tokens 64 --heads 2 --backend torch"}
SLOW = ("tttc tune", "python -m benchmarks", "python -m tests.soak")
ELSEWHERE = {
    "python -m examples.end_to_end": "tests/test_end_to_end_example.py, which takes minutes",
    "python -m examples.train_bytes": "tests/test_train_bytes.py, which takes minutes",
    "python -m examples.tune_for_absent_gpu": "tests/test_examples.py, where there is a compiler for GPUs",
}


def marked(found: list[str]) -> list:
    """Each command once, those that take longer as slow tests."""
    return [pytest.param(c, marks=pytest.mark.slow if c.startswith(SLOW) else ()) for c in dict.fromkeys(found)]


def spelled_commands() -> list[str]:
    """The commands of the README: those of its blocks, and those that a number names."""
    return commands(README) + re.findall(r"`((?:python -m|make) [^`]+)`", README)


@pytest.mark.parametrize("command", marked([c for c in spelled_commands() if c not in ELSEWHERE]))
def test_every_command_of_the_readme_runs(command: str, tmp_path, monkeypatch, capsys) -> None:
    """`make` says what it would run: a demo and a test suite inside a test would take their time."""
    if command.startswith("make "):
        done = subprocess.run(
            ["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert re.search(r"tttc demo|pytest|tests\.soak", done.stdout)
    elif command.startswith("python -m examples."):
        monkeypatch.chdir(tmp_path)
        assert run_example(monkeypatch, capsys, command.split(".")[-1])
    elif command.startswith("python -m "):
        module = command.split()[2]
        done = subprocess.run([sys.executable, "-m", module, "--quick"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
        declared = code_blocks(README, "python")[1].split("layer =")[0]
        (tmp_path / "my_file.py").write_text(declared.replace("class Memory", "class MyVariant"))
        short = functools.reduce(lambda text, pair: text.replace(*pair), SHORTER.items(), command)
        result = CliRunner().invoke(app, shlex.split(short)[1:])
        assert result.exit_code == 0 or command == "tttc doctor", result.output
        assert result.output


def test_every_command_named_anywhere_exists() -> None:
    """`make x`, `tttc x` and `python -m x` of every page."""
    from typer.main import get_command

    known = get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for command in commands(page.read_text(encoding="utf-8")):
            program, *words = shlex.split(command)
            if program == "make":
                assert {w for w in words if "=" not in w} <= targets, (page, command)
            elif program == "tttc":
                options = {o for p in known[words[0]].params for o in p.opts}
                assert {w for w in words if w.startswith("-")} <= options, (page, command)
            elif words[1].split(".")[0] in ("examples", "benchmarks", "tests"):
                assert (ROOT / f"{words[1].replace('.', '/')}.py").exists(), (page, command)


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Relative links name files of the repository, and headings that are there."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose):
        target, _, heading = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_called_by_its_path_is_there(page: Path) -> None:
    folders = "tttc|ir|backends|benchmarks|examples|tests|docs"
    paths = re.findall(rf"\b(?:{folders})/[\w/.]*\.(?:py|json|md|txt)\b", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_no_text_refers_to_what_is_not_here() -> None:
    """Every file that a text calls by name ending in .md, where it means one of the project, exists."""
    known = {page.name for page in PAGES} | {"CHANGELOG.md", "*.md"}
    for folder in ("", "docs", "ir", "backends", "tttc", "examples", "benchmarks", "tests"):
        pattern = "*.md" if not folder else "**/*"
        for file in (ROOT / folder).glob(pattern):
            if file.suffix not in (".md", ".py", ".txt", ".j2") or file.name == Path(__file__).name:
                continue
            text = file.read_text(encoding="utf-8")
            assert set(re.findall(r"[A-Za-z*]+\.md\b", text)) <= known, file
            assert not re.search(r"\b(DESIGN|MATH|HOUSE|STYLE|PEERS) \d|§", text), file
