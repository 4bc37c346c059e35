"""One tree of errors, written for the person who reads them.

Every message is one line: what failed, where, what was found and what was expected, and what to
do next. The command line prints it and exits with `exit_code`; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class BevelError(Exception):
    """Something bevel can explain. `exit_code` 2: the user can mend it; 1: bevel could not."""

    exit_code = 2


class RecipeError(BevelError):
    """A recipe that cannot be read or does not validate."""


class UnknownNameError(BevelError):
    """A plugin, model or key that does not exist."""


class MissingDependencyError(BevelError):
    """A stage needs a package that is not installed."""


class ModelError(BevelError):
    """A network that cannot be built or called."""


class CheckpointError(BevelError):
    """Weights that cannot be read or do not fit the network."""


class DataError(BevelError):
    """A data set that cannot be used as it is."""


class SurgeryError(BevelError):
    """A surgery rule, or a log of surgery, that does not fit the network."""


class PruningError(BevelError):
    """A pruning request that cannot be met, or a plan that does not fit the network.

    `reachable` says of a budget that cannot be met what can be: {"macs": 0.62, ...}; else empty.
    """

    def __init__(self, message: str, reachable: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.reachable = dict(reachable or {})


class ProofError(BevelError):
    """A pruned network that differs from its masked original: bevel's fault, not the user's."""

    exit_code = 1


class TrainingError(BevelError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class ExportError(BevelError):
    """A network that a runtime's exporter or quantizer refuses."""


class MeasurementError(BevelError):
    """An exported file that does not run, or a device that does not answer."""


class RunFolderError(BevelError):
    """A run folder that cannot be written, is in use, or belongs to another recipe."""


class SearchError(BevelError):
    """A search or a comparison that cannot begin, or of which nothing succeeded."""


FORWARD_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a network's forward raises for inputs or widths that it cannot take."""


def one_line(text: object, limit: int = 300) -> str:
    """The text with its line breaks folded, cut at `limit` characters."""
    folded = " ".join(str(text).split())
    return folded if len(folded) <= limit else folded[: limit - 1].rstrip() + "…"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'? Available: a, b, c.` for a name that is not among the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    more = f", … ({len(names)} in all)" if len(names) > 40 else ""
    shown = ", ".join(names[:40]) + more
    available = f"Available: {shown}." if names else "None is available."
    return f"Did you mean '{close[0]}'? {available}" if close else available
