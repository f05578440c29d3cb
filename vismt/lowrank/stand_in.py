"""A module in the place of a stock linear or convolution, with the same weight and bias Parameters under their names."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name]


class StandIn(nn.Module):
    """Base class: a subclass adds its forward. The stock module is kept as `shell`, without its tensors."""

    shell: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.adopt(base)

    def adopt(self, base: nn.Module) -> None:
        """Take the tensors, hooks and mode of the stock module `base`."""
        self.weight, self.bias, self.training = base.weight, getattr(base, "bias", None), base.training
        # The stock module without its tensors: not a submodule, so it adds no keys and follows no conversion.
        self.__dict__["shell"] = copy.copy(base)
        self.empty_shell()
        for name in HOOKS:  # shared tables: hooks fire while the module is replaced and stay when it is back
            self.__dict__[name] = base.__dict__[name]

    def release(self) -> None:
        """Let go of what `adopt` took, which is in the stock module again; the order of the parameters stays."""
        self.__dict__["shell"] = None
        self._parameters.update(dict.fromkeys({"weight", "bias"} & self._parameters.keys()))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the stock weight as a matrix (o, i); a view where its layout allows."""
        return weight.t() if type(self.shell).__name__ == "Conv1D" else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (o, i) in the stock weight's shape: the inverse of `matrix`."""
        return matrix.t() if type(self.shell).__name__ == "Conv1D" else matrix

    def stock_weight(self) -> Tensor:
        """Return the stock weight as numbers; for a layer whose update is out of it."""
        return self.weight.detach()

    @property
    def in_features(self) -> int:
        return self.matrix(self.weight).shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix(self.weight).shape[0]

    def restored(self) -> nn.Module:
        """Return the stock module with its own weight, bit for bit."""
        return self._stock(self.weight)

    def empty_shell(self) -> None:
        """Drop the tensors of the stock module, which this layer has, or which a refused merge left there."""
        self.shell._parameters = dict.fromkeys(self.shell._parameters)

    def _stock(self, weight: nn.Parameter) -> nn.Module:
        module: Any = self.shell
        module.weight = weight
        if "bias" in module._parameters:  # an embedding has none
            module.bias = self.bias
        module.training = self.training
        return module
