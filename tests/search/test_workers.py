"""Who carries out tasks: processes that die, threads, and a stand-in for Ray."""

import os
import sys
import types
from pathlib import Path

import fake_trials
import pytest
from fake_trials import fake

from bevel.core.errors import MissingDependencyError, SearchError
from bevel.core.recipe import vary
from bevel.searching.trial import Task
from bevel.searching.workers import Cluster, Processes, in_turn, workers


def tasks(folder: Path, count: int) -> list[Task]:
    return [Task(vary(fake(), {"seed": seed}), folder / f"{seed}") for seed in range(count)]


def threads(_: Task) -> str:
    import torch

    return str(torch.get_num_threads())


def test_a_process_that_is_killed_is_the_reason_of_one_task(tmp_path: Path) -> None:
    found = dict(Processes(2)(fake_trials.killed, tasks(tmp_path, 2)))
    assert found[0] is None
    assert "SIGKILL" in str(found[1])


def test_processes_share_the_processors(tmp_path: Path) -> None:
    pool = Processes(2)
    assert pool.threads == max(1, len(os.sched_getaffinity(0)) // 2)
    assert dict(pool(threads, tasks(tmp_path, 1))) == {0: str(pool.threads)}


def setting(_: Task) -> str:
    return os.environ.get("BEVEL_TEST_SETTING", "none")


def test_processes_have_the_environment_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("BEVEL_TEST_SETTING", value)
        assert dict(Processes(1)(setting, tasks(tmp_path, 1))) == {0: value}
    monkeypatch.delenv("BEVEL_TEST_SETTING")
    assert dict(Processes(1)(setting, tasks(tmp_path, 1))) == {0: "none"}


def test_one_job_stays_in_this_process(tmp_path: Path) -> None:
    assert workers(1, None) is in_turn
    assert dict(in_turn(fake_trials.attempt, tasks(tmp_path, 2))) == {0: None, 1: None}
    assert (tmp_path / "1/attempts").read_text() == f"{os.getpid()}\n"


class StandIn(types.ModuleType):
    """What bevel uses of ray: tasks are done when they are waited for, the last one first."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.address: object = None
        self.most = 0
        self.exceptions = types.SimpleNamespace(RayError=RuntimeError)

    def init(self, address: str, **_: object) -> None:
        if address == "nowhere":
            raise ConnectionError("no answer")
        self.address = address

    def remote(self, function):
        return types.SimpleNamespace(remote=lambda task: lambda: function(task))

    def wait(self, references):
        self.most = max(self.most, len(references))
        return references[-1:], references[:-1]

    def get(self, reference):
        return reference()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return stand_in


def test_a_cluster_carries_out_every_task_so_many_at_once(tmp_path: Path, ray: StandIn) -> None:
    found = list(workers(2, "local")(fake_trials.attempt, tasks(tmp_path, 5)))
    assert dict(found) == dict.fromkeys(range(5))
    assert len(found) == 5
    assert ray.address == "local"
    assert ray.most == 2
    assert len(list(tmp_path.glob("*/attempts"))) == 5


def test_a_task_that_ray_loses_is_a_reason(tmp_path: Path, ray: StandIn) -> None:
    def lost(_: Task) -> str | None:
        raise ray.exceptions.RayError("the node\ndied")

    assert dict(Cluster("local", 1)(lost, tasks(tmp_path, 1))) == {0: "Ray: the node died"}


@pytest.mark.usefixtures("ray")
def test_a_cluster_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(SearchError, match="no Ray cluster at 'nowhere': no answer"):
        workers(2, "nowhere")


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="pip install ray"):
        workers(2, "local")
