"""A learner at weights that stay as kernels: `read`, and `pull`, its vector-Jacobian product, with a derivative too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import isqrt
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

from tttc.backends.scan import CompiledScan
from tttc.backends.torch.load import TorchScan
from tttc.compiler.driver import Settings, checked_request, made_of
from tttc.compiler.pipeline import History
from tttc.declare.frozen import frozen_signature
from tttc.declare.variant import Signature, Variant
from tttc.ir.names import as_declared
from tttc.ir.program import SEQUENCE, ScanKind
from tttc.runtime import autograd
from tttc.runtime.graphs import outside_graphs


@dataclass(frozen=True)
class FrozenLearner:
    """The learner of a declaration, differentiable in its weights and in x as often as one likes: by kernels twice, and
    then by operations of PyTorch; or by these alone.
    """

    declared: Signature
    stages: History
    read: CompiledScan
    backend: str
    why: str
    compute_dtype: torch.dtype
    plain: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]] | None
    """What makes z in operations that autograd differentiates, where no kernels are asked for."""

    def __call__(self, x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """z: [..., *dims of z] of x: [..., *dims of x], whose other axes are all tokens; weights: [*dims] each."""
        rank = len(self.declared.tokens["q"].dims)
        leading = x.shape[: x.dim() - rank]
        given = {**weights, self.read.scan.sequence[0].name: x.reshape(1, 1, -1, *x.shape[x.dim() - rank :])}
        inputs = [self._input(given, p.name, bool(p.at)) for p in self.read.scan.params]
        z = self._by_kernels(inputs) if self.plain is None else self.plain(inputs)[0]
        return z.reshape(*leading, *z.shape[3:])

    @outside_graphs('a graph does not hold the kernels of a learner: leave its backend at "auto".')
    def _by_kernels(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        tokens = inputs[-1].shape[2]
        if not tokens:  # of which kernels have at least one
            *weights, x = inputs
            return self._by_kernels([*weights, pad(x, (x.dim() - 3) * (0, 0) + (0, 1))])[:, :, :0]
        if not autograd.asked_for(inputs):
            return self.read.forward(inputs, None)[0][0]
        whole = self.read.scan.chunk is SEQUENCE
        every = 0 if whole else isqrt(self.read.groups(inputs, 1))  # of the sums that the backward of `pull` finds
        return autograd.run(self.read, 1, every, inputs)[0]

    def _input(self, given: Mapping[str, Any], name: str, along: bool) -> torch.Tensor:
        x = given[name] if along else given[as_declared(name)][None, None]
        return x.to(self.compute_dtype)


def compile_frozen(
    variant: type[Variant],
    dims: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> FrozenLearner:
    """The learner of a declaration, by the kernels of a backend; "auto" is plain operations of PyTorch, which were
    faster wherever both were measured: there is nothing to carry that a kernel could keep. Raises what `tttc.compile`
    does.
    """
    asked = "torch" if backend == "auto" else backend
    declared = frozen_signature(variant, dims)
    request = checked_request(declared, Settings(dims, dtype, device, asked))
    taken, stages, scans = made_of(replace(request, frozen=True))
    named = {s.kind: scans[s.name] for s in stages.program.scans}
    read = named[ScanKind.READ]
    read.pull = named[ScanKind.PULL]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    plain = None
    if backend == "auto" and isinstance(read, TorchScan):
        plain = read.at_once
        _make_known(read.module)
    return FrozenLearner(declared, stages, read, taken.unit.name, taken.why, compute, plain)


def _make_known(module: ModuleType) -> None:
    """Under a name of its own among the modules of Python, where `torch.compile` looks for that of each function."""
    module.__name__ = f"{module.__name__}_learner_{next(_numbers)}"
    sys.modules[module.__name__] = module


_numbers = count()
