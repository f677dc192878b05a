"""What all that leaves as ONNX has in common: the packages, a session of the runtime, and how exact it has to be."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from tttc.errors import BackendRefusal, TTTCError

RUNTIME = "1.32"  # of ONNX Runtime: before, a call of no tokens may return memory that was never written
TOLERANCE = 1e-5  # relative, of float32
"""What a file may differ by from the layer that it was made of, before it is written."""
SEVERAL = 5.0  # times what float32 does to the layer itself


class ExportMismatch(TTTCError):
    """An exported file that does not compute what its layer does; it was not written."""


def package(name: str) -> Any:
    """A package, imported now; raises `BackendRefusal` where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise BackendRefusal(f"{name} is not installed, which ONNX files need.\n  pip install 'tttc[onnx]'") from None


def runtime_session(source: str | bytes) -> Any:
    """A file, or its bytes, in ONNX Runtime, on as many threads as PyTorch has."""
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
