"""Layers as single files: read, run and differentiated where there is no tttc."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tttc
from tests.helpers import LIBRARY, dims_of
from tests.learners import CausalConvolution, LowRank
from tttc.backends import generated
from tttc.backends.triton import kernel_spec
from tttc.cli.main import app
from tttc.errors import BackendRefusal
from tttc.export import hub
from tttc.export import python as export
from tttc.export.onnx import ExportMismatch
from tttc.export.python import file

ROOT = Path(__file__).resolve().parents[1]
SHORT = 8  # a long mini-batch in the tests, so that several fit into few tokens


class State(tttc.Variant):
    """Names that something else in a file is called, \\ and \"\"\", and an `init` of one's own."""

    mini_batch = 4
    forward = tttc.state("count", "count", init=0.5)
    _W = tttc.state("count")
    scale = tttc.state()
    train = tttc.param("count", init=lambda shape, generator: torch.ones(shape))
    q, k, v = tttc.token("count"), tttc.token("count"), tttc.token("count")
    position = tttc.gate("state")

    def learner(self, x):
        return self.scale * x + (x * self.train) @ self.forward + self._W

    def loss(self, k, v):
        return self.position * tttc.sum(tttc.huber(self.learner(k) - v, 1.0))

    update = tttc.sgd(lr=tttc.gate("forward"), momentum=tttc.gate("z"), nesterov=True, clip=2.0)


class Steps(tttc.Variant):
    """Steps on mini-batches that are a single token: none is ever open."""

    mini_batch, steps, read = 1, 2, "end"
    W = tttc.state("D", "D")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


ALONE = (CausalConvolution, LowRank, State, Steps)
FRESH = """
import contextlib, io, runpy, sys
sys.modules["tttc"] = None  # to import it is an error
for path in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        right = runpy.run_path(path)["self_test"]()
    if not right:
        sys.exit(f"{path}:\\n{said.getvalue()}")
"""


def layers():
    for variant in (*LIBRARY.values(), *ALONE):
        layer = tttc.compile(_short(variant), dims_of(variant, 3, 5), backend="torch", decode="sums")
        yield variant.__name__, layer


def _short(variant):
    long = isinstance(variant.mini_batch, int) and variant.mini_batch > SHORT
    return variant.replace(mini_batch=SHORT) if long else variant


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of all layers."""
    path = tmp_path_factory.mktemp("layers")
    for name, layer in layers():
        (path / f"{name}.py").write_text(export.text(layer), encoding="utf-8")
    return path


def test_every_file_is_its_definition_where_there_is_no_tttc(folder):
    """In one call, in several, by operators: outputs, weights and every gradient, against torch.autograd in float64."""
    settings = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-I", "-c", FRESH, *sorted(map(str, folder.glob("*.py")))]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux alone")


@needs_triton
@pytest.mark.parametrize("name", ["TTTLinear", "LowRank"])
def test_kernels_are_the_definition_in_float32(folder, name, capsys):
    """In Triton's interpreter, where there is no GPU."""
    made = _made(folder, name)
    assert made.self_test()
    assert "by kernels, in float32" in capsys.readouterr().out
    assert made.WHOLE.kernels is not made.PART.kernels


@needs_triton
def test_kernels_of_groups_of_chunks_and_of_strips(monkeypatch):
    """Every other carry is kept, and the last chunk is not whole; the parts that strips make are added up."""
    monkeypatch.setattr(kernel_spec, "LARGEST_STATE", 32 * 16)
    layer = tttc.compile(LIBRARY["GatedDeltaNet"], {"D": 32}, backend="torch", chunk=8)
    made = generated.module(export.text(layer), "layer", "<layer>")
    assert made.WHOLE_KERNELS.strips == 2
    layer = made.GatedDeltaNet(num_heads=1, every=2).double()
    tokens = [torch.randn(1, 21, 1, 32, dtype=torch.float64) / 8 for _ in "qkv"]
    tokens += [torch.rand(1, 21, 1, dtype=torch.float64) for _ in range(2)]
    arguments = [x.requires_grad_() for x in tokens], ["z", "W", *"qkvab", "dW"], []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert made.compare(layer, made.definition, *arguments, device, torch.float32)
    monkeypatch.setattr(made, "placed", lambda tensors, of="": [])
    with pytest.raises((TypeError, ValueError)):  # what was compared are the kernels
        made.compare(layer, made.definition, *arguments, device, torch.float32)


@needs_triton
def test_what_kernels_do_not_do_pytorch_does(folder, monkeypatch):
    """Second derivatives, float64, other chunks, and all of it where there is no Triton."""
    made = _made(folder, "TTTLinear")
    x, found = torch.randn(1, SHORT, 1, 3, dtype=torch.float64), []
    layer = made.TTTLinear(num_heads=1)
    torch.nn.init.eye_(layer.W1[0])
    for dtype in (torch.float32, torch.float64):
        k, rate = x.to(dtype, copy=True).requires_grad_(), torch.full((1, SHORT, 1), 0.1, dtype=dtype)
        (first,) = torch.autograd.grad(layer.to(dtype)(k, k, k, rate, rate)[0].sum(), k, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), k)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=1e-4)
    assert made.WHOLE_KERNELS.take([x.float()], SHORT)
    assert not made.WHOLE_KERNELS.take([x.float()], SHORT + 1)
    assert not made.WHOLE_KERNELS.take([x], SHORT)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert _made(folder, "TTTLinear").WHOLE.kernels is None


def _made(folder, name):
    """A file as a module."""
    return generated.module((folder / f"{name}.py").read_text(encoding="utf-8"), "layer", f"<{name}>")


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is of the extra dev")
def test_the_files_are_laid_out_as_ruff_lays_them_out(folder):
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--config", str(ROOT / "pyproject.toml"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_equal_layers_are_equal_files(folder):
    layer = tttc.compile(_short(LIBRARY["Titans"]), dims_of(LIBRARY["Titans"], 3, 5), torch.float64, chunk=SHORT)
    assert export.text(layer) == (folder / "Titans.py").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch itself looks at it
def test_the_module_is_compiled_whole(folder):
    """Its loops are operators of the graph; the state goes on from call to call."""
    made = generated.module((folder / "GatedDeltaNet.py").read_text(encoding="utf-8"), "layer", "<layer>")
    layer = made.GatedDeltaNet(num_heads=2)
    whole = torch.compile(layer, fullgraph=True, backend="eager")
    k, rate = torch.randn(1, 9, 2, 3, requires_grad=True), torch.rand(1, 9, 2)
    pulled = []
    for call in (layer, whole):
        z, state = call(k[:, :5], k[:, :5], k[:, :5], rate[:, :5], rate[:, :5])
        y, _ = call(k[:, 5:], k[:, 5:], k[:, 5:], rate[:, 5:], rate[:, 5:], state=state)
        pulled.append(torch.autograd.grad(torch.cat([z, y], 1).square().sum(), k)[0])
    torch.testing.assert_close(*pulled)


def test_autocast_changes_no_number(folder):
    """Nor does the dtype of q, but for the rounding of z."""
    made = generated.module((folder / "LaCT.py").read_text(encoding="utf-8"), "layer", "<layer>")
    layer, x, rate = made.LaCT(num_heads=2), torch.randn(1, SHORT + 2, 2, 3), torch.rand(1, SHORT + 2, 2)
    given = x, x, x, rate, rate, rate, rate
    z, state = layer(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, after = layer(*given)
    assert torch.equal(z, again)
    assert torch.equal(state.W0, after.W0)
    half, after = layer(x.bfloat16(), x, x, rate, rate, rate, rate)
    assert (half.dtype, after.W0.dtype) == (torch.bfloat16, torch.float32)


def test_a_second_derivative_knows_what_the_first_was_made_of(folder):
    made = generated.module((folder / "TTTLinear.py").read_text(encoding="utf-8"), "layer", "<layer>")
    layer = made.TTTLinear(num_heads=1, every=2).double()
    x = torch.randn(1, 2 * SHORT + 1, 1, 3, dtype=torch.float64, requires_grad=True)
    rate = torch.full(x.shape[:3], 0.1, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda k: layer(x, k, x, rate, rate)[0], x, fast_mode=True)


def test_a_file_that_is_wrong_is_seen(folder, tmp_path, monkeypatch, capsys):
    text = (folder / "TTTLinear.py").read_text(encoding="utf-8")
    for right, wrong in (("dv = -", "dv = "), ("b1_start = b1\n", "b1_start = 0.9 * b1\n")):
        assert right in text
        assert not generated.module(text.replace(right, wrong), "layer", "<layer>").self_test()
    monkeypatch.setattr(file, "text", lambda layer: text.replace("z = q + n", "z = q - n"))
    layer = tttc.compile(_short(LIBRARY["TTTLinear"]), {"D": 3})
    with pytest.raises(ExportMismatch, match=r"z differs by .* in the file, more than 1e-09"):
        export.save(layer, tmp_path / "layer.py")
    assert not (tmp_path / "layer.py").exists()


def test_what_has_no_file_is_said():
    layer = tttc.compile(LIBRARY["Titans"].replace(anchor="token", mini_batch=4), dims_of(LIBRARY["Titans"], 3, 5))
    with pytest.raises(BackendRefusal, match=r'come token by token, which no file does yet.\n  Set anchor = "mini'):
        export.text(layer)


def test_the_command(tmp_path):
    path = tmp_path / "gla.py"
    done = CliRunner().invoke(app, ["export", "gla", "--format", "python", "--dim", "D=4", "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert "import tttc" not in path.read_text(encoding="utf-8")


def test_a_folder_of_the_hub_is_imported_as_kernels_does(tmp_path, capsys, monkeypatch):
    """By a name that the metadata says, as a package that imports nothing but itself and torch."""
    hub.save(tttc.compile(LIBRARY["GatedDeltaNet"], {"D": 3}), tmp_path)
    assert sorted(p.name for p in (tmp_path / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("W_t = decay_t * W_(t-1) - lr_t * g_t") == 1
    folder = tmp_path / "build" / "torch-cpu"
    about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert {**about, "id": ""} == {
        "name": "gated-delta-net",
        "id": "",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    monkeypatch.setitem(sys.modules, "triton", None)  # which it needs not
    spec = importlib.util.spec_from_file_location(about["id"], folder / "__init__.py")
    kernel = sys.modules[about["id"]] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    assert kernel.self_test()
    assert kernel.__all__ == ["State", "GatedDeltaNet", "self_test"]


@pytest.mark.parametrize(
    ("variant", "name"),
    [("TTTMLP", "tttmlp"), ("ViTTT", "vi-ttt"), ("Été_2", "ete-2"), ("Ж", "layer"), ("_7", "layer-7")],
)
def test_a_kernel_has_a_name_that_the_hub_takes(variant, name):
    assert hub.kernel_name(variant) == name


def test_the_command_writes_a_folder(tmp_path):
    done = CliRunner().invoke(app, ["export", "gla", "--format", "hub", "--dim", "D=4", "-o", str(tmp_path / "gla")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "gla" / "build" / "torch-cuda" / "gla.py").exists()
