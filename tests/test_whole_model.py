"""A language model as one ONNX file: what it says in ONNX Runtime is what it says in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tttc.errors import ShapeError
from tttc.export.whole import FlatModel, save_model
from tttc.library import GatedDeltaNet, Titans, TTTLinear
from tttc.nn import TTT
from tttc.runtime.tensor_file import parsed

onnx = pytest.importorskip("onnx", reason="onnx is an extra: pip install 'tttc[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra: pip install 'tttc[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is an extra: pip install 'tttc[onnx]'")


class Block(nn.Module):
    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.second, self.mixer = nn.RMSNorm(width), nn.RMSNorm(width), mixer
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, cache: Any) -> Any:
        y, cache = self.mixer(self.first(x), cache, return_state=True)
        x = x + y
        return x + self.down(nn.functional.silu(self.up(self.second(x)))), cache


class Model(nn.Module):
    """A block whose mini-batches are open, and one that has none, with a convolution."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        mixers = [
            TTT(TTTLinear, width, 2, backend="torch"),
            TTT(GatedDeltaNet, width, 2, backend="torch", rope=False, conv_kernel=4, qk_norm=True),
        ]
        self.embedding, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.blocks = nn.ModuleList(Block(m, width) for m in mixers)

    def forward(self, ids: torch.Tensor, caches: Any = None) -> Any:
        x, after = self.embedding(ids), []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block(x, cache)
            after.append(cache)
        return self.head(x), after


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    torch.manual_seed(0)
    model = Model()
    ids = torch.randint(0, 256, (2, 21))
    with torch.no_grad():
        _, caches = model(ids[:, :0])
    return model, save_model(model, tmp_path_factory.mktemp("whole") / "model.onnx", (ids, caches))


def said_by_runtime(path: Path, prompt: list[int], count: int) -> list[int]:
    """Greedily, from what a sequence begins with: only the two files are read."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    begin = parsed(path.with_name(f"{path.name}.past.safetensors").read_bytes())
    past = {n: x.numpy() for n, x in begin.tensors().items()}
    past |= {n: np.array(x) for n, x in json.loads(begin.about["tttc.positions"]).items()}
    names = [x.name for x in session.get_outputs()]
    given, said = prompt, []
    for _ in range(count):
        found = dict(zip(names, session.run(None, {"ids": np.array([given]), **past}), strict=True))
        past = {n: found[f"present{n.removeprefix('past')}"] for n in past}
        given = [int(found["output"][0, -1].argmax())]
        said += given
    return said


@torch.no_grad()
def said_by_model(model: Model, prompt: list[int], count: int) -> list[int]:
    given, said, caches = prompt, [], None
    for _ in range(count):
        logits, caches = model(torch.tensor([given]), caches)
        given = [int(logits[0, -1].argmax())]
        said += given
    return said


def test_it_says_the_same(exported: tuple[Model, Path]) -> None:
    """200 tokens after a prompt that leaves a mini-batch open."""
    model, path = exported
    prompt = [1, 2, 3, 4, 5]
    assert said_by_runtime(path, prompt, 200) == said_by_model(model, prompt, 200)


def test_what_is_in_the_file(exported: tuple[Model, Path]) -> None:
    """A layer is one node, its caches are inputs and outputs by name, and beside its weights the file is small."""
    model, path = exported
    graph = onnx.load(str(path)).graph
    called = [n.op_type.rsplit("_", 1)[0] for n in graph.node if n.domain == "tttc"]
    assert sorted(called) == ["gated_delta_net", "ttt_linear"]
    inputs, outputs = [x.name for x in graph.input], [x.name for x in graph.output]
    assert {"past.0.state.W1", "past.0.state.start.W1", "past.0.state.position", "past.1.taps"} <= set(inputs)
    assert [n.replace("past", "present") for n in inputs[1:]] == outputs[1:]
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert path.stat().st_size - weights < 1_000_000


def test_two_exports_are_the_same_bytes(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, path = exported
    with torch.no_grad():
        _, caches = model(torch.zeros(2, 0, dtype=torch.int64))
    torch.manual_seed(0)
    again = save_model(model, tmp_path / "model.onnx", (torch.randint(0, 256, (2, 21)), caches))
    assert again.read_bytes() == path.read_bytes()


def test_a_model_that_keeps_its_caches() -> None:
    module = TTT(Titans, 16, 2, backend="torch")
    x = torch.randn(2, 5, 16)
    _, cache = module(x[:, :0], return_state=True)
    with pytest.raises(ShapeError, match="is given 1 caches and returns 0"):
        FlatModel(module, (x, cache))
