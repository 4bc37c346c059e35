"""Layers that stay in float, whichever quantizer annotates the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer, SharedQuantizationSpec

ANNOTATION = "quantization_annotation"


def module_path(node: Node) -> str:
    """Name of the innermost module that the node comes from; "" for the network itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def stays_float(node: Node, patterns: Sequence[str]) -> bool:
    """Whether a pattern (glob) matches the node's module or one that holds it."""
    parts = module_path(node).split(".")
    names = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


class KeepingFloat(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Another quantizer, with some modules left in float.

    Args:
        quantizer: annotates the graph.
        keep_float: module names (globs); with a module go all that it holds.
    """

    def __init__(self, quantizer: Quantizer, keep_float: Sequence[str]) -> None:
        super().__init__()
        self.quantizer, self.keep_float = quantizer, tuple(keep_float)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """What the quantizer rewrites first."""
        changed: GraphModule = self.quantizer.transform_for_annotation(model)
        return changed

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate all, then take back what stays in float."""
        self.quantizer.annotate(model)
        drop_annotations(model, self.keep_float)
        return model

    def validate(self, model: GraphModule) -> None:
        """As the quantizer does."""
        self.quantizer.validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: Any) -> Any:
        """As the quantizer does."""
        return self.quantizer.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)


def drop_annotations(model: GraphModule, patterns: Sequence[str]) -> None:
    """Take the annotations of matching modules back.

    With them go activations that are fused into them, and data movement of what they make: there
    is nothing to gain from moving it in integers.
    """
    dropped: dict[Node, Any] = {}
    for node in model.graph.nodes if patterns else ():
        if ANNOTATION not in node.meta:
            continue
        if not stays_float(node, patterns) and moved(node) not in dropped:
            continue
        annotation = dropped[node] = node.meta.pop(ANNOTATION)
        users = list(node.users)
        if annotation.output_qspec is None and len(users) == 1 and ANNOTATION in users[0].meta:
            fused = users[0].meta[ANNOTATION]
            if not fused.input_qspec_map:
                dropped[users[0]] = users[0].meta.pop(ANNOTATION)
    for node in model.graph.nodes if dropped else ():
        annotation = node.meta.get(ANNOTATION)
        if annotation is not None:
            node.meta[ANNOTATION] = replace(
                annotation,
                input_qspec_map={
                    source: _own(spec, dropped)
                    for source, spec in annotation.input_qspec_map.items()
                },
                output_qspec=_own(annotation.output_qspec, dropped),
            )


def moved(node: Node) -> Node | None:
    """What an annotated node gives on with its own scale, if it only moves data."""
    annotation = node.meta[ANNOTATION]
    if len(annotation.input_qspec_map) != 1:
        return None
    if not isinstance(annotation.output_qspec, SharedQuantizationSpec):
        return None
    source: Node = next(iter(annotation.input_qspec_map))
    return source


def _own(spec: Any, dropped: dict[Node, Any]) -> Any:
    """The specification itself where one is shared with something that is no longer quantized."""
    seen = 0
    while isinstance(spec, SharedQuantizationSpec) and seen <= len(dropped):
        seen += 1
        shared = spec.edge_or_node
        if isinstance(shared, Node):
            if shared not in dropped:
                return spec
            spec = dropped[shared].output_qspec
        else:
            source, user = shared
            if user not in dropped:
                return spec
            spec = dropped[user].input_qspec_map.get(source)
    return spec
