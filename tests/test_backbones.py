"""Backbones: torchvision's networks by name, networks for rows, and their second derivatives."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import train_bilevel
from auxilearn import backbones
from auxilearn.backbones import (
    BACKBONES,
    build_backbone,
    feature_width,
    find_backbone,
    register_backbone,
)
from auxilearn.data.contract import RowsShape
from auxilearn.errors import UserError
from auxilearn.hypernet import MonoJoint
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.models import Batch, TaskModel
from tests.conftest import assert_one_error_line, tiny_flags
from tests.test_other_models import (
    ALPHA,
    TERMS,
    Regression,
    Relu6Sigmoid,
    by_hand,
    levels,
    relative_error,
)

# name: (own width, a size of images that it takes)
NETWORKS = {
    "alexnet": (4096, 63),
    "convnext_tiny": (768, 32),
    "densenet121": (1024, 32),
    "efficientnet_b0": (1280, 32),
    "googlenet": (1024, 32),
    "inception_v3": (2048, 75),
    "maxvit_t": (512, 224),
    "mobilenet_v3_small": (1024, 32),
    "regnet_x_400mf": (400, 32),
    "resnet50": (2048, 32),
    "shufflenet_v2_x0_5": (1024, 32),
    "squeezenet1_1": (512, 32),
    "swin_t": (768, 32),
    "swin_v2_t": (768, 256),
    "vgg11_bn": (4096, 32),
    "vit_b_32": (768, 224),
}


def refused(name, *arguments, **options):
    with pytest.raises(UserError) as caught:
        build_backbone(name, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def meta(module):
    """The module's function on tensors without content."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    state = {name: tensor.to("meta") for name, tensor in tensors}
    return lambda *inputs: torch.func.functional_call(module, state, inputs)


# --------------------------------------------------------------------------------------------------
# torchvision's networks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_torchvision_network_is_found_by_name(name):
    width, size = NETWORKS[name]
    assert feature_width(name) == width
    network = build_backbone(name, width, image_size=size)
    assert network.training
    out = meta(network)(torch.empty(2, 3, size, size, device="meta"))
    assert out.shape == (2, width)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "swin_t"])
def test_the_features_are_what_the_classifier_sees(name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).eval()
    torch.manual_seed(0)
    ours = build_backbone(name, feature_width(name)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if name == "squeezenet1_1":  # its convolution stands before the mean over positions
            seen = theirs.features(images).relu().mean(dim=(2, 3))
            torch.testing.assert_close(ours(images), seen)
            return
        last = [part for part in theirs.modules() if isinstance(part, nn.Linear)][-1]
        torch.testing.assert_close(last(ours(images)), theirs(images))


def test_resnet18_is_drawn_as_before():
    """As torchvision draws it; after it, with another width, the linear layer."""
    torch.manual_seed(3)
    resnet = torchvision.models.resnet18(weights=None)
    linear = nn.Linear(512, 20)
    torch.manual_seed(3)
    ours = build_backbone("resnet18", 20, image_size=16)
    for part, other in ((ours[1], linear), (ours[0], resnet)):
        expected = other.state_dict()
        for name, value in part.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert isinstance(ours[2], nn.ReLU)


def test_another_width_takes_a_linear_layer_and_a_relu():
    ours = build_backbone("mobilenet_v3_small", 20).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = F.linear(ours[0](images), ours[1].weight, ours[1].bias).relu()
        torch.testing.assert_close(ours(images), expected)
    assert expected.shape == (2, 20)


@pytest.mark.parametrize(
    ("name", "size", "parts"),
    [
        ("vit_b_32", 64, ["takes images of 224 pixels", "Expected 224", "give --image_size 224"]),
        ("maxvit_t", 256, ["takes images of 224 pixels", "give --image_size 224"]),
        ("inception_v3", 32, ["at least 75 pixels", "give --image_size 75"]),
        ("swin_v2_t", 224, ["a multiple of 256 pixels", "give --image_size 256"]),
        ("alexnet", 32, ["at least 63 pixels", "give --image_size 63"]),
    ],
)
def test_images_of_a_wrong_size_are_refused(name, size, parts):
    message = refused(name, feature_width(name), image_size=size)
    assert message.startswith(f"--image_size {size}: {name}")
    assert len(message) < 300
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", ["densenet121", "inception_v3", "googlenet", "mobilenet_v3_small"])
def test_the_smallest_size_on_which_one_image_can_be_trained(name):
    smallest = find_backbone(name).smallest
    network = meta(build_backbone(name, feature_width(name)))
    network(torch.empty(1, 3, smallest, smallest, device="meta"))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.empty(1, 3, smallest - 1, smallest - 1, device="meta"))


def test_images_are_normalised_as_the_weights_expect():
    """EfficientNetV2-L's were trained on pixels in -1..1. Inception's rescale images themselves."""
    images = torch.rand(2, 3, 4, 4)
    mean, std = (
        torch.tensor(v).reshape(3, 1, 1) for v in (backbones.IMAGENET_MEAN, backbones.IMAGENET_STD)
    )
    (found,) = backbones._renormalise((0.5,) * 3, (0.5,) * 3, None, ((images - mean) / std,))
    torch.testing.assert_close(found, 2 * images - 1)
    for name in backbones.list_models(module=torchvision.models):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        usual = tuple(preset.mean) == backbones.IMAGENET_MEAN
        assert usual == (name != "efficientnet_v2_l"), name
    assert build_backbone("inception_v3", 2048).transform_input


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet19", ["did you mean", "resnet18"]),
        ("ViT_B_16", ["did you mean vit_b_16"]),
        ("effnet_b0", ["did you mean", "efficientnet_b0"]),
        ("zzz", ["choose from convnet, mlp, autoint", "resnet18"]),
    ],
)
def test_an_unknown_name_has_near_misses(name, parts):
    message = refused(name, 8)
    assert message.startswith(f"--backbone {name} is unknown: ")
    assert len(message) < 200
    for part in parts:
        assert part in message


def test_names_are_taken_once():
    for name in ("convnet", "mlp", "resnet50"):
        with pytest.raises(ValueError, match=f"a backbone '{name}' already"):
            register_backbone(name)


def test_help_lists_no_networks(command):
    code, out, _ = command(train_bilevel.main, "--help")
    assert code == 0
    assert "any classification network of torchvision" in " ".join(out.split())
    assert out.count("efficientnet") == 0


# --------------------------------------------------------------------------------------------------
# Their weights
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """``published(name, rename)``: torchvision "downloads" a network of its own, altered."""

    def publish(name, rename=lambda key: key):
        torch.manual_seed(1)
        options = {"init_weights": False} if name == "googlenet" else {}
        state = torchvision.models.get_model(name, weights=None, **options).state_dict()
        file = copy.copy(state)
        for key in state:
            file[rename(key)] = file.pop(key)
        kind = torchvision.models.get_model_weights(name)
        monkeypatch.setattr(kind, "get_state_dict", lambda self, **options: copy.copy(file))
        return state

    return publish


def old_name(key):
    """Of DenseNet's published files: ``denselayer1.norm.1.weight``."""
    parts = key.split(".")
    return (
        ".".join(
            f"{part[:4]}.{part[4]}" if part in ("norm1", "norm2", "conv1", "conv2") else part
            for part in parts
        )
        if "denselayer" in key
        else key
    )


@pytest.mark.parametrize("width", [None, 7])
@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("mobilenet_v3_small", str),
        ("densenet121", old_name),
        ("mnasnet0_5", str),  # asks for the version of its file
        ("googlenet", str),  # published with auxiliary classifiers
        ("shufflenet_v2_x0_5", str),
    ],
)
def test_default_weights_are_loaded_without_the_classifier(
    name, rename, width, published, tmp_path
):
    state = published(name, rename)
    own = feature_width(name)
    torch.manual_seed(2)
    network = build_backbone(name, width or own, pretrained=True)
    loaded = (network if width is None else network[0]).state_dict()
    for key, value in loaded.items():
        assert torch.equal(value, state[key]), key
    assert len(loaded) < len(state)
    # and from files, of torchvision and of this project
    torch.save(state, tmp_path / "theirs.pth")
    model = TaskModel(network, width or own, [3])
    torch.save({"model": model.state_dict()}, tmp_path / "best.pt")
    for file in ("theirs.pth", "best.pt"):
        again = build_backbone(name, width or own, weights_path=str(tmp_path / file))
        again = (again if width is None else again[0]).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in again.items())


def test_a_failed_download_names_file_and_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("vit_b_32").DEFAULT

    def fail(self, **options):
        raise OSError("no network")

    monkeypatch.setattr(type(weights), "get_state_dict", fail)
    message = refused("vit_b_32", 768, pretrained=True)
    for part in (weights.url, str(tmp_path), "--backbone_pretrain 0", "no network"):
        assert part in message


@pytest.mark.parametrize("name", ["convnet", "mlp"])
def test_there_are_no_weights_for_the_others(name):
    columns = RowsShape(1, ()) if name == "mlp" else None
    assert "no ImageNet weights" in refused(name, 8, pretrained=True, rows=columns)


def test_another_network_is_trained_on_the_command_line(tiny_split, tmp_path, command):
    flags = {"split_dir": tiny_split, "record_dir": tmp_path, "method": "joint", "max_steps": 4}
    flags |= {"image_size": 32, "backbone_pretrain": 0, "feature_dim": 8, "dev_batch_size": 2}
    run = tiny_flags(**flags, backbone="mobilenet_v3_small")
    code, out, err = command(train_bilevel.main, *run)
    assert code == 0, err
    assert "test accuracy: " in out
    run = tiny_flags(**flags, backbone="vit_b_32")
    code, _, err = command(train_bilevel.main, *run)
    assert code == 2
    assert_one_error_line(err, "--image_size 32", "vit_b_32", "--image_size 224")


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------

COLUMNS = RowsShape(2, (3, 5))


def rows(size, columns=COLUMNS):
    codes = [torch.randint(count, (size,)) for count in columns.categories]
    empty = torch.zeros(size, 0, dtype=torch.int64)
    return torch.randn(size, columns.numbers), torch.stack(codes, dim=1) if codes else empty


@pytest.mark.parametrize("columns", [COLUMNS, RowsShape(3, ()), RowsShape(0, (4,))])
@pytest.mark.parametrize("name", ["mlp", "autoint"])
def test_rows_have_features(name, columns):
    network = build_backbone(name, 6, rows=columns)
    assert network(*rows(4, columns)).shape == (4, 6)
    assert network(*rows(1, columns)).shape == (1, 6)


def test_fields_are_rows_of_tables_and_multiples_of_a_vector():
    fields = build_backbone("mlp", 6, rows=COLUMNS).fields
    numbers, codes = torch.tensor([[2.0, 0.0]]), torch.tensor([[2, 4]])
    found = fields(numbers, codes)
    one, other = (table.weight for table in fields.tables)
    expected = [2 * fields.directions[0], 0 * fields.directions[1], one[2], other[4]]
    torch.testing.assert_close(found, torch.stack(expected)[None])
    with pytest.raises(IndexError):  # never a row of another column's table
        fields(numbers, torch.tensor([[3, 0]]))


def test_an_interacting_layer_is_that_of_the_paper(float64):
    """Equations 5 to 8 of Song et al. 2019, a field and a head at a time."""
    layer = backbones.InteractingLayer(4, heads=2, width=3)
    e = torch.randn(5, 4)  # fields
    query, key, value = (
        [part.weight.reshape(2, 3, 4)[h] for h in range(2)]
        for part in (layer.query, layer.key, layer.value)
    )
    expected = []
    for m in range(5):
        of_heads = []
        for h in range(2):
            scores = torch.stack([(query[h] @ e[m]) @ (key[h] @ e[k]) for k in range(5)])
            alpha = scores.exp() / scores.exp().sum()
            of_heads.append(sum(alpha[k] * (value[h] @ e[k]) for k in range(5)))
        expected.append((torch.cat(of_heads) + layer.residual.weight @ e[m]).clamp(min=0))
    torch.testing.assert_close(layer(e[None])[0], torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["mlp", "autoint"])
def test_a_task_model_takes_rows(name, bf16):
    torch.manual_seed(0)
    model = TaskModel(build_backbone(name, 6, rows=COLUMNS), 6, [3, 2], bf16=bf16)
    inputs, labels = rows(4), torch.tensor([[0, 1], [1, 0], [2, 1], [0, 0]])
    outputs = model(Batch(inputs, labels, torch.arange(4)))
    assert outputs.losses.shape == (4, 2)
    assert outputs.features.dtype == torch.float32
    expected = model.backbone(*inputs)
    near = {"rtol": 0.05, "atol": 0.05} if bf16 else {}
    torch.testing.assert_close(outputs.features, expected, **near)
    assert model.predict(inputs).shape == (4, 3)


def test_images_and_rows_are_told_apart():
    assert "takes rows of columns, but the samples are images" in refused("mlp", 8)
    message = refused("resnet50", 2048, rows=COLUMNS)
    assert "takes images, but the samples are rows of columns: choose from mlp, autoint" in message
    assert "at least one column" in refused("autoint", 8, rows=RowsShape(0, ()))


@pytest.mark.parametrize("name", ["mlp", "autoint"])
def test_rows_are_learned(name):
    """A class that neither column shows alone: XOR of a category and of a number's sign."""
    torch.manual_seed(0)
    numbers, codes = rows(256, RowsShape(1, (2,)))
    labels = (codes[:, 0] ^ (numbers[:, 0] > 0))[:, None]
    model = TaskModel(build_backbone(name, 16, rows=RowsShape(1, (2,))), 16, [2])
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    batch = Batch((numbers, codes), labels, torch.arange(256))
    for _ in range(150):
        optimiser.zero_grad()
        model(batch).losses.mean().backward()
        optimiser.step()
    right = model.predict((numbers, codes)).argmax(dim=1) == labels[:, 0]
    assert right.float().mean() > 0.95


# --------------------------------------------------------------------------------------------------
# Second derivatives
# --------------------------------------------------------------------------------------------------

models = torchvision.models
block = partial(InvertedResidualConfig, width_mult=1.0)
SMALL = {  # of torchvision's families, the smallest that have their operators
    "convnext": lambda: models.ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], 0.2),
    "densenet": lambda: models.DenseNet(4, (1, 1), 8, bn_size=2, drop_rate=0.2),
    "efficientnet": lambda: models.EfficientNet(
        [MBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 12, 1)], 0.2, 0.2, last_channel=16
    ),
    "mobilenet_v3": lambda: models.MobileNetV3(
        [block(8, 3, 8, 8, True, "RE", 2, 1), block(8, 3, 16, 8, True, "HS", 1, 1)], 12
    ),
    "regnet": lambda: models.RegNet(
        models.regnet.BlockParams([1, 1], [8, 12], [4, 4], [1.0, 1.0], [2, 2], se_ratio=0.25),
        stem_width=8,
    ),
    "shufflenet": lambda: models.ShuffleNetV2([1, 1, 1], [8, 8, 12, 16, 12]),
    "squeezenet": lambda: nn.Sequential(
        models.squeezenet.Fire(3, 4, 6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2)
    ),
    "swin": lambda: models.SwinTransformer([2, 2], 8, [2, 1], [2, 2], [2, 2]),
    "swin_v2": lambda: models.SwinTransformer(
        *([2, 2], 8, [2, 1], [2, 2], [2, 2]),
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    ),
    "maxvit": lambda: models.MaxVit((16, 16), 8, 2, [8], [1], 4, 0.2),
    "vit": lambda: models.VisionTransformer(16, 8, 1, 2, 8, 16, dropout=0.1),
}


def without_classifier(name):
    network = SMALL[name]()
    backbones._adapt_inputs(network, (0.5,) * 3, (0.5,) * 3)
    return Regression(network, backbones._remove_classifier(network)), (3, 16, 16)


def twice_differentiable(model):
    """A copy without the activation whose second derivative PyTorch lacks."""
    twin = copy.deepcopy(model)
    for part in list(twin.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(part, name, Relu6Sigmoid())
    return twin


class OfRows(Regression):
    def features(self, x):
        return self.body(*x)


def of_rows(name):
    sizes = {"mlp": {"hidden": 8}, "autoint": {"layers": 2, "head_width": 3}}[name]
    return OfRows(BACKBONES[name].build(8, COLUMNS, width=4, **sizes), 8), None


@pytest.mark.parametrize("how", ["neumann", "identity", "preconditioned"])
@pytest.mark.parametrize("name", ["mlp", "autoint", *SMALL])
def test_the_hypergradient_is_that_of_double_backward(name, how, float64):
    model, shape = without_classifier(name) if name in SMALL else of_rows(name)
    scheduler = MonoJoint(0, 3, model.heads.in_features)
    for parameter in scheduler.parameters():
        nn.init.normal_(parameter, std=0.5)

    def batch(size):
        return torch.randn(size, *shape) if shape else rows(size), torch.randn(size, 3)

    train, dev = [batch(7)], [batch(5)]
    scale = [torch.ones_like(p) for p in model.parameters()]
    solver = identity() if how == "identity" else neumann(ALPHA, TERMS)
    if how == "preconditioned":
        scale = [1 + torch.rand_like(p) for p in model.parameters()]
        solver = preconditioned(solver, lambda: scale)
    torch.manual_seed(1)
    expected = by_hand(
        twice_differentiable(model), scheduler, train, dev, 0 if how == "identity" else TERMS, scale
    )
    torch.manual_seed(1)
    found, _, _ = levels(model, scheduler, solver).hypergradient(train, dev)
    assert sum(t.norm() for t in expected) > 0
    assert relative_error(found, expected) < 1e-8


# --------------------------------------------------------------------------------------------------
# bfloat16
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnext_tiny", "mobilenet_v3_small", "swin_v2_t", "vit_b_32"])
def test_networks_compute_in_bfloat16(name):
    width, size = NETWORKS[name]
    model = TaskModel(build_backbone(name, width), width, [3], bf16=True)
    features = meta(model)
    assert model.cast
    images = torch.empty(2, 3, size, size, device="meta", dtype=torch.uint8)
    labels = torch.empty(2, 1, device="meta", dtype=torch.int64)
    outputs = features(Batch(images, labels, labels[:, 0]))
    assert outputs.features.shape == (2, width)
    assert outputs.features.dtype == torch.float32
