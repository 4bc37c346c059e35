"""Statistics of latencies are those of numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevel.core.records import Latency

samples = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200)


@given(samples, st.floats(0, 100))
def test_percentile_is_numpys(values, q):
    latency = Latency(samples_ms=values, warmup_runs=0)
    assert latency.percentile(q) == pytest.approx(np.percentile(values, q), rel=1e-9)


@given(samples)
def test_named_percentiles(values):
    latency = Latency(samples_ms=values, warmup_runs=3)
    got = [latency.p50_ms, latency.p90_ms, latency.p99_ms]
    assert got == pytest.approx(np.percentile(values, [50, 90, 99]), rel=1e-9)
    assert min(values) <= got[0] * (1 + 1e-12)
    assert got == sorted(got)
    assert latency.samples_ms == values
    assert Latency.model_validate_json(latency.model_dump_json()) == latency
