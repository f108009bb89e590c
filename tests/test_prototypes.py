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


def test_learned_prototypes_start_about_one_long():
    """Of whatever dimension: how far a step turns a prototype goes with its length."""
    lengths = hc.PrototypeHead(1024, 50).prototypes.norm(dim=1)
    assert (lengths - 1).abs().max() < 0.15


@pytest.mark.parametrize("fixed_etf", [False, True])
def test_prototypes_have_the_default_dtype(fixed_etf):
    """As every layer beside the head has: the losses refuse float64 features with float32 prototypes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        head, layer = hc.PrototypeHead(6, 3, fixed_etf=fixed_etf), torch.nn.Linear(4, 6)
        loss = hc.ntce_loss(head.embed(layer(torch.randn(5, 4))), head.prototypes, torch.arange(5) % 3)
    finally:
        torch.set_default_dtype(before)
    assert loss.dtype == torch.float64


def test_autocast_changes_no_prediction():
    """Off centre, as features after a bias are, all cosines are near 1: bfloat16 has three digits there."""
    prototypes = torch.randn(100, 16)
    features, prototypes = prototypes + 10, prototypes + 10
    classifier = hc.PrototypeClassifier(prototypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(features).dtype == torch.float32
        assert torch.equal(classifier.predict(features), torch.arange(100))


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


def test_sums_stay_wide_in_a_model_that_is_converted():
    means = hc.ClassMeans(2, 3).half()
    assert {name: x.dtype for name, x in means.named_buffers()} == {
        "sums": torch.float64, "counts": torch.int64, "shared_sums": torch.float64, "shared_counts": torch.int64
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_means_are_as_exact_as_their_features(dtype):
    """Unit vectors of half precision would have three digits."""
    features, labels = torch.randn(20, 3).to(dtype), torch.arange(20) % 2
    means, exact = hc.ClassMeans(2, 3), hc.ClassMeans(2, 3)
    means.update(features, labels)
    exact.update(features.double(), labels)
    torch.testing.assert_close(means.sums, exact.sums, rtol=0, atol=1e-13)


def test_ema_starts_at_the_first_mean_and_then_blends():
    means = hc.ClassMeans(2, 3, mode="ema", momentum=0.75)
    first, second = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    means.update(first, torch.tensor([0]))
    torch.testing.assert_close(means.prototypes()[0], first[0])
    means.update(second.repeat(2, 1), torch.tensor([0, 0]))  # a batch weighs the same, whatever its size
    torch.testing.assert_close(means.prototypes()[0], torch.nn.functional.normalize(0.75 * first + 0.25 * second)[0])
    assert (means.prototypes()[1] == 0).all()


def test_classifier_takes_the_nearest_prototype_whatever_its_length():
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 50.0], [-3.0, 0.0]])
    classifier = hc.PrototypeClassifier(prototypes)
    features = torch.tensor([[0.1, 0.01], [5.0, 6.0], [-1.0, 0.9]])
    assert classifier.predict(features).tolist() == [0, 1, 2]
    assert classifier(features).abs().max() <= 1 + 1e-6


def test_classifier_keeps_its_prototypes_as_a_module_does():
    """As a buffer, saved and moved; a parameter stays that parameter."""
    fixed, learned = hc.PrototypeClassifier(torch.eye(2)), hc.PrototypeHead(2, 2).prototypes
    assert torch.equal(fixed.state_dict()["prototypes"], torch.eye(2))
    assert not list(fixed.parameters())
    assert fixed.double().prototypes.dtype == torch.float64
    assert list(hc.PrototypeClassifier(learned).parameters()) == [learned]


@pytest.mark.parametrize(
    "make", [lambda w: hc.PrototypeClassifier(w.half()), lambda w: hc.PrototypeHead(w.shape[1], 3).half()]
)
def test_half_precision_takes_lengths_beyond_its_range(make):
    """The norm of these features is 67882, beyond float16; that of the first prototype's entries is too small for it."""
    w = torch.eye(3, 512) * torch.tensor([[1e-7], [1.0], [6e4]])
    x = torch.full((1, 512), 3000.0)
    x[0, 1] *= -1
    got = make(w)
    want = unit_rows(x) @ unit_rows(got.prototypes.float()).T
    torch.testing.assert_close(got(x.half()).float(), want, atol=1e-3, rtol=0)
    assert want.abs().max() > 0.04


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_label_without_a_finite_norm(bad):
    rows, odd = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, bad]])
    for name, classifier, features in (
        ("features", hc.PrototypeClassifier(rows), odd),
        ("prototypes", hc.PrototypeClassifier(odd), rows),
    ):
        with pytest.raises(ValueError, match=f"{name} must have finite norms, got {bad} in row 1"):
            classifier.predict(features)


@pytest.mark.parametrize("make", [lambda: hc.PrototypeClassifier(torch.eye(3)), lambda: hc.PrototypeHead(3, 3)])
@pytest.mark.parametrize(
    ("features", "error", "says"),
    [
        (
            torch.tensor([[3, 0, 1]]),
            TypeError,
            "features must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ([[3.0, 0.0, 1.0]], TypeError, "features must be a tensor, got list"),
        (torch.ones(3), ValueError, r"features must have shape \[N, D\], got \[3\]"),
    ],
)
def test_cosines_of_what_is_no_matrix_of_floats(make, features, error, says):
    """Rounded back to integers, the rows of length 1 would all be zero."""
    with pytest.raises(error, match=says):
        make()(features)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: m.add(torch.ones(1, 3), torch.ones(2).long()), ValueError, r"sums must have shape \[2, 3\], got \[1, 3\]"),
        (lambda m: m.add([[1.0]], torch.ones(2).long()), TypeError, "sums must be a tensor, got list"),
        (lambda m: m.add(torch.ones(2, 3), torch.ones(2)), TypeError, "counts must be an int64 tensor, got torch.float32"),
        (lambda m: m.add(torch.ones(2, 3), [1, 1]), TypeError, "counts must be an int64 tensor, got list"),
        (lambda m: m.add(torch.ones(2, 3), torch.ones(1).long()), ValueError, r"counts must have shape \[2\], got \[1\]"),
        (lambda m: m.add(torch.full((2, 3), torch.nan), torch.ones(2).long()), ValueError, "sums must have finite norms, got nan in row 0"),
        (lambda m: m.update(torch.ones(1, 3), torch.tensor([0]), ignore_index=None), TypeError, "ignore_index must be an integer, got NoneType"),
        (lambda m: hc.ClassMeans(2, 3, momentum="x"), TypeError, "momentum must be a number, got str"),
    ],
)  # fmt: skip
def test_class_means_refuse_what_would_spoil_them(call, error, says):
    means = hc.ClassMeans(2, 3)
    with pytest.raises(error, match=says):
        call(means)
    assert all((buffer == 0).all() for buffer in means.buffers())


def test_a_class_never_seen_is_not_predicted():
    means = hc.ClassMeans(3, 2)
    means.update(torch.eye(2), torch.tensor([0, 1]))
    predicted = hc.PrototypeClassifier(means.prototypes()).predict(torch.tensor([[-1.0, -0.5], [1.0, 0.2]]))
    assert predicted.tolist() == [1, 0]
