"""Compiled layers for programs that have no tttc.

tttc.export.onnx.save(layer, "layer.onnx")      # a graph for ONNX Runtime, from call to call
"""

from tttc.export import onnx

__all__ = ["onnx"]
