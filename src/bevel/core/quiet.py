"""Keep other programs' chatter off the terminal without hiding their errors."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Discard what the block prints, logs or warns of; exceptions pass through.

    Works on file descriptors, because converters print from C++ too, and on Python's streams, which
    in a notebook lead elsewhere. If the block fails, what it printed is added to the exception as a
    note, which `--debug` shows.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Never closed: what is imported in the block may keep them, as a log handler does.
    plain = [open(d, "w", errors="replace", closefd=False) for d in (1, 2)]  # noqa: SIM115
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    level = logging.root.manager.disable
    with tempfile.TemporaryFile() as sink, redirect_stdout(plain[0]), redirect_stderr(plain[1]):
        try:
            for descriptor in (1, 2):
                os.dup2(sink.fileno(), descriptor)
            logging.disable(logging.CRITICAL)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except BaseException as error:
            for stream in plain:
                stream.flush()
            sink.seek(0)
            printed = sink.read().decode(errors="replace").strip()
            if printed and hasattr(error, "add_note"):  # a device's Python may be 3.10
                error.add_note(f"printed meanwhile:\n{printed[-4000:]}")
            raise
        finally:
            logging.disable(level)
            for stream in plain:
                stream.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
