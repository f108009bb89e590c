"""Backbones and heads of the training driver."""

import sys

import pytest
import torch
import torch.nn.functional as F

from hypercontrast.config import UsageError
from hypercontrast.models import LinearHead, Network, ProjectionHead, build_model, check_model
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


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_usual_width_is_torchvisions_network_bit_for_bit(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(3)
    ours, dim = build_model(name, 3, 224)
    torch.manual_seed(3)
    theirs = getattr(models, name)()
    assert dim == theirs.fc.in_features
    theirs.fc = torch.nn.Identity()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(x.equal(theirs.state_dict()[key]) for key, x in ours.state_dict().items())
    images = torch.randn(2, 3, 64, 64)
    assert ours.eval()(images).equal(theirs.eval()(images))


@pytest.mark.parametrize(("name", "channels", "size", "dim"), [("resnet18", 1, 28, 128), ("resnet50", 3, 96, 512)])
def test_a_quarter_of_the_width_is_a_sixteenth_of_the_weights(name, channels, size, dim):
    pytest.importorskip("torchvision")
    usual, _ = build_model(name, channels, size)
    narrow, feature_dim = build_model(name, channels, size, width=16)
    features = narrow(torch.randn(2, channels, size, size))
    assert features.shape == (2, feature_dim) == (2, dim)
    assert features.min() >= 0
    weights = [sum(p.numel() for p in model.parameters()) for model in (usual, narrow)]
    assert weights[0] / weights[1] == pytest.approx(16, rel=0.02)
    for (key, wide), thin in zip(usual.state_dict().items(), narrow.state_dict().values(), strict=True):
        assert wide.shape[:1] == tuple(4 * n for n in thin.shape[:1]), key


@pytest.mark.parametrize(("name", "dim", "millions"), [("vit_b_16", 768, 85.80), ("vit_l_16", 1024, 303.30)])
def test_vision_transformers_have_the_usual_sizes(name, dim, millions):
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model, feature_dim = build_model(name, 3, 224)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, dim)
    assert feature_dim == dim
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_vision_transformer_gives_its_normed_class_token():
    """Of small grey pictures: signed, and with the mean 0 and variance 1 of a fresh layer norm."""
    pytest.importorskip("torchvision")
    model, dim = build_model("vit_b_16", 1, 32)
    features = model.eval()(torch.randn(2, 1, 32, 32))
    assert features.shape == (2, dim)
    assert features.min() < 0
    torch.testing.assert_close(features.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.var(1, unbiased=False), torch.ones(2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_16"])
def test_a_vision_transformer_takes_whole_patches(name):
    pytest.importorskip("torchvision")
    with pytest.raises(UsageError, match=f"image_size must be a multiple of 16 with model {name}, got 28"):
        build_model(name, 1, 28)


@pytest.mark.parametrize(("name", "dim"), [("resnet10t", 512), ("mobilenetv3_small_050", 1024), ("test_vit", 64)])
def test_timm_networks_give_pooled_features(name, dim):
    """One whose features are of another size than timm's num_features says, and one that must be told the size."""
    pytest.importorskip("timm")
    model, feature_dim = build_model(f"timm:{name}", 1, 48)
    assert model.training
    assert model(torch.randn(3, 1, 48, 48)).shape == (3, feature_dim) == (3, dim)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet81", r"model must be timm:NAME of a network that timm lists, got 'timm:resnet81' \(did you mean .*"),
        ("", r"got 'timm:'$"),
        ("hf-hub:timm/resnet18.a1_in1k", "got 'timm:hf-hub:timm/resnet18.a1_in1k'"),
        ("resnet18.a1_in1k", r"got 'timm:resnet18.a1_in1k' \(did you mean .*resnet18"),
    ],
)
def test_unknown_timm_networks(name, says):
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=says):
        check_model(f"timm:{name}")


def test_a_timm_network_for_other_pictures():
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"image_size must suit model timm:crossvit_tiny_240, got 32 \("):
        build_model("timm:crossvit_tiny_240", 3, 32)


def test_the_convnet_halves_its_pictures_twice():
    backbone, dim = build_model("convnet", 1, 4)
    assert backbone(torch.zeros(2, 1, 4, 4)).shape == (2, dim)
    with pytest.raises(UsageError, match="image_size must be at least 4 with model convnet, got 3"):
        build_model("convnet", 1, 3)


def test_models_that_are_not_here():
    with pytest.raises(
        UsageError, match=r"model must be one of convnet, resnet18, .*, vit_l_16 or timm:NAME, got 'vgg'"
    ):
        build_model("vgg", 3, 32)
    with pytest.raises(UsageError, match="width must be 64 with model vit_b_16, which comes in one width, got 32"):
        check_model("vit_b_16", width=32)


@pytest.mark.parametrize(("name", "package"), [("timm:resnet18", "timm"), ("vit_b_16", "torchvision")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"model {name} needs {package}: pip install "):
        check_model(name)


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
