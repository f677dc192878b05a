"""The `torch` backend: scans as readable PyTorch, on anything that PyTorch runs on."""

from tttc.backends.torch.emit import emit, refusals
from tttc.backends.torch.load import load

__all__ = ["emit", "load", "refusals"]
