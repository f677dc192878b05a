"""The smallest backend: NumPy. backends/README.md walks through it."""

from tests.backends.toy.emit import emit_source, notes, refusals
from tests.backends.toy.load import here, load_scans, unavailable
from tests.backends.toy.tune import choices, identity, preferred_chunk, toolchain

__all__ = ["choices", "emit_source", "here", "identity", "load_scans", "notes", "preferred_chunk", "refusals"]
__all__ += ["toolchain", "unavailable"]
