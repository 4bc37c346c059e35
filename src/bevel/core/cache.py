"""Where bevel keeps what it need not fetch or measure twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`BEVEL_CACHE`, or `bevel` under `XDG_CACHE_HOME`, or `~/.cache/bevel`; it may not exist."""
    own = os.environ.get("BEVEL_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bevel"
