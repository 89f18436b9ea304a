"""Two gloo processes of 64 images give the loss curve of one process of 128; torchrun trains on two, leaves one record, and goes on
where it was killed. Batch normalization is synchronised by train.SyncedBatchNorm: torch's own does not run on the CPU. Where curves
are compared, the gates' noise is off, since each process draws its own."""
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from bas_repro import core, data, resnet, train

ROOT = Path(__file__).parents[1]
BAS = train.Config(epochs=5, batch_size=128, image_size=8, lr=0.02, reference_steps=0, lam_until=400, gamma_from=0, device="cpu", compile="no")
RUNS = [BAS, *(dataclasses.replace(BAS, epochs=2, **own) for own in ({"target_macs": 0.3}, {"method": "aig", "target": 0.5}))]  # the last two with losses that are no means over images
COMMAND = {"epochs": 4, "batch_size": 512, "image_size": 4}


def curve(config):
    "The losses of all steps, (steps, 5), and the weights and running statistics after them."
    parts, splits = [], train.load_data(config.dataset, "", config.holdout, config.image_size, "cpu")
    with mock.patch.dict(train.MODELS, resnet20=lambda classes, **options: resnet.cifar_resnet(8, classes)):  # a small one: fewer messages
        model = train.synchronised(train.build(config, 10), "cpu").to(torch.float64, memory_format=torch.channels_last)
    net = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model

    def loss(*arguments):
        parts.append(train.losses(*arguments))
        return parts[-1]

    opt, own = train.optimiser(model, config), train.own_loss(config, model, splits.size)
    double = lambda x, normalise=data.normalise: normalise(x).double()  # in float32 a gate of logit 0 may open on one side and not on the other
    with mock.patch.object(data, "normalise", double), mock.patch.object(torch, "rand_like", lambda x: torch.full_like(x, 0.5)):  # of which all noise here is made
        for epoch in range(config.epochs):
            train.train_epoch(net, opt, loss, splits, config, own, epoch, mock.Mock())
    return torch.stack(parts).detach(), model.state_dict()


def one_of_two(rank, folder):
    "A process of the two; what it found is stored in `folder`."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([curve(config) for config in RUNS], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("run", range(3), ids=["bas", "budget", "aig"])
def test_the_loss_curve_is_that_of_one_process(together, tell, run):
    losses, state = curve(RUNS[run])
    assert len(losses) == 11 * RUNS[run].epochs and losses[0, 0] > losses[-1, 0] and losses[:, :3].abs().sum(0).count_nonzero() >= 2
    for theirs, weights in (rank[run] for rank in together):
        assert_close(theirs[:, :3], losses[:, :3], rtol=1e-4, atol=1e-4)
        assert_close(weights, state, rtol=1e-3, atol=1e-3)
    furthest = lambda pairs: max((a - b).abs().max().item() for a, b in pairs)
    off = furthest((rank[run][0][:, :3], losses[:, :3]) for rank in together), furthest((rank[run][1][k], v) for rank in together for k, v in state.items())
    tell(f"two processes against one, {RUNS[run].method}, {len(losses)} steps: float32 losses differ by {off[0]:.0e}, float64 weights by {off[1]:.0e} at most")


def torchrun(folder, **options):
    "Train the preset in two processes."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bas_repro.train", "params/study/a.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BAS_SAVE_EVERY": "0", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **options)


def test_torchrun_goes_on_where_it_was_killed(tmp_path):
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    core.write_params(tmp_path / "params" / "study" / "a.yaml", COMMAND)
    config = train.Config(**COMMAND)
    folder = tmp_path / "outputs" / "study" / train.slug(config)
    first = torchrun(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "checkpoint.pt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (folder / "metrics.json").exists()
    second = torchrun(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed, said = second.communicate()
    assert second.returncode == 0, said
    assert printed.count("test accuracy") == 1 and printed.count("epoch=") < config.epochs  # one process prints, and it did not start anew
    metrics = train.finished(folder, config)
    assert metrics["processes"] == 2 and len(pd.read_csv(folder / "log.csv")) == config.epochs
    train.build(config, 10).load_state_dict(torch.load(folder / "model.pt", weights_only=True))  # the network of one process
