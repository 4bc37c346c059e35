"""Hard swish, x * relu6(x + 3) / 6 -> ReLU with the layers around it fitted."""

from __future__ import annotations

import torch.nn.functional as F

from bevel.rewriting.activations import ToRelu

EXACT = False
_RULE = ToRelu(F.hardswish, gates=(F.hardsigmoid,))
match, check, rewrite = _RULE.match, _RULE.check, _RULE.rewrite
