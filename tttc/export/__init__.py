"""Compiled layers for programs that have no tttc.

tttc.export.onnx.save(layer, "layer.onnx")                     # a graph for ONNX Runtime, from call to call
tttc.export.save(model, "model.pt2", (x,), inlined=True)       # a package of AOTInductor, for torch alone
tttc.export.python.save(layer, "layer.py")                     # a file that anyone can read, and run with PyTorch alone
"""

from tttc.export import onnx, python
from tttc.export.package import save

__all__ = ["onnx", "python", "save"]
