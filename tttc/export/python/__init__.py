"""A compiled layer as one Python file that anyone can read, and run with PyTorch alone.

layer = tttc.compile(tttc.library.TTTLinear, {"D": 64})
tttc.export.python.save(layer, "ttt_linear.py")

from ttt_linear import TTTLinear                # needs torch, not tttc
layer = TTTLinear(num_heads=12)
z, state = layer(q, k, v, lr, tau)
"""

from tttc.export.python.file import save, text

__all__ = ["save", "text"]
