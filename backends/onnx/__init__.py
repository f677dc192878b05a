"""The `onnx` backend: scans as graphs of ONNX, run by ONNX Runtime on this CPU. Forward alone, in float32.

emit.py        a program as ONNX text: a model for each scan
loop.py        a scan as functions: a chunk, and the loop over chunks
composed.py    a scan that calls others: mini-batches of several chunks, gradients that come token by token
recurrence.py  a scan as one node, where its rule is a linear recurrence
form.py        what the form of a program is, in a line
lowering.py    expressions as nodes
nodes.py       the nodes of a graph, each once
ops.py         the table of operations
load.py        the text as sessions of ONNX Runtime
tune.py        what may be chosen: nothing
"""

from tttc.backends.onnx.emit import emit_source, notes, refusals
from tttc.backends.onnx.load import here, load_scans, unavailable
from tttc.backends.onnx.ops import ROWS
from tttc.backends.onnx.tune import toolchain
from tttc.backends.untuned import choices, identity, preferred_chunk

__all__ = ["ROWS", "choices", "emit_source", "here", "identity", "load_scans", "notes", "preferred_chunk"]
__all__ += ["refusals", "toolchain", "unavailable"]
