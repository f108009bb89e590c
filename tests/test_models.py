"""Backbones and heads of the training driver."""

import pytest
import torch
import torch.nn.functional as F

from hypercontrast.config import UsageError
from hypercontrast.models import LinearHead, Network, ProjectionHead, build_model
from hypercontrast.prototypes import PrototypeHead


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 64)])
def test_convnet_gives_non_negative_features(channels, size):
    model, dim = build_model("convnet", channels, size)
    features = model(torch.randn(4, channels, size, size))
    assert features.shape == (4, dim)
    assert features.min() >= 0
    assert features.max() > 0


@pytest.mark.parametrize(("name", "dim", "millions"), [("resnet18", 512, 11.17), ("resnet50", 2048, 23.5)])
def test_resnets_have_the_usual_sizes(name, dim, millions):
    pytest.importorskip("torchvision")
    model, feature_dim = build_model(name, 3, 32)
    assert feature_dim == dim
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_resnet_stems():
    pytest.importorskip("torchvision")
    small, _ = build_model("resnet18", 3, 32)
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, torch.nn.Identity)
    large, _ = build_model("resnet18", 3, 224)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, torch.nn.MaxPool2d)
    grey, dim = build_model("resnet18", 1, 28)
    assert grey(torch.randn(2, 1, 28, 28)).shape == (2, dim)


def test_unknown_model():
    with pytest.raises(UsageError, match=r"model must be one of convnet, resnet18, .*, got 'vgg'"):
        build_model("vgg", 3, 32)


def test_linear_head_is_nn_linear():
    torch.manual_seed(3)
    head = LinearHead(16, 5)
    linear = torch.nn.Linear(16, 5)
    assert head.prototypes.abs().max() <= 0.25
    assert head.prototypes.std().item() == pytest.approx(linear.weight.std().item(), rel=0.2)
    linear.load_state_dict({"weight": head.prototypes, "bias": head.bias})
    x = torch.randn(7, 16)
    torch.testing.assert_close(head(x), linear(x))


def test_scores_are_logits_or_cosines():
    backbone, dim = build_model("convnet", 1, 28)
    images = torch.randn(6, 1, 28, 28)
    linear = Network(backbone, LinearHead(dim, 4, "bn")).eval()
    features = linear(images)
    torch.testing.assert_close(linear.scores(features), linear.head(backbone(images)))

    cosine = Network(backbone, PrototypeHead(dim, 4)).eval()
    features = cosine(images)
    expected = F.normalize(features) @ F.normalize(cosine.head.prototypes).T
    torch.testing.assert_close(cosine.scores(features), expected)


@pytest.mark.parametrize(
    ("kind", "layers", "out"), [("mlp", [(20, 20), (20, 128)], 128), ("linear", [(20, 128)], 128), ("none", [], 20)]
)
def test_projection_head(kind, layers, out):
    head = ProjectionHead(20, 3, kind)
    found = [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, torch.nn.Linear)]
    assert found == layers
    x = torch.randn(5, 20)
    assert head.embed(x).shape == (5, out)
    assert head.prototypes.shape == (3, out)
    assert not isinstance(head.prototypes, torch.nn.Parameter)
    head.prototypes.copy_(head.embed(x)[[4, 1, 0]])
    assert Network(torch.nn.Identity(), head).scores(head.embed(x)).argmax(1)[[4, 1, 0]].tolist() == [0, 1, 2]


def test_unknown_projection():
    with pytest.raises(ValueError, match="kind must be 'mlp', 'linear' or 'none', got 'conv'"):
        ProjectionHead(8, 2, "conv")
