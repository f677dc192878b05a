"""`tttc.nn`: declarations as sequence-modelling layers of PyTorch."""

from tttc.networks.decoding import NetworkState
from tttc.networks.end_to_end import EndToEnd
from tttc.nn.layer import TTT
from tttc.nn.learner import Learner
from tttc.runtime.state import Cache

__all__ = ["TTT", "Cache", "EndToEnd", "Learner", "NetworkState"]
