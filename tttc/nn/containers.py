"""Modules and parameters by the names of a declaration, any of them: torch's own containers refuse those of methods."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView

from torch import nn

MARK = "'"  # behind a name that torch has for something else: no identifier holds it


class Parameters(nn.ParameterDict):
    """`nn.ParameterDict` for parameters that may be called `keys` or `half`."""

    def _key_to_attr(self, key: str) -> str:
        return key + MARK if hasattr(_NO_PARAMETERS, key) else key


class Modules(nn.ModuleDict):
    """`nn.ModuleDict` for modules that may be called `type` or `values`."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(_attribute(key), module)

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(_attribute(key))

    def __contains__(self, key: str) -> bool:
        return super().__contains__(_attribute(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> KeysView[str]:
        return self._named().keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return self._named().items()

    def _named(self) -> dict[str, nn.Module]:
        return {n.removesuffix(MARK): x for n, x in self._modules.items() if x is not None}


def _attribute(key: str) -> str:
    return key + MARK if hasattr(_NO_MODULES, key) else key


_NO_PARAMETERS, _NO_MODULES = nn.ParameterDict(), nn.ModuleDict()
