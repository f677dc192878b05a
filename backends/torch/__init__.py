"""The `torch` backend: scans as readable PyTorch, on anything that PyTorch runs on."""

from tttc.backends.torch.emit import emit_source, refusals
from tttc.backends.torch.load import here, load_scans, unavailable
from tttc.backends.torch.ops import ROWS
from tttc.backends.torch.tune import toolchain
from tttc.backends.untuned import choices, identity, notes, preferred_chunk

__all__ = ["ROWS", "choices", "emit_source", "here", "identity", "load_scans", "notes", "preferred_chunk"]
__all__ += ["refusals", "toolchain", "unavailable"]
