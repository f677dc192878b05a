"""`tttc.nn`: declarations as sequence-modelling layers of PyTorch."""

from tttc.nn.layer import TTT, Cache

__all__ = ["TTT", "Cache"]
