"""Modules and tensors of a network by their names, as `nn.Module` names them.

`nn.Module.named_modules` passes every name up through as many generators as the module lies deep;
walking a network of a few hundred modules took as long as recording a tenth of its pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def named_modules(net: nn.Module, *, repeated: bool = False) -> dict[str, nn.Module]:
    """The network itself ('') and every module in it, in the order of `nn.Module.named_modules`.

    A module that is in several places has its first name only, unless `repeated`.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", net)]
    while stack:
        name, module = stack.pop()
        if not repeated:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found[name] = module
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((prefix + key, child))
    return found


def named_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters, then buffers, of modules; a tensor in several places has its first name only."""
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for name, module in modules.items():
            for key, tensor in getattr(module, kind).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{name}.{key}" if name else key] = tensor
    return found
