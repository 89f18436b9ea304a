"The released networks: each file against its card, on its data set where that is there; and what is refused."
import shutil

import pytest
import torch

from bas_repro import data, macs, resnet

NAMES = resnet.weight_names()
KEYS = {"model", "gated", "width", "classes", "method", "dataset", "image_size", "schedule", "steps", "seed", "commit",
        "test_accuracy", "macs_mean", "parameters", "bytes", "text"}


def path(name, end="safetensors"): return resnet._WEIGHTS / f"{name}.{end}"


def network(card, name):
    return getattr(resnet, card["model"])(card["classes"], card["gated"], card["width"], weights=name).eval()


@torch.no_grad()
def measure(net, images, size):  # right answers, and mean MACs of an image
    right, cost = 0, []
    for some in torch.arange(len(images)).split(500):
        x, y = data.normalise(data.middle(images.x[some], size)), images.y[some]
        right += (net(x).argmax(1) == y).sum().item()
        cost.append(macs.image_macs(net, x))
    return right, torch.cat(cost).double().mean().item()


def test_every_file_has_a_card_and_every_card_a_file():
    assert NAMES and {file.stem for file in resnet._WEIGHTS.glob("*.md")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card_says_what_the_file_is(name):
    card = resnet.weight_card(name)
    assert KEYS <= set(card) and card["text"] and len(card["commit"]) == 40
    assert card["bytes"] == path(name).stat().st_size <= 1e6
    assert card["parameters"] == sum(p.numel() for p in network(card, name).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_and_macs_are_the_cards(name, count):
    "To the card's digits; an image on the edge may fall to the other side on another processor: one, or one in 2,000."
    card = resnet.weight_card(name)
    try: splits = data.load(card["dataset"], holdout=0.0, size=card["image_size"])
    except FileNotFoundError as error: pytest.skip(f"{card['dataset']} is not here: {error}")
    if splits.label != card.get("data", splits.label): pytest.skip(f"here is {splits.label}, not {card['data']}")
    right, cost = measure(network(card, name), splits.test, splits.size)
    assert abs(right - card["test_accuracy"] * len(splits.test)) <= max(1, len(splits.test) / 2000) + 0.1
    assert cost == pytest.approx(card["macs_mean"], rel=1e-3)
    count("released networks that reach what their card says")


def test_half_precision_becomes_float32():
    net = resnet.resnet20(gated=True, weights="DIGITS_BAS_50")
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert torch.equal(net.conv1.weight, net.conv1.weight.half().float())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder of released weights that can be spoilt."
    shutil.copytree(resnet._WEIGHTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(resnet, "_WEIGHTS", tmp_path)
    return tmp_path


def refused(call, *says):
    with pytest.raises(ValueError) as error: call()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and all(part in message for part in says), message


@pytest.mark.parametrize("what, call, says", [
    ("a name that there is not", lambda: resnet.resnet20(gated=True, weights="DIGITS"), ["'DIGITS'", "choose one of", "DIGITS_BAS_50"]),
    ("no name", lambda: resnet.resnet20(gated=True, weights=3), ["weights=3", "DIGITS_BAS_50"]),
    ("a path", lambda: resnet.resnet20(gated=True, weights="../weights/DIGITS_BAS_50"), ["is not known"]),
    ("a card that there is not", lambda: resnet.weight_card("DIGITS"), ["'DIGITS'", "DIGITS_BAS_50"]),
    ("a plain network", lambda: resnet.resnet20(weights="DIGITS_BAS_50"), ["gated=True, width=1), not of", "gated=False"]),
    ("another depth", lambda: resnet.resnet14(gated=True, weights="DIGITS_BAS_50"), ["is of resnet20(", "not of resnet14("]),
    ("another width", lambda: resnet.resnet20(gated=True, width=2, weights="DIGITS_BAS_50"), ["width=1), not of", "width=2"]),
    ("other classes", lambda: resnet.resnet20(5, gated=True, weights="DIGITS_BAS_50"), ["num_classes=10", "num_classes=5"]),
    ("another hidden layer", lambda: resnet.resnet20(gated=True, hidden=8, weights="DIGITS_BAS_50"), ["has not the tensors of resnet20(", "give no options"]),
])
def test_refused_in_one_line(what, call, says, count):
    refused(call, *says)
    count("bad calls for released weights answered in one line")


@pytest.mark.parametrize("size", [0, 5, 1000, 100_000, -1])
def test_a_file_cut_short_is_refused(folder, size, count):
    file = folder / "DIGITS_BAS_50.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(lambda: resnet.resnet20(gated=True, weights="DIGITS_BAS_50"), "DIGITS_BAS_50.safetensors is cut short", "install bas_repro anew")
    count("damaged files of weights answered in one line")


def test_a_file_of_another_network_than_its_card_is_refused(folder):
    other = resnet.save_weights(resnet.resnet8(), "OTHER", {}, "None.", folder)
    shutil.copy(other, folder / "DIGITS_BAS_50.safetensors")
    refused(lambda: resnet.resnet20(gated=True, weights="DIGITS_BAS_50"), "DIGITS_BAS_50.safetensors has not the tensors of resnet20(num_classes=10, gated=True, width=1)")


def test_saved_and_loaded_again(folder):
    "Also from channels_last, in which networks are trained; plain, wide, of other classes."
    net = resnet.resnet8(4, width=3).to(memory_format=torch.channels_last).eval()
    resnet.save_weights(net, "TOY", {"dataset": "none"}, "Not trained.", folder)
    assert resnet.weight_card("TOY")["width"] == 3 and "TOY" in resnet.weight_names()
    again = resnet.resnet8(4, width=3, weights="TOY").state_dict()
    assert all(torch.equal(again[key], t.half().float() if t.dim() == 4 else t) for key, t in net.state_dict().items())
