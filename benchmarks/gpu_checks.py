"""The checks of on_gpu.py: generators of results, each run in a process of its own with a limit in seconds.

On the CPU they run in small: what is compared there is compared, what is timed there is told and not judged.
Triton must find TRITON_INTERPRET=1 there when it is imported, which torchvision does.
"""
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bas_repro import core, data, gates, macs, methods, resnet, train
from bas_repro.batch_shaping import batch_shaping_loss
from bas_repro.runs import Run
from benchmarks import triton_kernel

CLOSE = 1e-5  # relative error of float32
CLOSE_GRADIENT = 1e-3  # of a gradient through a whole network
SPEED = 150_000  # images/s in sum over runs; 250,000 is the stretch


class Result(NamedTuple):
    "What a check found."
    name: str
    passed: bool | None  # None: told, not judged
    figure: str  # in words
    numbers: dict = {}  # the same as plain numbers
    table: list = []  # rows of Table 1


class Check(NamedTuple):
    "A check and what it may cost."
    name: str
    function: Callable  # (device) → its results
    seconds: float  # its limit


def skipped(name: str, needs: str) -> Result:
    "A check that means nothing here."
    return Result(name, None, f"needs {needs}")


def word(result: Result) -> str:
    "How a result's line begins."
    if result.passed is None:
        return "SKIP" if result.figure.startswith("needs ") else "TOLD"
    return "PASS" if result.passed else "FAIL"


def below(name: str, value: float, goal: float, form: str = "{:.1e}") -> Result:
    "A number that must not exceed its goal; NaN never passes."
    figure = f"{form.format(value)} (goal ≤ {form.format(goal)})"
    return Result(name, bool(value <= goal), figure, {"value": value, "goal": goal})


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    "‖found − expected‖ / ‖expected‖, in float64 on the CPU."
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def milliseconds(step: Callable, device: str, repeats: int = 50) -> float:
    "Median time of a step: of a CUDA graph's replays by events, or by the clock on the CPU."
    if device == "cpu":
        return statistics.median(_clocked(step) for _ in range(repeats)) * 1e3
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles; the default stream must not be known to what is captured
            step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def _clocked(step: Callable) -> float:
    "Seconds of a step on the CPU."
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


# What needs neither the training loop nor Triton


def versions(device: str) -> Iterator[Result]:
    "The machine, and what is installed there."
    found = core.environment(device)
    words = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "torchvision", "numpy"))
    words = f"{found['device']}, {words}, commit {found['commit'][:12]}"
    yield Result("versions", found["commit"] != "unknown", words)


def _shaped(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Eq. 2 and its gradient."
    x = x.requires_grad_()
    loss = batch_shaping_loss(x, lam=0.75, check=False)
    return loss, torch.autograd.grad(loss, x)[0]


def loss(device: str) -> Iterator[Result]:
    "Batch-shaping against float64 on the CPU."
    shape = (64, 128) if device == "cpu" else (256, 3776)
    random = core.generator(0, "loss")
    places = torch.rand(shape, generator=random).argsort(0)
    x = (places + 0.1 + 0.8 * torch.rand(shape, generator=random)) / shape[0]  # no two alike: ties have no order
    found = _shaped(x.clone().to(device))
    expected = _shaped(x.double())
    yield below("batch-shaping against float64", apart(found[0], expected[0]), CLOSE)
    yield below("its gradient against float64", apart(found[1], expected[1]), CLOSE)


def _slope(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    "Outputs and, in one vector, the gradient of both losses of a network whose gates are forced."
    out, gated = model(x, return_gates=True)
    shaping = batch_shaping_loss(torch.sigmoid(gates.all_logits(gated)), lam=0.75, check=False)
    used = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(F.cross_entropy(out, y) + shaping, used)
    return [out, torch.cat([slope.flatten() for slope in slopes])]


def network(device: str) -> Iterator[Result]:
    "A gated network's outputs and the gradient of both losses against float64 on the CPU."
    from bas_repro.inference import force, random_masks
    train.device_of(Run())  # float32 means float32 from here on
    n, size, depth = (8, 8, 8) if device == "cpu" else (16, 32, 20)
    torch.manual_seed(0)
    model = triton_kernel.settled(resnet.cifar_resnet(depth, gated=True), "cpu")
    x = torch.randn(n, 3, size, size, generator=core.generator(0, "pictures"))
    y = torch.arange(n) % 10
    masks = random_masks(model, n, 0.5)
    expected = _slope(force(model.double(), [mask.double() for mask in masks]), x.double(), y)
    model = force(model.float().to(device), [mask.to(device) for mask in masks])
    found = _slope(model, x.to(device), y.to(device))
    yield below("network against float64", apart(found[0], expected[0]), CLOSE)
    yield below("gradient of all losses against float64", apart(found[1], expected[1]), CLOSE_GRADIENT)


def loss_speed(device: str) -> Iterator[Result]:
    "How long batch-shaping takes, forward and backward."
    shape = (64, 128) if device == "cpu" else (256, 3776)
    x = torch.rand(shape, generator=core.generator(0, "loss")).to(device)
    eager = milliseconds(lambda: _shaped(x), device)
    if device == "cpu":
        yield Result("time of batch-shaping", None, f"{eager:.2f} ms for {list(shape)}", {"eager": eager})
        return
    fused = torch.compile(_shaped)
    compiled = milliseconds(lambda: fused(x), device)
    result = below("time of batch-shaping", min(eager, compiled), 0.3, "{:.3f} ms")
    yield result._replace(numbers=result.numbers | {"eager": eager, "compiled": compiled})


# Triton: benchmarks/triton_kernel.py


def triton(device: str) -> Iterator[Result]:
    "The Triton kernel in float32 against the masked network."
    if not triton_kernel.tk.available(device):
        yield skipped("Triton against the masked network", "a Triton that runs here")
        return
    small = device == "cpu"
    torch.manual_seed(0)
    model = resnet.cifar_resnet(8, gated=True) if small else resnet.resnet34(gated=True)
    model = triton_kernel.settled(model, device)
    n, size = (2, 8) if small else (8, 224)
    x = torch.randn(n, 3, size, size, generator=core.generator(0, "pictures")).to(device)
    for share in (0.0, 0.45, 1.0):
        error = triton_kernel.network_check(model, x, share)
        yield below(f"Triton, {share:.0%} open, against the masked network", error, 1e-4)


def triton_layers(device: str) -> Iterator[Result]:
    "A layer in the Triton kernel against a dense convolution: its numbers, and its time."
    if not triton_kernel.tk.available(device):
        yield skipped("Triton, layers", "a Triton that runs here")
        return
    small = device == "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    for channels, pixels in ((16, 4),) if small else triton_kernel.LAYERS:
        for share in (1.0, 0.45):
            found = triton_kernel.layer_check(channels, pixels, 2 if small else 128, share, device, dtype)
            name = f"Triton, layer of {channels} at {pixels}, {share:.0%} open"
            yield below(name, found["error"], 1e-4 if small else 2e-2)
            if not small:
                ms = [found[f"{kind}_ms"] for kind in ("first", "last", "dense")]
                words = "first {:.3f} ms, last {:.3f}, dense {:.3f}".format(*ms)
                yield Result(f"{name}, time", None, words, found)


def triton_network(device: str) -> Iterator[Result]:
    "ResNet-34 in the Triton kernel against the dense network: what Table 1 has."
    if device == "cpu":
        yield skipped("Triton, ResNet-34 against dense", "CUDA")
        return
    rows = triton_kernel.network_times("resnet34", 128, 224, torch.bfloat16, tuple(triton_kernel.GOALS))
    dense = [row for row in rows if row["engine"].startswith("dense")]
    best = min(row["ms"] for row in dense)
    words = ", ".join(f"{row['engine']} {row['ms']:.3f} ms" for row in dense)
    about = {"model": "ResNet34", "batch": 128}
    yield Result("ResNet-34, dense bf16", None, words, {}, [about | row for row in dense])
    for share, goal in triton_kernel.GOALS.items():
        ours = [row for row in rows if row["share"] == share and row not in dense]
        row = min(ours, key=lambda row: row["ms"])
        name = f"Triton, {row['macs']:.3f} of the MACs, of the best dense"
        result = below(name, row["ms"] / best, goal, "{:.3f}")
        entry = {"model": "ResNet34-BAS", "batch": 128, **row, "engine": "triton"}
        yield result._replace(figure=f"{result.figure}, {row['engine']}", table=[entry])


# The training loop: train.Trainee, train.stepper


def at_start(study: list[Run], device: str, splits: data.Splits) -> list:
    "Runs at their start, on other images than their own."
    found = []
    for run in study:
        train.device_of(run)  # sets what training on a GPU sets
        model = run.work.build(run, len(splits.classes), None)
        model = model.to(device, memory_format=torch.channels_last)
        found.append(train.Trainee(run, model, splits))
    return found


def _trainees(method: str, count: int, device: str, splits: data.Splits, **settings) -> list:
    "Runs of one structure with other seeds."
    settings |= {"method": method, "device": device, "schedule": "linear"}
    return at_start([Run(**settings, seed=seed) for seed in range(count)], device, splits)


def _digits(device: str) -> tuple[data.Splits, dict]:
    "Digits in memory, and the settings of a run on them."
    size = 8 if device == "cpu" else 32
    model = "resnet8" if device == "cpu" else "resnet20"
    settings = {"image_size": size, "model": model, "batch_size": 128, "epochs": 10, "precision": "fp32"}
    splits = data.load("digits", size=size)
    return splits._replace(train=splits.train.to(device), val=splits.val.to(device)), settings


def _sums(step: Callable, trainees: list, steps: int) -> torch.Tensor:  # (steps, trainees, 5)
    "The summed losses after each of the first steps of an epoch."
    found = []
    for trainee in trainees:
        train.begin(trainee)
    for _ in range(steps):
        step()
        found.append(torch.stack([trainee.sums.clone() for trainee in trainees]))
    return torch.stack(found)


def captured(device: str) -> Iterator[Result]:
    "One step captured in a graph, two runs at once, against each run alone and eager."
    splits, settings = _digits(device)
    together = _trainees("bas", 2, device, splits, **settings)
    found = _sums(train.stepper(together, captured=device != "cpu"), together, 5)
    alone = _trainees("bas", 2, device, splits, **settings)
    expected = [_sums(train.stepper([one], captured=False), [one], 5) for one in alone]
    expected = torch.cat(expected, 1)
    errors = [max(apart(*pair) for pair in zip(*step)) for step in zip(found, expected)]
    how = "captured, two at once" if device != "cpu" else "two at once"
    goal = CLOSE if device != "cpu" else 0.0
    yield below(f"2 steps {how} against eager alone", max(errors[:2]), goal)
    words = f"{errors[-1]:.1e}: a gate at its threshold may open in one of them"
    yield Result(f"5 steps {how} against eager alone", None, words, {"value": errors[-1]})


def no_waiting(device: str) -> Iterator[Result]:
    "No step waits for the GPU."
    name = "no synchronisation in 20 steps"
    if device == "cpu":
        yield skipped(name, "CUDA")
        return
    splits, settings = _digits(device)
    for is_captured in (False, True):
        trainees = _trainees("bas", 1, device, splits, **settings, compile="no")
        step = train.stepper(trainees, captured=is_captured)
        for mode in ("default", "error", "error"):  # ten steps to warm up, twice ten; an epoch has eleven
            train.begin(trainees[0])
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            for _ in range(10):
                step()
            torch.cuda.set_sync_debug_mode("default")
        yield Result(f"{name}, {'captured' if is_captured else 'eager'}", True, "none")


def falls(device: str) -> Iterator[Result]:
    "The first ten batches of the digits, five times over, bring the loss down."
    splits, settings = _digits(device)
    trainees = _trainees("bas", 1, device, splits, **settings | {"epochs": 3})
    step, means = train.stepper(trainees, captured=device != "cpu"), []
    for _ in range(5):
        means.append(_sums(step, trainees, 10)[-1, 0, 0].item() / 10)
    first, last = means[0], means[-1]
    figure = f"{first:.3f} in ten steps at first, {last:.3f} in the last ten of 50 (goal ≤ 0.8 of it)"
    yield Result("the loss falls", last <= 0.8 * first, figure, {"first": first, "last": last})


def noise_pictures(device: str, size: int, n: int) -> data.Splits:
    "As many random pictures as a training set has, for timing."
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=core.generator(0, "x"))
    images = data.Images(x, torch.arange(n) % 10).to(device)
    few = images.part(slice(10))
    return data.Splits(images, few, few, tuple("0123456789"), size, "crop")


def _images_per_second(method: str, count: int, device: str) -> float:
    "Training images a second, all runs together."
    small = device == "cpu"
    size, batch, steps, model = (8, 32, 3, "resnet8") if small else (32, 256, 100, "resnet20")
    splits = noise_pictures(device, size, 320 if small else 45_000)
    settings = {"image_size": size, "batch_size": batch, "model": model}
    precision = "fp32" if small else "bf16"
    trainees = _trainees(method, count, device, splits, **settings, precision=precision, epochs=20)
    step = train.stepper(trainees, captured=not small)
    for trainee in trainees:
        train.begin(trainee)
    for _ in range(3):
        step()
    if small:
        return count * batch / statistics.median(_clocked(step) for _ in range(steps))
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return count * batch * steps / (time.perf_counter() - began)


def _speed(kind: str, method: str, goal: float | None, device: str) -> Iterator[Result]:
    "Images a second with more and more runs at once."
    numbers = {}
    for count in (1, 2) if device == "cpu" else (1, 4, 8):
        numbers[str(count)] = _images_per_second(method, count, device)
        judged = goal is not None and device != "cpu" and count == 8
        figure = f"{numbers[str(count)]:,.0f} images/s"
        if judged:
            figure += f", at best {max(numbers.values()):,.0f} (goal ≥ {goal:,.0f})"
        passed = max(numbers.values()) >= goal if judged else None
        yield Result(f"speed, {kind}, {count} at once", passed, figure, dict(numbers))


def speed_plain(device: str) -> Iterator[Result]:
    "The plain network's speed."
    yield from _speed("plain", "plain", None, device)


def speed_gated(device: str) -> Iterator[Result]:
    "Of gates without a loss of their own."
    from benchmarks import training_step  # adds that method
    yield from _speed("gated", training_step.KINDS["gated"], None, device)


def speed_losses(device: str) -> Iterator[Result]:
    "Of the gated network with both losses."
    yield from _speed("gated with losses", "bas", SPEED, device)


CHECKS = tuple(Check(*one) for one in (
    ("versions", versions, 30),
    ("loss", loss, 30),
    ("network", network, 60),
    ("captured", captured, 60),
    ("no_waiting", no_waiting, 60),
    ("falls", falls, 60),
    ("triton", triton, 60),
    ("triton_network", triton_network, 120),
    ("triton_layers", triton_layers, 60),
    ("speed_losses", speed_losses, 90),
    ("loss_speed", loss_speed, 40),
    ("speed_plain", speed_plain, 60),
    ("speed_gated", speed_gated, 60),
))


def carry_out(number: int, device: str, left: Callable) -> None:
    "Carry out a check in this process; `left(results)` is called whenever there is one more."
    check, found, began = CHECKS[number], [], time.monotonic()
    for result in check.function(device):
        found.append(result._asdict() | {"seconds": time.monotonic() - began})
        began = time.monotonic()
        left(found)
