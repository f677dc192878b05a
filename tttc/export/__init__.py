"""Compiled layers for programs that have no tttc, or not the declarations.

tttc.export.onnx.save(layer, "layer.onnx")                     # a graph for ONNX Runtime, from call to call
tttc.export.save(model, "model.pt2", (x,))                     # for processes with tttc, without the declarations
tttc.export.save(model, "model.pt2", (x,), inlined=True)       # a package of AOTInductor, for torch alone
tttc.export.python.save(layer, "layer.py")                     # a file that anyone can read, and run with PyTorch alone
tttc.export.hub.save(layer, "layer")                           # the same as a folder that Hugging Face's kernels loads
"""

from tttc.export import hub, onnx, python
from tttc.export.package import load, save

__all__ = ["hub", "load", "onnx", "python", "save"]
