"""SupCon's definitions in other packages and papers, and how `hc.supcon_loss` gives each: loss and gradient, float64.

Where a package is installed it is compared itself; other definitions are stated here anew, one anchor at a time.
"""

import pytest
import torch
import torch.nn.functional as F

import hypercontrast as hc

N, D, K = 24, 7, 5
TAU, BASE = 0.2, 0.07
BACKENDS = ["reference", "blockwise"]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def make_features(*shape):
    g = torch.Generator().manual_seed(11)
    return torch.randn(*shape, D, generator=g, dtype=torch.float64).requires_grad_()


def make_labels(n, classes=K):
    """Every class at least twice."""
    return torch.arange(n).roll(3) % classes


def with_singletons(n):
    labels = make_labels(n)
    labels[[2, 7]] = torch.tensor([K, K + 1])
    return labels


def assert_same(ours, theirs, *inputs):
    """Loss and gradients within float64's rounding."""
    for got, want in zip(
        (ours, *torch.autograd.grad(ours, inputs)), (theirs, *torch.autograd.grad(theirs, inputs)), strict=True
    ):
        assert (got - want).norm() <= 1e-12 * want.norm().clamp(min=1)


def per_anchor(anchors, columns, is_column, is_positive, variant="out"):
    """-(1/P) Σ_p log softmax_p ("out") or -log (1/P) Σ_p softmax_p ("in") of each anchor, zero without positives."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(columns, dim=1).T / TAU
    losses = []
    for s, among, positive in zip(logits, is_column, is_positive, strict=True):
        share = s[positive].exp() / s[among].exp().sum()
        loss = -share.log().mean() if variant == "out" else -share.mean().log()
        losses.append(loss if positive.any() else s.sum() * 0)
    return torch.stack(losses)


def against_each_other(features, labels, variant="out"):
    others = ~torch.eye(len(features), dtype=torch.bool)
    return per_anchor(features, features, others, (labels[:, None] == labels) & others, variant)


# The papers


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_papers(backend, variant, reduction):
    """Khosla et al. 2020, eqs. 2 and 3, add the anchors up; arXiv 2605.20302, eq. 2, averages them."""
    z, y = make_features(N), make_labels(N)
    ours = hc.supcon_loss(z, y, temperature=TAU, variant=variant, reduction=reduction, backend=backend)
    assert_same(ours, getattr(against_each_other(z, y, variant), reduction)(), z)


def test_nt_xent_is_cross_entropy_of_the_other_view(backend):
    """SimCLR; lightly's NTXentLoss without memory bank: views stacked, all 2B anchors averaged."""
    z = make_features(9, 2)
    stacked = F.normalize(torch.cat([z[:, 0], z[:, 1]]), dim=1)
    logits = (stacked @ stacked.T / TAU).masked_fill(torch.eye(18, dtype=torch.bool), -torch.inf)
    theirs = F.cross_entropy(logits, (torch.arange(18) + 9) % 18)
    assert_same(hc.supcon_loss(z, temperature=TAU, backend=backend), theirs, z)


# SupCon's published code: [B, V, D], the loss times temperature/base_temperature, views stacked view by view


def published(z, labels, anchors="all"):
    samples, views = z.shape[:2]
    stacked = torch.cat(list(z.unbind(1)))
    losses = TAU / BASE * against_each_other(stacked, labels.repeat(views))
    return losses.mean() if anchors == "all" else losses[:samples].mean()


@pytest.mark.parametrize("views", [1, 2, 3])
def test_published_supcon(backend, views):
    z, y = make_features(12, views), make_labels(12)
    ours = hc.supcon_loss(z, y, temperature=TAU, base_temperature=BASE, backend=backend)
    assert_same(ours, published(z, y), z)


def test_published_supcon_with_a_mask(backend):
    z, y = make_features(12, 2), make_labels(12)
    ours = hc.supcon_loss(z, mask=y[:, None] == y, temperature=TAU, base_temperature=BASE, backend=backend)
    assert_same(ours, published(z, y), z)


def test_published_supcon_anchors_one(backend):
    """contrast_mode="one": anchors are first views only."""
    z, y = make_features(12, 2), make_labels(12)
    per_view = hc.supcon_loss(z, y, temperature=TAU, base_temperature=BASE, reduction="none", backend=backend)  # [B, V]
    assert_same(per_view[:, 0].mean(), published(z, y, anchors="one"), z)


def test_published_supcon_counts_singletons_as_zero(backend):
    z, y = make_features(12, 1), with_singletons(12)
    ours = hc.supcon_loss(z, y, temperature=TAU, base_temperature=BASE, singletons="zero", backend=backend)
    assert_same(ours, published(z, y), z)


# pytorch-metric-learning


@pytest.fixture
def pml():
    """The package's losses, its reducers and its memory."""
    return pytest.importorskip("pytorch_metric_learning")


def pml_loss(name, **options):
    from pytorch_metric_learning import losses

    return getattr(losses, name)(temperature=TAU, **options)


def pml_self_supervised(name, symmetric):
    from pytorch_metric_learning import losses

    return losses.SelfSupervisedLoss(pml_loss(name), symmetric=symmetric)


@pytest.mark.parametrize("labels", [make_labels(N), with_singletons(N)], ids=["all paired", "singletons"])
def test_pml_supcon(pml, backend, labels):
    """Anchors without positives have a loss of zero there, and the default reducer averages what is above zero."""
    z = make_features(N)
    assert_same(hc.supcon_loss(z, labels, temperature=TAU, backend=backend), pml_loss("SupConLoss")(z, labels), z)


def test_pml_supcon_with_its_mean_reducer(pml, backend):
    from pytorch_metric_learning.reducers import MeanReducer

    z, y = make_features(N), with_singletons(N)
    theirs = pml_loss("SupConLoss", reducer=MeanReducer())(z, y)
    assert_same(hc.supcon_loss(z, y, temperature=TAU, singletons="zero", backend=backend), theirs, z)


def test_pml_supcon_with_references(pml, backend):
    z, y = make_features(N), make_labels(N)
    refs, ref_labels = make_features(N + 4)[4:].detach().flip(0).requires_grad_(), make_labels(N, 4)
    ours = hc.supcon_loss(z, y, ref_features=refs, ref_labels=ref_labels, temperature=TAU, backend=backend)
    assert_same(ours, pml_loss("SupConLoss")(z, y, ref_emb=refs, ref_labels=ref_labels), z, refs)


def test_pml_supcon_of_one_class_is_zero(pml, backend):
    """Without a negative anywhere it gives up; the formula does not."""
    z, y = make_features(6), torch.zeros(6, dtype=torch.int64)
    assert pml_loss("SupConLoss")(z, y) == 0
    ours = hc.supcon_loss(z, y, temperature=TAU, backend=backend)
    assert ours > 1
    assert_same(ours, against_each_other(z, y).mean(), z)


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_pml_self_supervised(pml, backend, name):
    """With one positive an anchor both are NT-Xent; views come as two tensors."""
    z = make_features(9, 2)
    theirs = pml_self_supervised(name, symmetric=True)(z[:, 0], z[:, 1])
    assert_same(hc.supcon_loss(z, temperature=TAU, backend=backend), theirs, z)


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_pml_self_supervised_one_sided(pml, backend, name):
    """symmetric=False: first views against second views."""
    z, sample = make_features(9, 2), torch.arange(9)
    theirs = pml_self_supervised(name, symmetric=False)(z[:, 0], z[:, 1])
    ours = hc.supcon_loss(z[:, 0], sample, ref_features=z[:, 1], ref_labels=sample, temperature=TAU, backend=backend)
    assert_same(ours, theirs, z)


def test_pml_ntxent_with_labels_is_another_loss(pml, backend):
    """It averages over pairs, and a pair's denominator holds no other positive: no option of SupCon gives that."""
    z, y = make_features(N), make_labels(N)
    logits = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / TAU
    other = y[:, None] != y
    pairs = [(i, p) for i in range(N) for p in range(N) if i != p and y[i] == y[p]]
    terms = [torch.logaddexp(logits[i, p], logits[i, other[i]].logsumexp(0)) - logits[i, p] for i, p in pairs]
    theirs = pml_loss("NTXentLoss")(z, y)
    assert_same(torch.stack(terms).mean(), theirs, z)
    for variant in ("out", "in"):
        assert abs(hc.supcon_loss(z, y, temperature=TAU, variant=variant, backend=backend) - theirs) > 0.01


def test_pml_cross_batch_memory_is_a_queue(pml, backend):
    """The same value; the gradient differs, for its memory holds the current batch as constants."""
    from pytorch_metric_learning.losses import CrossBatchMemory

    past, past_labels = make_features(N + 10)[:10].detach(), make_labels(10)
    z, y = make_features(N), make_labels(N)
    memory = CrossBatchMemory(pml_loss("SupConLoss"), D, memory_size=100)
    memory(past, past_labels)
    theirs = memory(z, y)
    ours = hc.supcon_loss(z, y, queue=(past, past_labels), temperature=TAU, backend=backend)
    assert abs(ours - theirs) <= 1e-12
    (want,), (got,) = torch.autograd.grad(theirs, z), torch.autograd.grad(ours, z)
    assert (got - want).norm() > 0.05 * got.norm()
