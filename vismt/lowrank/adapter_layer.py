"""What every stand-in of a stock module can do: say its update as data, give the module back, with the update or without."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from vismt.lowrank.factors import LowRank

HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name]


class Host(nn.Module, ABC):
    """Stands where a stock linear or convolution stood. weight and bias are its own Parameter objects, under their names.

    A host whose update lies in the weight itself takes it out with `lift` and puts it back with `settle`; one whose
    tensors lie in an order of their own goes to the stock order and back with `reorder`, between those two.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        # The stock module without its tensors: not a submodule, so it adds no keys and follows no conversion.
        shell = copy.copy(base)
        shell._parameters = {name: None for name in base._parameters}
        self.__dict__["shell"] = shell
        for name in HOOKS:  # one table for both, so that hooks fire while adapted and stay when it is undone
            self.__dict__[name] = base.__dict__[name]

    def matrix(self, weight: Tensor) -> Tensor:
        """The stock weight as a matrix (o, i); a view where its layout allows."""
        return weight.t() if type(self.shell).__name__ == "Conv1D" else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: (o, i) -> the stock weight's shape."""
        return matrix.t() if type(self.shell).__name__ == "Conv1D" else matrix

    @property
    def in_features(self) -> int:
        return self.matrix(self.weight).shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix(self.weight).shape[0]

    @abstractmethod
    def factors(self) -> dict[str, Tensor]:
        """The tensors that an adapter file holds for this host, by name."""

    @abstractmethod
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `factors` gave."""

    @abstractmethod
    def low_rank(self) -> LowRank:
        """The whole update against the stock weight."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """The stock module with the update in."""

    def need_idle(self, what: str, path: str) -> None:
        """UserError for `what` (merge, export) while the update is not one weight's."""

    def restored(self) -> nn.Module:
        """The stock module with its own weight, untouched bit for bit."""
        return self._stock(self.weight)

    def lift(self) -> None:
        """Take the update out of the weight."""

    def reorder(self, stock: bool) -> None:
        """Put what lies in an order of its own into the stock order, or back."""

    def settle(self) -> None:
        """The inverse of `lift`."""

    def _stock(self, weight: nn.Parameter) -> nn.Module:
        module = self.shell
        module.weight, module.bias = weight, self.bias
        module.training = self.training
        return module
