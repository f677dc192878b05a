"""`tttc.nn`: declarations as sequence-modelling layers of PyTorch."""

from tttc.nn.layer import TTT
from tttc.runtime.state import Cache

__all__ = ["TTT", "Cache"]
