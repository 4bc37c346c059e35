"""PReLU -> ReLU with the layers around it fitted to come closest."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bevel.rewriting.activations import ToRelu

EXACT = False
_RULE = ToRelu(F.prelu, also=(torch.prelu, torch.Tensor.prelu))
match, check, rewrite = _RULE.match, _RULE.check, _RULE.rewrite
