"""Fixtures of the training tests."""

import copy

import pytest
from tiny_training import TinyData, TinyNet, tiny_net


@pytest.fixture
def data() -> TinyData:
    return TinyData()


@pytest.fixture
def net() -> TinyNet:
    return tiny_net()


@pytest.fixture
def snapshot():
    """A function that copies a network's state dict."""
    return lambda module: copy.deepcopy(module.state_dict())
