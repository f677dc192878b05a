"""The `torch` backend: scans as readable PyTorch, on anything that PyTorch runs on."""

from tttc.backends.torch.emit import emit, notes, refusals
from tttc.backends.torch.load import here, load, unavailable
from tttc.backends.torch.tune import choices, chunk, identity, toolchain

__all__ = ["choices", "chunk", "emit", "here", "identity", "load", "notes", "refusals", "toolchain", "unavailable"]
