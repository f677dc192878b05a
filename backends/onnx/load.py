"""ONNX text as scans: a session of ONNX Runtime for each, made when it is first called."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch

from tttc.backends import torch as torch_backend
from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.onnx.emit import SCAN
from tttc.backends.scan import CompiledScan, NotBuilt, Tensors
from tttc.ir.program import AdjointProgram, Scan


def unavailable(device: torch.device) -> list[str]:
    """It is a runtime for this CPU."""
    return [] if device.type == "cpu" else [f"ONNX Runtime runs on this CPU here, not on {device}"]


def here() -> str:
    """What it does on this machine."""
    return f"ONNX Runtime {version('onnxruntime')}, forward in float32"


def load_scans(
    source: Source, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST
) -> dict[str, OnnxScan]:
    """The models of the text, by the names of their scans."""
    _, *texts = ("\n" + source.text).split(f"\n{SCAN}")
    models = {text.partition(":")[0]: text.partition("\n")[2] for text in texts}
    return {scan.name: OnnxScan(scan, program, models[scan.name]) for scan in program.scans}


class OnnxScan(CompiledScan):
    """One scan, forward alone."""

    def __init__(self, scan: Scan, program: AdjointProgram, text: str) -> None:
        super().__init__(scan, program)
        self.text = text

    @property
    def made_of(self) -> tuple[Hashable, ...]:
        return ("onnx",)

    @property
    def differentiable(self) -> CompiledScan:
        """The same scan in operations of PyTorch, for derivatives forward."""
        return torch_backend.load_scans(torch_backend.emit_source(self.program), self.program)[self.scan.name]

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        """Refused: a runtime for inference has none."""
        why = "ONNX Runtime runs forward alone; train the layer with backend='auto'"
        raise NotBuilt(f"{self.scan.name}_adjoint", NotImplementedError(why))

    @cached_property
    def session(self) -> Any:
        """Raises `NotBuilt` where the text is no model that the runtime takes."""
        try:
            return session(self.text)
        except Exception as error:  # of the parser, the checker or the runtime
            raise NotBuilt(self.scan.name, error) from error

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        if not self.scan.results:
            return (), []
        leading = inputs[0].shape[:2]
        arrays = [x.detach().flatten(0, 1).float().contiguous().numpy() for x in inputs]
        names = [i.name for i in self.session.get_inputs()]
        found = self.session.run(None, dict(zip(names, arrays, strict=True)))
        return tuple(torch.from_numpy(x).unflatten(0, leading) for x in found), []


def session(text: str) -> Any:
    """A model on as many threads as PyTorch has."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    model = onnx.parser.parse_model(text)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
