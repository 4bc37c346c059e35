"""Files that are timed together take turns, each after each of the others."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from bevel.measurement import runner


class Session:
    """Notes that it ran."""

    def __init__(self, name: str, ran: list[str]) -> None:
        self.name, self.ran = name, ran

    def run(self, inputs: object) -> None:  # noqa: ARG002
        self.ran.append(self.name)


def test_each_file_runs_once_a_round_and_after_every_other(monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(runner, "_sessions", lambda job: [Session(n, ran) for n in job["names"]])
    monkeypatch.setattr(runner, "_inputs", lambda _: [])
    found = runner._latency({"names": "abc", "seconds": 0})
    samples = found["samples_ms"]
    rounds = [ran[i : i + 3] for i in range(3 * found["warmup_runs"], len(ran), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert [len(own) for own in samples] == [len(rounds)] * 3
    timed = [name for order in rounds for name in order]
    after = Counter(pairwise(timed))
    for name in "abc":
        for other in set("abc") - {name}:
            assert after[other, name] > len(rounds) / 5
