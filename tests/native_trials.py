"""Random networks, images and gates for the native kernel, which must give what torch gives and leave no
trace. `python tests/native_trials.py --seed 123 --count 1` repeats a trial, `--kernel FILE` tries a build."""
import argparse
import ctypes
import random
import sys
import traceback
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bas_repro import native
from bas_repro.gates import GatingModule

KINDS = (  # of the kernel: floats in a vector, precision, unit as native._run takes it
    (4, "float32", 0),
    (8, "float32", 0),
    (16, "float32", 0),
    (16, "bfloat16", 1),
    (16, "bfloat16", 2),
)
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}  # the largest relative error of an image
EDGES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65)  # numbers of channels around whole vectors and blocks
MASKS = ("none", "one", "all", "random", "own")  # which channels are open; own: the network decides
VIEWS = ("whole", "channels last", "offset", "gaps", "turned", "one image", "one channel", "one pixel")
BAD = ("nan", "inf", "-inf", "channels", "dimensions", "small")  # input, and with given gates also
BAD_MASKS = ("no images", "fewer images", "fewer channels")


def kinds():
    "What this build of the kernel and this processor have."
    has = {0: True, 1: native.bf16(), 2: native._kernel().bas_amx()}
    return [kind for kind in KINDS if kind[0] <= native.lanes() and has[kind[2]]]


# ---- networks ----------------------------------------------------------------------------------------------


class Twin:
    "A random network twice: the kernel's program, and for each of its steps what torch computes."

    def __init__(self, draw, lanes, precision):
        self.draw, self.program, self.computes = draw, native.Program(lanes, precision), []
        x = self.add("input", -1, lambda now: self.rounded(now.images), outputs=self.images_channels())
        x = self.convolve(x, **self.layer(x, self.channels(), draw.choice((1, 3, 3, 5, 7)), same=False))
        if draw.random() < 0.3:
            x = self.pool(x)
        for _ in range(draw.randint(1, 3)):
            x = draw.choice((self.basic, self.basic, self.bottleneck, self.bottleneck, self.plain))(x)
        if draw.random() < 0.25:
            x = self.pyramid(x)
        self.end(x)

    def images_channels(self):
        "Channels of the images."
        return self.draw.randint(1, 5) if self.draw.random() < 0.8 else self.channels()

    def channels(self):
        "Channels of features."
        return self.draw.choice(EDGES) if self.draw.random() < 0.5 else self.draw.randint(1, 70)

    def rounded(self, x):
        "Numbers as they stand in the kernel's memory."
        return x.to(getattr(torch, self.program.precision)).float()

    @torch.no_grad()
    def torch(self, images, masks):
        "Scores and all gates' logits."
        now = SimpleNamespace(images=images, masks=masks, seen=[], logits=[])
        for compute in self.computes:
            now.seen.append(compute(now))
        logits = torch.cat(now.logits, 1) if now.logits else images.new_empty(len(images), 0)
        return now.seen[-1].flatten(1), logits

    def add(self, kind, source, compute, **sizes):
        "A step that has no weights."
        self.computes.append(compute)
        return self.program.add(kind, source, **sizes)

    def layer(self, x, outputs, k, stride=None, same=True):
        "A convolution of step x, perhaps with batch normalization; same: with as many pixels as x / stride."
        draw = self.draw
        dilation = draw.choice((1, 1, 1, 2, 3))
        padding = dilation * (k - 1) // 2 if same else draw.randint(0, k // 2 + 1)
        stride = stride or draw.choice((1, 1, 2, 3))
        sizes = {"stride": stride, "padding": padding, "dilation": dilation, "bias": draw.random() < 0.5}
        conv = nn.Conv2d(self.program.channels(x), outputs, k, **sizes)
        nn.init.normal_(conv.weight, std=(2 / conv.weight[0].numel()) ** 0.5)
        bn = self.norm(nn.BatchNorm2d(outputs)) if draw.random() < 0.6 else None
        return {"conv": conv.eval(), "bn": bn}

    def norm(self, bn):
        "A batch normalization that does something."
        bn.running_mean.normal_(std=0.1)
        bn.running_var.uniform_(0.5, 2)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.1)
        return bn.eval()

    def convolve(self, source, conv, bn=None, relu=True, plus=-1, ins=-1, outs=-1, scores=False):
        "A convolution."
        native._convolution(self.program, source, conv, bn, relu, plus, ins, outs, scores)
        if bn is not None and self.program.precision == "bfloat16":  # rounded when it is folded in
            conv, bn = fuse_conv_bn_eval(conv, bn), None
        weight, bias = self.rounded(conv.weight.detach()), conv.bias

        def compute(now):
            y = F.conv2d(now.seen[source], weight, bias, conv.stride, conv.padding, conv.dilation)
            y = y if bn is None else bn(y)
            if plus >= 0:
                y = y + now.seen[plus]
            if relu:
                y = y.relu()
            if outs >= 0:
                y = y * now.masks[outs][:, :, None, None]
            return y if scores else self.rounded(y)

        self.computes.append(compute)
        return len(self.computes) - 1

    def gate(self, source, widths):
        "A gating module with one or two gates; the number of the first."
        module = GatingModule(self.program.channels(source), sum(widths), self.draw.randint(1, 20))
        self.norm(module.bn)
        nn.init.normal_(module.fc2.bias)
        module.eval()
        self.computes.append(lambda now: now.logits.append(module(now.seen[source]).logits))
        return native._gate(self.program, source, module, widths)

    def shortcut(self, x, outputs, stride):
        "What a block adds; x itself where that fits."
        before = self.program.channels(x)
        if before == outputs and stride == 1 and self.draw.random() < 0.8:
            return x
        if before > outputs or self.draw.random() < 0.5:
            return self.convolve(x, **self.layer(x, outputs, 1, stride), relu=False)
        left = (outputs - before) // 2
        filling = (0, 0, 0, 0, left, outputs - before - left)
        sizes = {"stride": stride, "inputs": before, "outputs": outputs}

        def compute(now):
            return F.pad(now.seen[x][:, :, ::stride, ::stride], filling)

        return self.add("sample", x, compute, **sizes)

    def outputs(self, x):
        "Channels of a block's output, often as many as its input has."
        return self.program.channels(x) if self.draw.random() < 0.5 else self.channels()

    def basic(self, x):
        "A gated block of two convolutions."
        draw, inner, outputs = self.draw, self.channels(), self.outputs(x)
        stride = draw.choice((1, 1, 2))
        gate = self.gate(x, [inner])
        way = self.shortcut(x, outputs, stride)
        y = self.convolve(x, **self.layer(x, inner, draw.choice((1, 3, 3, 5)), stride), outs=gate)
        return self.convolve(y, **self.layer(y, outputs, draw.choice((1, 3, 3)), 1), plus=way, ins=gate)

    def bottleneck(self, x):
        "A gated block of three convolutions with a gate of its own for each of two, or one that they share."
        draw, outputs, stride = self.draw, self.outputs(x), self.draw.choice((1, 1, 2))
        widths = [self.channels() for _ in range(draw.randint(1, 2))]
        first = self.gate(x, widths)
        last = first + len(widths) - 1
        way = self.shortcut(x, outputs, stride)
        y = self.convolve(x, **self.layer(x, widths[0], 1, 1), outs=first)
        middle = self.layer(y, widths[-1], draw.choice((1, 3, 3, 5)), stride)
        y = self.convolve(y, **middle, ins=first, outs=last)
        return self.convolve(y, **self.layer(y, outputs, 1, 1), plus=way, ins=last)

    def plain(self, x):
        "A convolution without gates."
        layer = self.layer(x, self.channels(), self.draw.choice((1, 2, 3)), same=False)
        return self.convolve(x, **layer, relu=self.draw.random() < 0.5)

    def pool(self, x):
        "A max pool."
        k = self.draw.randint(1, 4)
        sizes = {"k": k, "stride": self.draw.randint(1, 3), "pad": self.draw.randint(0, k // 2)}
        pool, channels = nn.MaxPool2d(*sizes.values()), self.program.channels(x)
        return self.add("max_pool", x, lambda now: pool(now.seen[x]), outputs=channels, **sizes)

    def average(self, x, side):
        "Means of side × side fields."
        channels = self.program.channels(x)

        def compute(now):
            return self.rounded(F.adaptive_avg_pool2d(now.seen[x], side))

        return self.add("average", x, compute, inputs=channels, outputs=channels, side=side)

    def pyramid(self, x):
        "Features, and means of them in coarser and coarser fields, beside each other."
        if self.program.channels(x) % self.program.pair:  # in PSPNet they are whole words
            x = self.convolve(x, **self.layer(x, self.program.channels(x) + 1, 1, 1))
        channels = offset = self.program.channels(x)
        levels = [self.draw.randint(1, 2) * self.program.lanes for _ in range(self.draw.randint(1, 3))]
        sizes = {"outputs": channels, "width": channels + sum(levels)}
        together = self.add("resize", x, lambda now: now.seen[x], **sizes)
        for width in levels:
            level = self.average(x, self.draw.randint(1, 6))
            level = self.convolve(level, **self.layer(level, width, 1, 1))
            sizes = {"outputs": width, "into": together, "offset": offset}
            self.add("resize", level, lambda now, level=level: self.beside(now, together, level), **sizes)
            offset += width
        k = self.draw.choice((1, 3))
        head = nn.Conv2d(offset, self.channels(), k, padding=k // 2)
        return self.convolve(together, head)

    def beside(self, now, together, level):
        "Enlarge a level's features and set them beside the others."
        side = now.seen[together].shape[2:]
        large = F.interpolate(now.seen[level], side, mode="bilinear", align_corners=False)
        now.seen[together] = torch.cat([now.seen[together], self.rounded(large)], 1)

    def end(self, x):
        "Scores of images, of a few fields, or of pixels."
        if self.draw.random() < 0.6:
            x = self.average(x, self.draw.choice((1, 1, 1, 2)))
        conv = self.layer(x, self.channels(), self.draw.choice((1, 1, 3)), 1)["conv"]
        self.convolve(x, conv, relu=False, scores=True)

    def least(self, h, w):
        "The sides of h × w images, enlarged until the network computes something of them."
        while True:
            try:
                native._sides(self.program.steps, h, w)
                return h, w
            except ValueError:
                h, w = h + 1, w + 1


# ---- images and gates --------------------------------------------------------------------------------------


def view(way, images):
    "The same numbers elsewhere in memory, and NaN around them; or fewer numbers, some of them several times."
    n, c, h, w = images.shape
    if way == "channels last":
        return images.contiguous(memory_format=torch.channels_last)
    if way == "turned":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    if way == "one image":
        return images[:1].expand(n, c, h, w)
    if way == "one channel":
        return images[:, :1].expand(n, c, h, w)
    if way == "one pixel":
        return images[:, :, :1, :1].expand(n, c, h, w)
    if way == "offset":
        place = torch.full((images.numel() + 7,), torch.nan)[3 : 3 + images.numel()].view(n, c, h, w)
    elif way == "gaps":
        place = torch.full((n + 1, c + 2, 2 * h + 1, 3 * w + 1), torch.nan)[1:, 1 : c + 1, 1::2, 1::3]
    else:
        return images
    return place.copy_(images)


def masks_of(way, widths, n):
    "Masks (n, channels) of each gate; None: the network decides."
    if way == "own":
        return None
    if way == "one":
        return [F.one_hot(torch.randint(width, (n,)), width).float() for width in widths]
    share = {"none": 0, "all": 1}.get(way, torch.rand(n, 1))
    return [(torch.rand(n, width) < share).float() for width in widths]


# ---- what must hold ----------------------------------------------------------------------------------------


def inside(program, h, w):
    "For each number of a workspace: whether it is of features, and no border and no gap."
    grids, size = native._grids(program, h, w)
    found = torch.zeros(size, dtype=torch.bool)
    for step, grid in zip(program.steps, grids):
        if step.kind == "gate" or "into" in step.sizes or step.sizes.get("scores"):
            continue
        shape = grid.h + 2 * grid.border, grid.w + 2 * grid.border, grid.c
        whole = found[grid.at : grid.at + shape[0] * shape[1] * shape[2]].view(shape)
        lines, pixels = (slice(grid.border, grid.border + side) for side in (grid.h, grid.w))
        whole[lines, pixels, : step.sizes.get("width", grid.c)] = True
    return found


def workspaces(executor):
    "The numbers of its workspaces, a row each."
    (plan,) = executor._plans.values()
    return plan[-1].view(getattr(torch, executor.program.precision))


def check_close(what, got, want, close):
    "The numbers of each image are as near as they should be."
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what} are not finite"
    error, size = (got - want).norm(dim=1), want.norm(dim=1) + 0.1 * want.shape[1] ** 0.5
    worst = (error / size).max().item() if want.numel() else 0
    assert worst <= close, f"{what}: relative error {worst:.1e}"


def check_same(what, got, want):
    "Two runs gave the same numbers."
    same = all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert same, f"other numbers than before {what}"


@torch.no_grad()
def results(executor, images):
    "Scores, logits and open channels."
    scores, gates = executor(images, return_gates=True)
    none = images.new_empty(len(images), 0)
    logits = torch.cat([none, *(gate.logits for gate in gates)], 1)
    return scores, logits, torch.cat([none, *(gate.value for gate in gates)], 1)


def check_bad(executor, way, images):
    "Bad input is answered by a `ValueError`, which names what is wrong."
    draw, (n, c, h, w), masks = random.Random(len(images)), images.shape, executor.masks
    word, bad = "finite", images.clone()
    if way in ("nan", "inf", "-inf"):
        image = draw.randrange(n)
        bad[image, draw.randrange(c), draw.randrange(h), draw.randrange(w)] = float(way)
        word = f"image {image} "
    elif way == "channels":
        word, bad = "give", torch.randn(n, c + 1, h, w)
    elif way == "dimensions":
        word, bad = "give", images[0]
    elif way == "small":
        word, bad = "too small", images[:, :, :0]
    elif way == "no images":
        word, bad = "masks", images[:0]
    elif way == "fewer images":
        word, executor.masks = "masks", [mask[:-1] for mask in masks]
    else:
        word, executor.masks = "masks", [mask[:, :-1] for mask in masks]
    try:
        executor(bad)
    except ValueError as error:
        assert word in str(error), f"bad input ({way}): {error}"
    else:
        raise AssertionError(f"bad input ({way}) was taken")
    finally:
        executor.masks = masks


def trial(seed):
    "One network, images and masks."
    torch.backends.mkldnn.enabled = False
    draw = random.Random(seed)
    torch.manual_seed(seed)
    lanes, precision, unit = draw.choice(kinds())
    native._unit = lambda program: unit
    native.SHARED = draw.choice((0, 0, 1 << 60))  # these images are small; most are shared all the same
    threads = draw.randint(1, 3)
    torch.set_num_threads(1)  # for torch, whose threads would wait for each other's many small pieces
    twin = Twin(draw, lanes, precision)
    program = twin.program
    h, w = twin.least(draw.choice((1, draw.randint(1, 12))), draw.choice((1, draw.randint(1, 12))))
    images = view(draw.choice(VIEWS), torch.randn(draw.randint(0, 5), program.channels(0), h, w))
    executor = native.Executor(program)
    executor.masks = masks_of(draw.choice(MASKS), program.widths, len(images)) if program.widths else None

    torch.set_num_threads(threads)
    found = results(executor, images)
    scores, logits, opened = found
    forced = opened if executor.masks is None else torch.cat(executor.masks, 1)
    assert torch.equal(opened, forced), "other gates than forced"
    if executor.masks is None:
        assert torch.equal(opened, (logits > 0).float()), "gates that are not their logits'"
    torch.set_num_threads(1)
    right_scores, right_logits = twin.torch(images, opened.split(program.widths, 1))
    check_close("scores", scores, right_scores, CLOSE[precision])
    check_close("logits", logits, right_logits, CLOSE[precision])

    torch.set_num_threads(threads)
    features = inside(program, h, w)
    numbers = workspaces(executor)
    assert not numbers[:, ~features].any(), "numbers in the border"
    numbers[:, features] = torch.nan
    check_same("old features became NaN", results(executor, images), found)
    ways = BAD + BAD_MASKS if executor.masks else BAD
    if len(images) and draw.random() < 0.3:
        check_bad(executor, draw.choice(ways), images)
        check_same("bad input", results(executor, images), found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--count", type=int, default=1000, help="trials, each with the next seed")
    parser.add_argument("--kernel", help="a build of csrc/native.cpp; without it, the library's own")
    options = parser.parse_args()
    if options.kernel:
        kernel = ctypes.CDLL(options.kernel)
        native._library = lambda: kernel
    clean = 0
    for seed in range(options.seed, options.seed + options.count):
        print(f"\rseed {seed} ", end="", file=sys.stderr, flush=True)  # if it crashes, this is what is left
        try:
            trial(seed)
            clean += 1
        except Exception:
            print(f"\n--seed {seed} --count 1 fails:", file=sys.stderr)
            traceback.print_exc()
    print(f"{clean} of {options.count} clean")
    return 0 if clean == options.count else 1


if __name__ == "__main__":
    sys.exit(main())
