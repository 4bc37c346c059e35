"""What a budget allows of a quantity: a share of the original's, or an amount in its unit.

One rule for all: a number up to 1, or a percentage, is a share (`0.5`, `40 %`); a number above 1,
or one with the unit that the quantity's name ends in, is an amount (`12`, `0.8 ms`, `300 kb`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

QUANTITIES = {
    "macs": "multiply-accumulates of one image",
    "params": "stored parameters",
    "size_kb": "weights in the target's precision, in kB of 1000 bytes",
    "peak_memory_kb": "activations that are alive at once, in the target's precision, in kB",
    "latency_ms": "time for one image on the target, as measured there",
}
"""What a budget can limit, and what that is."""

Amount = float | str
"""A limit as it is written."""


@dataclass(frozen=True)
class Limit:
    """At most `value`: a share of the original's where `share`, else an amount in `unit`."""

    value: float
    share: bool
    unit: str = ""

    def of(self, original: float) -> float:
        """As a share of what the original has."""
        return self.value if self.share else self.value / max(original, 1e-12)

    def __str__(self) -> str:
        if self.share:
            return f"{100 * self.value:.3g}%"
        return f"{self.value:,.6g} {self.unit}".strip()


def unit_of(name: str) -> str:
    """The unit in a quantity's name: `ms` of `latency_ms`, none of `macs`."""
    return name.rpartition("_")[2] if "_" in name else ""


def parse_limit(name: str, written: object) -> Limit:
    """The limit that is written for this quantity.

    Raises:
        ValueError: it is none; one line says what was expected.
    """
    unit = unit_of(name)
    amount = f"an amount such as 300 or '0.8 {unit}'" if unit else "an amount such as 2500000"
    expected = f"expected a share above 0, up to 1 (or 100 %), or {amount}"
    text = str(written).strip().lower()
    percent = text.endswith("%")
    in_unit = bool(unit) and text.endswith(unit)
    digits = text.removesuffix("%") if percent else text.removesuffix(unit)
    try:
        value = float(digits) if not isinstance(written, bool) else math.nan
    except ValueError:
        value = math.nan
    value = value / 100 if percent else value
    if not math.isfinite(value) or value <= 0 or (percent and value > 1):
        raise ValueError(expected)
    share = percent or (value <= 1 and not in_unit)
    return Limit(value, share, "" if share else unit)
