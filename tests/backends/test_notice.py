"""A first call that compiles says so, to who waits at a terminal."""

from __future__ import annotations

import importlib
import io
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import tttc
from tttc.backends.notice import compiling, covered
from tttc.library import LinearAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINE, ERASED = "tttc: compiling LinearAttention for this CPU, once ...", "\r\033[K"
needs_tvm = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("TTTC_QUIET", raising=False)
    found = Terminal()
    monkeypatch.setattr("tttc.backends.notice.sys", SimpleNamespace(stderr=found))  # pytest changes its own
    return found


def first_call():
    """Of a layer that no other has compiled, as its cache is empty."""
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="tvm")
    q, k, v = torch.randn(3, 1, 4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        layer(q, k, v)


@needs_tvm
def test_a_call_that_compiles_says_so_and_one_that_finds_its_kernels_does_not(terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    first_call()
    assert terminal.getvalue().startswith(LINE)
    assert terminal.getvalue().replace(LINE + ERASED, "") == ""
    said = terminal.getvalue()
    first_call()
    assert terminal.getvalue() == said


def test_what_is_compiled_at_once_is_one_line(terminal):
    with compiling("LinearAttention", "this CPU"):
        assert terminal.getvalue() == LINE
        with compiling("LinearAttention", "this CPU"):
            pass
        assert terminal.getvalue() == LINE
    assert terminal.getvalue() == LINE + ERASED


def test_it_is_erased_where_compiling_fails(terminal):
    with pytest.raises(ZeroDivisionError), compiling("LinearAttention", "this CPU"):
        raise ZeroDivisionError
    assert terminal.getvalue() == LINE + ERASED


@pytest.mark.parametrize("why", ["no terminal", "TTTC_QUIET=1", "under a bar"])
def test_it_is_silent_otherwise(terminal, monkeypatch, why):
    if why == "no terminal":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    if why == "TTTC_QUIET=1":
        monkeypatch.setenv("TTTC_QUIET", "1")
    with covered() if why == "under a bar" else nullcontext(), compiling("LinearAttention", "this CPU"):
        pass
    assert terminal.getvalue() == ""


class Launched:
    """A function of Triton's, which compiles what it was not launched with before."""

    def _do_compile(self, source: object) -> object:
        return self.compile(source, target=SimpleNamespace(backend="hip", arch="gfx942"), options={})


@pytest.mark.parametrize("kept", [False, True], ids=["new", "in Triton's cache"])
def test_a_launch_that_compiles_says_so_and_one_that_finds_its_kernel_does_not(terminal, monkeypatch, kept):
    triton, flags = pytest.importorskip("triton"), importlib.import_module("tttc.backends.triton.llvm_flags")
    seen = []
    monkeypatch.setattr(flags, "_kept", lambda *asked: kept)
    monkeypatch.setattr(triton, "compile", lambda *asked, **how: seen.append(terminal.getvalue()))
    kernel = Launched()
    flags.install_compile_hook(kernel, "LinearAttention", {})
    kernel._do_compile(SimpleNamespace(signature={}, constants={}, attrs={}))
    said = LINE.replace("CPU", "GPU")
    assert seen == ["" if kept else said]
    assert terminal.getvalue() == ("" if kept else said + ERASED)


def test_the_kernels_of_a_layer_are_told_by_the_name_of_its_declaration(monkeypatch):
    pytest.importorskip("triton")
    told = []
    flags = importlib.import_module("tttc.backends.triton.llvm_flags")
    monkeypatch.setattr(flags, "install_compile_hook", lambda function, title, about: told.append(title))
    layer = tttc.compile(LinearAttention, {"D": 16}, device=DEVICE, backend="triton")
    with torch.no_grad():
        layer(*torch.randn(3, 1, 4, 2, 16, device=DEVICE))
    assert set(told) == {"LinearAttention"}
