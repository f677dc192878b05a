"""The smallest backend: NumPy. backends/README.md walks through it."""

from tests.backends.toy.emit import emit, notes, refusals
from tests.backends.toy.load import here, load, unavailable
from tests.backends.toy.tune import choices, chunk, identity, toolchain

__all__ = ["choices", "chunk", "emit", "here", "identity", "load", "notes", "refusals", "toolchain", "unavailable"]
