"""The network in meta tensors of other sizes, in place: its code runs, nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bevel.graph.attributes import resize, set_integer
from bevel.graph.copying import meta
from bevel.graph.holding import Held
from bevel.graph.prediction import Prediction
from bevel.graph.propagate import Propagation
from bevel.graph.record import ExampleInputs, map_inputs


class Stage:
    """A network that can be dressed in meta tensors of other sizes, and undressed again.

    Nothing is computed on meta tensors. Whatever a forward leaves on its modules meanwhile, such
    as a cache, is taken back, and so is the evaluation mode that it is in while it is dressed.
    """

    def __init__(self, net: nn.Module, example_inputs: ExampleInputs, state: Propagation) -> None:
        self.net = net
        self.inputs = map_inputs(
            example_inputs, lambda x: x.to("meta") if isinstance(x, Tensor) else x
        )
        self.names = {id(tensor): name for name, tensor in reversed(state.parameters.items())}
        self.modules = state.modules
        self.module_names = {id(module): name for name, module in self.modules.items()}
        first = next(net.parameters(), None)
        self._held = Held(net)
        self.device = torch.device("cpu") if first is None else first.device

    @contextmanager
    def dressed(self, prediction: Prediction) -> Iterator[nn.Module]:
        """The network with the predicted shapes and attributes, inside this context."""
        with self._held.held():
            if any(module.training for module in self.modules.values()):
                self.net.eval()
            self._dress(prediction)
            yield self.net

    def _dress(self, prediction: Prediction) -> None:
        replaced: dict[int, Tensor] = {}
        for module in self.modules.values():
            kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in kinds:
                for leaf, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in replaced:
                        shape = prediction.parameter(self.names[id(tensor)], tensor.shape)
                        replaced[id(tensor)] = meta(tensor, shape)
                    tensors[leaf] = replaced[id(tensor)]
            if isinstance(module, nn.RNNBase):
                names = module._flat_weights_names
                module._flat_weights = [getattr(module, name) for name in names]
        for site in prediction.state.sizes:
            value = prediction.length(site.extents)
            set_integer(self.modules[site.module], site.attribute, value)
        for module in self.modules.values():
            resize(module)
