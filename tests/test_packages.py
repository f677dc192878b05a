"""Packages for processes that have torch alone: what they compute is what the layer does, for any batch and length."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only
from typer.testing import CliRunner

import tttc
from tests.helpers import dims_of, inputs_for, run_alone
from tests.learners import LEARNERS, OneByOne, Renewed
from tttc.cli.main import app
from tttc.errors import BackendRefusal, ShapeError
from tttc.export import package, scan_operator
from tttc.library import GLA, TTTMLP, GatedDeltaNet, Moneta, TTTLinear

COUNTING = tttc.sgd(lr=0.1, momentum=0.5)  # the program then counts its tokens
LAYERS = {  # a kind of program each
    "a chunk is a mini-batch, with a memory that begins as the weights": (Moneta, {}),
    "a mini-batch is longer than a chunk": (TTTLinear.replace(mini_batch=6), {"chunk": 4}),
    "rows by substitution": (OneByOne.replace(update=COUNTING), {"chunk": 2}),
    "mini-batches of several chunks": (Renewed.replace(mini_batch=3), {}),
    "one mini-batch in tiles": (TTTMLP.replace(mini_batch="all"), {"chunk": 4}),
    "one mini-batch in one step": (TTTLinear.replace(mini_batch="all", read="end"), {}),
    "windows": (LEARNERS["CausalConvolution"], {}),
}


def layer_and_example(kind):
    variant, settings = LAYERS[kind]
    layer = tttc.compile(variant, dims_of(variant, 3, 5) | {"K": 3}, torch.float32, backend="torch", **settings)
    return layer, example(layer, 5)


def example(layer, tokens, batch=2, heads=2):
    inputs = inputs_for(layer, tokens, batch=batch, heads=heads, seed=tokens).map(torch.Tensor.float)
    given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.keywords()}
    return tree_map_only(torch.Tensor, torch.Tensor.detach, given)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_traced_layer_takes_any_batch_and_length(kind):
    layer, given = layer_and_example(kind)
    program, about = package.inlined_program(package.Example.of(layer, given))
    assert not [n for n in program.graph.nodes if "tttc" in str(n.target)]
    assert about[f"tttc.digest.{layer.signature.name}"]
    run = scan_operator.runnable(program)
    for tokens, batch, heads in ((1, 1, 1), (4, 2, 3), (13, 3, 1)):
        given = example(layer, tokens, batch, heads)
        wanted, _ = layer(**given)
        torch.testing.assert_close(run(**given), wanted, rtol=1e-6, atol=1e-6)


class Model(torch.nn.Module):
    """Two layers, one of them of an invented learner."""

    def __init__(self):
        super().__init__()
        self.first = tttc.nn.TTT(TTTLinear, 8, 2, backend="torch")
        self.second = tttc.nn.TTT(LEARNERS["LowRank"], 8, 2, dims={"R": 2}, rope=False, backend="torch")

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


@torch.no_grad()
def test_a_process_with_torch_alone_runs_a_package(tmp_path):
    torch.manual_seed(0)
    model = Model()
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    with torch._inductor.config.patch(quick):
        path = tttc.export.save(model, tmp_path / "model.pt2", (torch.randn(1, 4, 8),), inlined=True)
    given = [torch.randn(batch, tokens, 8) for batch, tokens in ((1, 1), (2, 15), (1, 16), (3, 17), (2, 70))]
    torch.save([(x, model(x)) for x in given], tmp_path / "calls")
    run_alone(
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import torch\n"
        f"model = torch._inductor.aoti_load_package({str(path)!r})\n"
        f"for x, wanted in torch.load({str(tmp_path / 'calls')!r}):\n"
        "    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)\n"
        "assert not [n for n in sys.modules if n.startswith('tttc')]\n"
    )


@pytest.fixture
def uncompiled(monkeypatch):
    """Packages are what torch.export saves: as the module was traced, not compiled."""
    monkeypatch.setattr(scan_operator, "packaged", lambda program, path, about: _saved(program, path))
    monkeypatch.setattr(scan_operator, "loaded", lambda path: scan_operator.runnable(torch.export.load(path)))


def _saved(program, path):
    torch.export.save(program, path)
    return path


def test_the_commands(tmp_path, uncompiled):
    for form in ("aoti", "pt2"):
        path = tmp_path / f"{form}.pt2"
        done = CliRunner().invoke(app, ["export", "gla", "--dim", "D=4", "--format", form, "-o", str(path)])
        assert done.exit_code == 0, done.output
    inputs = example(tttc.compile(GLA, {"D": 4}), 21, heads=4)
    torch.testing.assert_close(tttc.export.load(path)(**inputs), tttc.compile(GLA, {"D": 4})(**inputs)[0])


def test_a_wrong_package_is_not_written(tmp_path, uncompiled, monkeypatch):
    layer, given = layer_and_example("windows")
    monkeypatch.setattr(scan_operator, "loaded", lambda path: lambda **given: 1.001 * layer(**given)[0])
    with pytest.raises(package.ExportMismatch, match=r"differs by 1\.0e-03 in the package, more than 1e-05"):
        tttc.export.save(layer, tmp_path / "layer.pt2", given, inlined=True)
    assert not list(tmp_path.iterdir())


class Returning(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = tttc.nn.TTT(GatedDeltaNet, 8, 2, backend="torch")

    def forward(self, x):
        y, cache = self.layer(x, return_state=True)
        return y, cache.state


REFUSED = {
    "a state that leaves": (Returning(), "GatedDeltaNet.*its state leaves the module"),
    "no layer": (torch.nn.Linear(8, 8), "Linear calls no layer of tttc"),
    "what later tokens change": (
        tttc.nn.TTT(TTTLinear.replace(read="end"), 8, 2),
        'read="end".*Set mini_batch = "all"',
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_exact_is_refused(kind, tmp_path):
    module, said = REFUSED[kind]
    with pytest.raises(BackendRefusal, match=f"(?s){said}"):
        tttc.export.save(module, tmp_path / "model.pt2", (torch.randn(2, 5, 8),), inlined=True)
    assert not list(tmp_path.iterdir())


def test_a_call_that_is_none_is_refused(tmp_path, monkeypatch):
    module = tttc.nn.TTT(TTTLinear, 8, 2)
    with pytest.raises(ShapeError, match=r"model\.bin.*\n.*ends with \.pt2"):
        tttc.export.save(module, tmp_path / "model.bin", (torch.randn(2, 5, 8),), inlined=True)
    with pytest.raises(ShapeError, match="no call of TTT: missing a required argument: 'x'"):
        tttc.export.save(module, tmp_path / "model.pt2", (), inlined=True)
    with pytest.raises(ShapeError, match=r"no tensor \[batch, tokens"):
        tttc.export.save(module, tmp_path / "model.pt2", (torch.randn(8),), inlined=True)
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    with pytest.raises(BackendRefusal, match=r"operator of torch 2.13.*this is torch 2.14.1.\n  Install torch 2.13"):
        tttc.export.save(module, tmp_path / "model.pt2", (torch.randn(2, 5, 8),), inlined=True)
