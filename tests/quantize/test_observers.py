"""Observers choose ranges; the types they go into."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import MinMaxObserver

from bevel.quantization.ranges import (
    OBSERVERS,
    ErrorObserver,
    PercentileObserver,
    s8s8,
    u8s8,
)

AFFINE = {
    "dtype": torch.uint8,
    "qscheme": torch.per_tensor_affine,
    "quant_min": 0,
    "quant_max": 255,
}


def normal(count: int = 100_000, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def rounding_error(observer: torch.nn.Module, values: Tensor) -> float:
    scale, zero_point = observer.calculate_qparams()
    rounded = torch.fake_quantize_per_tensor_affine(
        values, float(scale), int(zero_point), observer.quant_min, observer.quant_max
    )
    return float((rounded - values).square().mean())


def test_percentile_cuts_an_outlier_off_and_minmax_does_not():
    values = torch.cat([normal(), torch.tensor([1000.0])])
    observer, plain = PercentileObserver(**AFFINE), MinMaxObserver(**AFFINE)
    observer(values)
    plain(values)
    low, high = observer.chosen_range()
    assert -10 < low < -3 or low == pytest.approx(float(values.min()), abs=1)
    assert high < 10  # two bins of a histogram that reaches 1000
    assert float(plain.calculate_qparams()[0]) > 20 * float(observer.calculate_qparams()[0])


def test_percentiles_of_a_known_distribution():
    observer = PercentileObserver(**AFFINE)
    for start in range(4):  # a range that grows, batch by batch
        observer(torch.linspace(0, 10.0 * (start + 1), 100_001))
    low, high = observer.chosen_range()
    assert low == pytest.approx(0, abs=0.05)
    assert high == pytest.approx(40 * (1 - 0.0001), abs=0.1)
    assert float(observer.histogram.sum()) == pytest.approx(400_004, rel=1e-6)


@pytest.mark.parametrize("relu", [False, True])
def test_mse_observer_has_the_least_error(relu):
    values = torch.cat([normal(), 8 * normal(20, seed=1)])
    values = values.relu() if relu else values
    errors = {}
    for name, kind in OBSERVERS.items():
        observer = kind(**AFFINE)
        observer(values)
        errors[name] = rounding_error(observer, values)
    assert errors["mse"] < errors["minmax"]
    assert errors["mse"] <= 1.02 * errors["percentile"]


@pytest.mark.parametrize("kind", [PercentileObserver, ErrorObserver])
def test_a_constant_tensor_and_an_empty_one_have_a_usable_scale(kind):
    observer = kind(**AFFINE)
    observer(torch.zeros(0))
    observer(torch.full((64,), 3.0))
    scale, _ = observer.calculate_qparams()
    assert float(scale) == pytest.approx(3 / 255)


@pytest.mark.parametrize("name", OBSERVERS)
def test_symmetric_types_have_no_zero_point(name):
    spec = s8s8(name).activations
    observer = spec.observer_or_fake_quant_ctr(
        dtype=spec.dtype,
        qscheme=spec.qscheme,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
    )
    observer(normal() - 0.5)
    scale, zero_point = observer.calculate_qparams()
    assert int(zero_point) == 0
    assert float(scale) * 127 == pytest.approx(4.5, abs=1.2)
    assert u8s8(name).activations.dtype is torch.uint8
