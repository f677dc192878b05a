"""A compiled layer at work on tensors: arguments, state, packing, autograd, operators of PyTorch."""
