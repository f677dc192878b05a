"""What every test runs under: one thread per worker, deterministic examples, poisoned memory, golden texts."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.interpreter import quicken

GOLDEN = Path(__file__).parent / "golden"

# The same examples in every run; `--hypothesis-profile=explore` draws new ones.
_common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("repeatable", derandomize=True, database=None, max_examples=25, **_common)
settings.register_profile("explore", derandomize=False, max_examples=500, **_common)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden instead of comparing with it")


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores, so each has one thread; native kernels, seconds to compile, are asked for by name.
    Without a GPU those of Triton run in its interpreter, which has to be said before Triton is imported.
    """
    gc.disable()  # until all is imported
    os.environ["TTTC_BACKEND"] = "torch"
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # what the processor says of its vectors is true
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: no search for garbage looks through these million objects again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tuned on this machine is none of the tests' business."""
    monkeypatch.setenv("TTTC_TUNING", "0")


@pytest.fixture(scope="session")
def folder_of_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True)
def kernels_of_this_run(monkeypatch: pytest.MonkeyPatch, folder_of_run: Path) -> None:
    """A native kernel is compiled once in a run, by whichever worker needs it first, and none is of an earlier run."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(folder_of_run / "kernels"))


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch, folder_of_run: Path) -> None:
    """Native kernels as they are written, without what LLVM makes of them, which is two thirds of the time that they
    take: for tests of what is written.
    """
    machine = import_module("tttc.backends.tvm_cpu.machine").Machine
    monkeypatch.setattr(machine, "target", lambda self, best=machine.target: best(self) | {"opt-level": 0})
    monkeypatch.setenv("TTTC_CACHE_DIR", str(folder_of_run / "plain"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    from tests.helpers import poisoned  # it imports Triton, which looks once whether it is to interpret

    with poisoned():
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    if find_spec("triton") is not None and "TRITON_INTERPRET" in os.environ:
        quicken()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/<name>.txt, or write it there with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = _anywhere(text, request.path).rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing; write it with --update-golden"
        assert text == path.read_text(), f"the wording differs from {path}; --update-golden accepts the new one"

    return compare


def _anywhere(text: str, file: Path) -> str:
    """Without the folders of this checkout, and without line numbers, which move at every edit."""
    for folder in (str(file.parent), os.path.relpath(file.parent), str(GOLDEN.parents[1])):
        text = text.replace(f"{folder}{os.sep}", "")
    return re.sub(r"\b(\w+\.py):\d+", r"\1:<line>", text)
