"""The smallest backend: NumPy. backends/README.md walks through it."""

from tests.backends.toy.emit import emit_source, refusals
from tests.backends.toy.load import here, load_scans, unavailable
from tests.backends.toy.ops import ROWS
from tests.backends.toy.tune import toolchain
from tttc.backends.untuned import choices, identity, notes, preferred_chunk

__all__ = ["ROWS", "choices", "emit_source", "here", "identity", "load_scans", "notes", "preferred_chunk"]
__all__ += ["refusals", "toolchain", "unavailable"]
