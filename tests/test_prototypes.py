"""Head, class means and classifier."""

import pytest
import torch

import hypercontrast as hc
from hypercontrast.reference import unit_rows


@pytest.mark.parametrize(("k", "dim"), [(1, 3), (2, 1), (5, 4), (10, 64)])
def test_simplex_etf(k, dim):
    frame = hc.simplex_etf(k, dim)
    want = torch.eye(k).double() * (1 + 1 / max(k - 1, 1)) - (1 / (k - 1) if k > 1 else 0)
    torch.testing.assert_close(frame @ frame.T, want if k > 1 else torch.ones(1, 1).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("neck", [None, "linear", "bn"])
def test_head_gives_cosines(neck):
    head = hc.PrototypeHead(6, 3, neck=neck).eval()
    x = torch.randn(8, 6)
    want = torch.nn.functional.normalize(head.embed(x)) @ torch.nn.functional.normalize(head.prototypes).T
    torch.testing.assert_close(head(x), want)
    assert "prototypes" in dict(head.named_parameters())


def test_fixed_etf_is_saved_and_not_learned():
    head = hc.PrototypeHead(6, 3, fixed_etf=True)
    assert not list(head.parameters())
    assert "prototypes" in head.state_dict()
    cosines = unit_rows(head.prototypes) @ unit_rows(head.prototypes).T
    torch.testing.assert_close(cosines, torch.eye(3) * 1.5 - 0.5, atol=1e-6, rtol=0)


def test_class_means_are_means_of_unit_features():
    features, labels = torch.randn(40, 5), torch.randint(0, 3, (40,))
    means = hc.ClassMeans(4, 5)
    for start in range(0, 40, 7):
        means.update(features[start : start + 7], labels[start : start + 7])
    u = torch.nn.functional.normalize(features.double())
    want = torch.stack([torch.nn.functional.normalize(u[labels == c].mean(0), dim=0) for c in range(3)])
    torch.testing.assert_close(means.prototypes()[:3].double(), want, atol=1e-6, rtol=0)
    assert (means.prototypes()[3] == 0).all(), "a class never seen has no direction"
    assert means.counts.tolist() == [*torch.bincount(labels, minlength=3).tolist(), 0]
    means.reset()
    assert means.counts.sum() == 0
    assert (means.sums == 0).all()


def test_ema_starts_at_the_first_mean_and_then_blends():
    means = hc.ClassMeans(2, 3, mode="ema", momentum=0.75)
    first, second = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    means.update(first, torch.tensor([0]))
    torch.testing.assert_close(means.prototypes()[0], first[0])
    means.update(second, torch.tensor([0]))
    torch.testing.assert_close(means.prototypes()[0], torch.nn.functional.normalize(0.75 * first + 0.25 * second)[0])
    assert (means.prototypes()[1] == 0).all()


def test_classifier_takes_the_nearest_prototype_whatever_its_length():
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 50.0], [-3.0, 0.0]])
    classifier = hc.PrototypeClassifier(prototypes)
    features = torch.tensor([[0.1, 0.01], [5.0, 6.0], [-1.0, 0.9]])
    assert classifier.predict(features).tolist() == [0, 1, 2]
    assert classifier(features).abs().max() <= 1 + 1e-6
