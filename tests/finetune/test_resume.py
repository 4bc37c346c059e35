"""A training that is killed goes on where it was, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import Interrupted, TinyData, tiny_net

from bevel.core.errors import RunFolderError
from bevel.core.steps import TrainStep
from bevel.finetuning import finetune
from bevel.finetuning.state import EPOCH_FILE, EXECUTION_FILE, digest

JOB = Path(__file__).with_name("training_job.py")


def test_killed_mid_epoch_and_while_saving_ends_with_the_same_bits(tmp_path):
    done = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path)],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, *killed, resumed = done.stdout.splitlines()
    assert whole.startswith("finished")
    assert "[1, 2, 3, 4]" in whole
    # Starts, dies while saving epoch 1, starts anew, dies in epoch 3, dies saving epoch 3.
    assert killed == [f"killed {int(signal.SIGKILL)}, finished epochs: {n}" for n in (0, 0, 2, 2)]
    assert resumed == whole


def test_a_finished_training_is_not_repeated(tmp_path, data, net):
    settings = TrainStep(epochs=2, compile="never")
    first = finetune(net, data, settings, folder=tmp_path)
    written = (tmp_path / EPOCH_FILE).stat().st_mtime_ns
    again = finetune(net, data, settings, folder=tmp_path)
    assert (tmp_path / EPOCH_FILE).stat().st_mtime_ns == written
    assert digest(first.net) == digest(again.net)
    assert first.history == again.history
    assert first.execution == again.execution


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [("bfloat16", "channels_last"), ("float32", "channels_last"), ("bfloat16", "contiguous")],
)
def test_the_recorded_execution_is_reused_and_resumes_exactly(tmp_path, dtype, memory_format):
    settings = TrainStep(epochs=3, ema=0.5, compile="never")
    for folder, source in (("whole", TinyData()), ("parts", Interrupted(1))):
        finetune(tiny_net(), TinyData(), settings, folder=tmp_path / folder)
        (tmp_path / folder / EPOCH_FILE).unlink()
        record = json.loads((tmp_path / folder / EXECUTION_FILE).read_text())
        record["execution"] |= {"dtype": dtype, "memory_format": memory_format}
        (tmp_path / folder / EXECUTION_FILE).write_text(json.dumps(record))
        if folder == "parts":
            with pytest.raises(KeyboardInterrupt):
                finetune(tiny_net(), source, settings, folder=tmp_path / folder)
    whole = finetune(tiny_net(), TinyData(), settings, folder=tmp_path / "whole")
    parts = finetune(tiny_net(), TinyData(), settings, folder=tmp_path / "parts")
    assert whole.execution["dtype"] == parts.execution["dtype"] == dtype
    assert parts.execution["memory_format"] == memory_format
    assert digest(whole.net) == digest(parts.net)
    assert whole.net.conv.weight.is_contiguous()
    assert whole.net.conv.weight.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"optimizer": "adamw"}, {"momentum": 0.0}, {}])
def test_the_optimizer_goes_on_where_it_was(tmp_path, settings):
    step = TrainStep(epochs=4, precision="float32", compile="never", **settings)
    whole = finetune(tiny_net(), TinyData(), step)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_net(), Interrupted(2), step, folder=tmp_path)
    resumed = finetune(tiny_net(), TinyData(), step, folder=tmp_path)
    assert digest(resumed.net) == digest(whole.net) != digest(tiny_net())


def test_a_folder_of_another_training_is_refused(tmp_path, data, net):
    finetune(net, data, TrainStep(epochs=1), folder=tmp_path)
    with pytest.raises(RunFolderError, match=r"another training \(different settings\)"):
        finetune(net, data, TrainStep(epochs=2), folder=tmp_path)
    with pytest.raises(RunFolderError, match="different network"):
        finetune(tiny_net(seed=3), data, TrainStep(epochs=1), folder=tmp_path)


def test_a_damaged_state_is_named(tmp_path, data, net):
    finetune(net, data, TrainStep(epochs=1), folder=tmp_path)
    (tmp_path / EPOCH_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0garbage")
    with pytest.raises(RunFolderError, match=r"cannot read .*epoch\.safetensors") as caught:
        finetune(net, data, TrainStep(epochs=1), folder=tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / EXECUTION_FILE).write_text('{"identity": 1')
    with pytest.raises(RunFolderError, match=r"cannot read .*execution.json"):
        finetune(net, data, TrainStep(epochs=1), folder=tmp_path)


def test_an_unwritable_folder_is_named(tmp_path, data, net):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError):
        finetune(net, data, TrainStep(epochs=1), folder=tmp_path / "file" / "state")
