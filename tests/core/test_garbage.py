"""Full collections are held off, and everything is as it was afterwards."""

import gc

import pytest

from bevel.core.garbage import sparing_old_objects


def test_old_objects_are_spared_inside_only():
    with sparing_old_objects():
        frozen = gc.get_freeze_count()
        with sparing_old_objects():
            pass
        assert gc.get_freeze_count() >= frozen > 0
    assert gc.get_freeze_count() == 0


def test_an_error_thaws_them_too():
    with pytest.raises(KeyError), sparing_old_objects():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen():
    gc.freeze()
    try:
        with sparing_old_objects():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
