"""Two gloo processes of 64 samples give what one process of 128 gives: the loss, and the gradient of the weights and of
the samples."""
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from bas_repro.batch_shaping import Beta, batch_shaping_loss

WORLD, LAM = 2, 0.75


def network():
    "A linear layer of fixed weights: 5 inputs, 3 gates."
    torch.manual_seed(1)
    return torch.nn.Linear(5, 3)


def batch():
    "128 samples for the layer."
    torch.manual_seed(2)
    return torch.randn(128, 5)


def process(rank, port, folder):
    "Loss and gradients of one of the processes, stored in `folder`."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=15))
    layer = torch.nn.parallel.DistributedDataParallel(network())
    gates = torch.sigmoid(layer(batch().chunk(WORLD)[rank]))
    gates.retain_grad()
    loss = batch_shaping_loss(gates, Beta(0.6, 0.4), LAM, group=dist.group.WORLD)
    loss.backward()
    torch.save((loss.detach(), gates.grad, layer.module.weight.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port():
    "A port that nobody uses."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "What each process found."
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (free_port(), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    "Loss and gradients of one process with the whole batch."
    layer = network()
    gates = torch.sigmoid(layer(batch()))
    gates.retain_grad()
    loss = batch_shaping_loss(gates, Beta(0.6, 0.4), LAM)
    loss.backward()
    return loss.detach(), gates.grad, layer.weight.grad


def test_every_process_has_the_loss_of_the_whole_batch(results, alone):
    for loss, _, _ in results: assert_close(loss, alone[0], rtol=0, atol=1e-6)


def test_the_averaged_gradient_of_the_weights_is_that_of_one_process(results, alone):
    for _, _, weight in results: assert_close(weight, alone[2], rtol=0, atol=1e-6)


def test_the_gradient_of_the_samples_is_that_of_one_process(results, alone):
    "Each process's samples get the sum over the processes, which averaging divides again."
    assert_close(torch.cat([gates for _, gates, _ in results]) / WORLD, alone[1], rtol=0, atol=1e-6)


def test_without_a_group_the_loss_is_another_one(results, alone):
    "The mean of the losses of the two halves is not the loss of the whole."
    gates = torch.sigmoid(network()(batch()))
    halves = torch.stack([batch_shaping_loss(g, Beta(0.6, 0.4), LAM) for g in gates.chunk(WORLD)]).mean()
    assert abs(halves - alone[0]) > 1e-4
