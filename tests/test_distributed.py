"""Two gloo processes of 64 images give the loss curve of one process of 128; torchrun trains on two, leaves
one record, and goes on where it was killed. BatchNorm is synchronised by train.SyncedBatchNorm, since torch's
own does not run on the CPU. Where curves are compared, the gates' noise is off, since each process draws its
own."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from bas_repro import core, data, train
from bas_repro.runs import Run

ROOT = Path(__file__).parents[1]
BAS = Run(model="resnet8", epochs=5, batch_size=128, image_size=8, lr=0.02, reference_steps=0, lam_until=400,
          gamma_from=0, device="cpu", compile="no")
RUNS = {
    "bas": BAS,
    "budget": BAS.replace(epochs=2, target_macs=0.3),  # this loss and the next are no means over images
    "distill": BAS.replace(model="resnet20", epochs=1, weights="CIFAR10_RESNET20", distill=0.5),
    "aig": BAS.replace(epochs=2, method="aig", target=0.5),
    "segmentation": Run(dataset="scenes", image_size=32, crop=(32, 32), batch_size=8, steps=4, pooled=16,
                        dropout=0.0, lr=0.01, device="cpu"),
}
COMMAND = {"epochs": 4, "batch_size": 512, "image_size": 4}


def _without_noise(t, n):
    return torch.full((n * sum(map(sum, t.plan.draws)),), 0.5, dtype=t.dtype)


def curve(run):
    "The losses of all steps, (steps, 5), and the weights and running statistics after them."
    parts, splits, normalise = [], run.work.read(run, "cpu"), data.normalise
    model = train._synchronised(run.work.build(run, len(splits.classes)), "cpu")
    model = model.to(torch.float64, memory_format=torch.channels_last)

    def losses(*arguments):
        found, memory = train.losses(*arguments)
        parts.append(found)
        return found, memory

    def double(x):  # in float32 a gate of logit 0 may open on one side and not on the other
        return normalise(x).double()

    with (
        mock.patch.object(train, "compiled", return_value=losses),
        mock.patch.object(data, "normalise", double),
        mock.patch.object(train, "_noise", _without_noise),
    ):
        train.fit([train.Trainee(run, model, splits)])
    return torch.stack(parts).detach(), model.state_dict()


def one_of_two(rank, folder):
    "A process of the two; what it found is stored in `folder`."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({name: curve(run) for name, run in RUNS.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def furthest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_curve_is_that_of_one_process(together, tell, name):
    run = RUNS[name]
    losses, state = curve(run)
    assert len(losses) == (run.steps if run.has("steps") else 11 * run.epochs)
    assert losses[0, 0] > losses[-1, 0] and losses[:, :3].abs().sum(0).count_nonzero() >= 2
    losses_off = weights_off = 0
    for theirs, weights in (rank[name] for rank in together):
        assert_close(theirs[:, :3], losses[:, :3], rtol=1e-4, atol=1e-4)
        assert_close(weights, state, rtol=1e-3, atol=1e-3)
        values = [weights[key] for key in state]
        losses_off = max(losses_off, furthest(losses[:, :3], theirs[:, :3]))
        weights_off = max(weights_off, furthest(state.values(), values))
    words = f"losses differ by {losses_off:.0e}, weights by {weights_off:.0e} at most"
    tell(f"two processes against one, {name}, {len(losses)} steps: {words}")


def torchrun(folder, **options):
    "Train the preset in two processes."
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BAS_SAVE_EVERY": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [*module, "bas_repro.train", "params/study/a.yaml"]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **own}, **options)


def test_torchrun_goes_on_where_it_was_killed(tmp_path):
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    preset = {"notebook": "study", **COMMAND, "runs": [{"method": "bas"}]}
    core.write_params(tmp_path / "params" / "study" / "a.yaml", preset)
    run = Run(tmp_path / "outputs" / "study", **COMMAND)
    first = torchrun(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run.folder / "checkpoint.pt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    for process in (first.pid, *map(int, workers)):  # each worker is in a session of its own
        os.kill(process, signal.SIGKILL)
    first.wait()
    assert not (run.folder / "metrics.json").exists()
    second = torchrun(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed, said = second.communicate()
    assert second.returncode == 0, said
    assert printed.count("test accuracy") == 1  # one process prints
    assert printed.count("epoch=") < run.epochs  # it did not start anew
    assert run.record()["processes"] == 2 and len(run.log()) == run.epochs
    run.model()  # the network of one process
