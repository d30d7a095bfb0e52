"""The task model: heads and their losses, backbones, and the weights they start from."""

import http.client
import os
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

from auxilearn.backbones import build_backbone
from auxilearn.errors import UserError
from auxilearn.models import Batch, TaskHeads, TaskModel

# --------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------

MIXTURES = [
    [5],
    [2],
    [5, 2, 2, 2],
    [2, 5, 3],
    [3, 2, 7, 2, 3, 11, 2],
    [2, 2, 2],
    [4, 1, 2],
    [200] + [2] * 312,
]


def labels_of(class_counts, samples):
    return torch.stack([torch.randint(count, (samples,)) for count in class_counts], dim=1)


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("class_counts", MIXTURES, ids=lambda counts: f"{len(counts)} tasks")
def test_losses_are_those_of_one_head_after_the_other(class_counts, samples):
    torch.manual_seed(0)
    heads = TaskHeads(7, class_counts).double()
    features = torch.randn(samples, 7, dtype=torch.float64, requires_grad=True)
    labels = labels_of(class_counts, samples)
    losses = heads(features, labels)
    expected, start = [], 0
    for task, count in enumerate(class_counts):
        rows = slice(start, start + count)
        logits = features @ heads.linear.weight[rows].T + heads.linear.bias[rows]
        expected.append(F.cross_entropy(logits, labels[:, task], reduction="none"))
        start += count
    assert start == heads.linear.out_features
    expected = torch.stack(expected, dim=1)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)

    inputs = [features, heads.linear.weight, heads.linear.bias]
    weights = torch.rand_like(losses)
    ours = torch.autograd.grad((weights * losses).sum(), inputs)
    plain = torch.autograd.grad((weights * expected).sum(), inputs)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("class_counts", MIXTURES[:6])
def test_logits_of_the_target_are_its_columns(class_counts):
    heads = TaskHeads(7, class_counts)
    features = torch.randn(3, 7)
    expected = heads.linear(features)[:, : class_counts[0]]
    torch.testing.assert_close(heads.target_logits(features), expected)


def test_images_are_normalised_as_imagenets_are():
    backbone = torch.nn.Flatten()
    model = TaskModel(backbone, 12, [3])
    images = torch.randint(256, (2, 3, 2, 2), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(
        images / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(model.features(images), expected.flatten(1))


def test_the_model_hands_on_what_a_scheduler_may_need():
    model = TaskModel(build_backbone("convnet", 5), 5, [3, 2])
    mask = torch.tensor([[True, True], [False, True]])
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([[2, 1], [0, 0]]), torch.tensor([7, 9]), mask)
    outputs = model.eval()(batch)
    assert outputs.losses.shape == (2, 2)
    assert outputs.sample_id.tolist() == [7, 9]
    assert torch.equal(outputs.mask, mask)
    assert torch.equal(outputs.labels, batch.labels)
    torch.testing.assert_close(outputs.features, model.features(images))
    torch.testing.assert_close(model.predict(images), model.heads.target_logits(outputs.features))


# --------------------------------------------------------------------------------------------------
# Backbones
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), [("convnet", 6), ("resnet18", 512), ("resnet18", 20)])
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 3, 33, 40)])
def test_features_are_in_dim_wide(name, width, shape):
    backbone = build_backbone(name, width).eval()
    with torch.no_grad():
        assert backbone(torch.randn(shape)).shape == (shape[0], width)


def test_resnet18_is_torchvisions_without_its_classifier():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    ours = build_backbone("resnet18", 512).eval()
    assert not any(name.startswith("fc.") for name in ours.state_dict())
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs.fc(ours(images)), theirs(images))


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_weights_are_drawn_from_the_global_generator(name):
    def first_weights(seed):
        torch.manual_seed(seed)
        return next(build_backbone(name, 8).parameters())

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


# --------------------------------------------------------------------------------------------------
# Weights from a file
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet_state():
    """What a torchvision file holds: classifier included, other values than any new network."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18(weights=None).state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, value in state.items():
        if name.endswith("running_mean"):
            state[name] = torch.rand(value.shape, generator=generator)
    return state


def save(content, path):
    torch.save(content, path)
    return str(path)


def core(backbone):
    """The ResNet inside a backbone with a narrowing layer."""
    return backbone[0] if isinstance(backbone, torch.nn.Sequential) else backbone


@pytest.mark.parametrize("width", [512, 20])
def test_a_torchvision_file_is_loaded(width, resnet_state, tmp_path):
    path = save(resnet_state, tmp_path / "resnet18.pth")
    state = core(build_backbone("resnet18", width, weights_path=path)).state_dict()
    for name, value in state.items():
        assert torch.equal(value, resnet_state[name]), name


@pytest.mark.parametrize("width", [512, 20])
def test_the_published_file_counts_no_batches(width, resnet_state, tmp_path):
    """resnet18's ImageNet weights were saved before batch norm had ``num_batches_tracked``."""
    published = {k: v for k, v in resnet_state.items() if "num_batches_tracked" not in k}
    path = save(published, tmp_path / "resnet18-f37072fd.pth")
    state = core(build_backbone("resnet18", width, weights_path=path)).state_dict()
    for name, value in published.items():
        if not name.startswith("fc."):
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(("name", "width"), [("convnet", 8), ("resnet18", 512), ("resnet18", 20)])
def test_a_checkpoint_of_this_project_is_loaded(name, width, tmp_path):
    torch.manual_seed(0)
    model = TaskModel(build_backbone(name, width), width, [3, 2])
    checkpoint = {"model": model.state_dict(), "scheduler": {}, "config": {"seed": 5}, "epoch": 1}
    path = save(checkpoint, tmp_path / "best.pt")
    loaded = build_backbone(name, width, weights_path=path).state_dict()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, loaded[key]), key


def test_the_resnet_of_a_checkpoint_fits_another_width(tmp_path):
    model = TaskModel(build_backbone("resnet18", 512), 512, [3])
    path = save({"model": model.state_dict()}, tmp_path / "best.pt")
    loaded = core(build_backbone("resnet18", 20, weights_path=path)).state_dict()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, loaded[key]), key


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refused(path, name="resnet18", width=512):
    """The message with which a file of weights is refused: one line that names it."""
    with pytest.raises(UserError) as caught:
        build_backbone(name, width, weights_path=str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_would_run_code_is_refused(writer, protocol, tmp_path):
    path, mark = tmp_path / "weights.pt", tmp_path / "it ran"
    content = {"conv1.weight": torch.zeros(1), "surprise": Bomb(mark)}
    if writer == "torch":
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content, protocol))
    message = refused(path)
    assert not mark.exists()
    # Nobody is to be talked into loading it another way.
    assert "weights_only" not in message


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 no archive", b"\x80\x02}"])
def test_garbage_is_refused(content, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    message = refused(path)
    assert "()" not in message  # an empty reason
    assert "weights_only" not in message


def test_a_truncated_file_is_refused(resnet_state, tmp_path):
    path = Path(save(resnet_state, tmp_path / "weights.pt"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "nowhere.pt")
    refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": {}},
        {"model": {"heads.linear.weight": torch.zeros(2)}},
        {"state_dict": {"conv1.weight": torch.zeros(2)}},
        [torch.zeros(2)],
        torch.zeros(2),
        {1: torch.zeros(2)},
        {"model": {1: torch.zeros(2)}},
    ],
    ids=["empty", "no weights", "no backbone", "nested", "list", "tensor", "numbers", "numbers 2"],
)
def test_a_file_without_these_weights_is_refused(content, tmp_path):
    refused(save(content, tmp_path / "weights.pt"))


@pytest.mark.parametrize("value", ["text", None, 3.0, [1]])
def test_a_weight_that_is_no_tensor_is_refused(value, resnet_state, tmp_path):
    refused(save({**resnet_state, "conv1.weight": value}, tmp_path / "weights.pt"))


def test_weights_of_another_architecture_are_refused(resnet_state, tmp_path):
    resnet34 = torchvision.models.resnet34(weights=None).state_dict()
    message = refused(save(resnet34, tmp_path / "resnet34.pth"))
    assert "--backbone resnet18" in message
    assert "layer1.2.conv1.weight" in message
    assert len(message) < 500
    path = save(resnet_state, tmp_path / "resnet18.pth")
    assert "--backbone convnet" in refused(path, "convnet", 8)
    convnet = TaskModel(build_backbone("convnet", 8), 8, [3])
    path = save({"model": convnet.state_dict()}, tmp_path / "best.pt")
    assert "--backbone resnet18" in refused(path)
    message = refused(path, "convnet", 9)
    assert "[8, " in message
    assert "[9, " in message


# --------------------------------------------------------------------------------------------------
# ImageNet weights
# --------------------------------------------------------------------------------------------------

WEIGHTS = torchvision.models.ResNet18_Weights


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """PyTorch's download folder, empty; no network."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    return tmp_path / "torch home" / "hub" / "checkpoints"


def download_refused():
    with pytest.raises(UserError) as caught:
        build_backbone("resnet18", 512, pretrained=True)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_a_network_the_way_out_is_named(torch_home):
    message = download_refused()
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert str(torch_home) in message
    assert "--backbone_weights" in message
    assert "--backbone_pretrain 0" in message


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        urllib.error.HTTPError("http://x", 403, "Forbidden", None, None),
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
        http.client.IncompleteRead(b"abc"),
        http.client.RemoteDisconnected("closed"),
        RuntimeError("invalid hash value"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_however_the_download_fails_the_url_is_named(error, torch_home, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(WEIGHTS, "get_state_dict", fail)
    assert WEIGHTS.IMAGENET1K_V1.url in download_refused()


@pytest.mark.parametrize("content", [b"", b"<html>blocked by the proxy</html>"])
def test_a_broken_file_in_the_download_folder_is_named(content, torch_home):
    torch_home.mkdir(parents=True)
    (torch_home / "resnet18-f37072fd.pth").write_bytes(content)
    assert str(torch_home) in download_refused()


@pytest.mark.parametrize("width", [512, 20])
def test_weights_put_into_the_download_folder_by_hand_are_used(width, resnet_state, torch_home):
    torch_home.mkdir(parents=True)
    published = {k: v for k, v in resnet_state.items() if "num_batches_tracked" not in k}
    torch.save(published, torch_home / "resnet18-f37072fd.pth")
    state = core(build_backbone("resnet18", width, pretrained=True)).state_dict()
    for name, value in published.items():
        if not name.startswith("fc."):
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_in_the_download_folder_is_not_executed(zipped, torch_home, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch_home.mkdir(parents=True)
    path = torch_home / "resnet18-f37072fd.pth"
    torch.save({"conv1.weight": Evil()}, path, _use_new_zipfile_serialization=zipped)
    assert str(torch_home) in download_refused()
    assert not (tmp_path / "executed").exists()


def test_a_backbone_of_another_width_is_refused():
    model = TaskModel(build_backbone("convnet", 8), feature_dim=16, class_counts=[3, 2])
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"--feature_dim 16 columns, not \(4, 8\)"):
        model.predict(images)
