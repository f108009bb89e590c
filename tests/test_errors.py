"""Bad input gets one error naming the argument, the rule and the value."""

import re

import pytest
import torch

import hypercontrast as hc

FUNCTIONS = [hc.normface_loss, hc.ntce_loss, hc.nonl_loss]


def good():
    return {"features": torch.randn(4, 5), "prototypes": torch.randn(3, 5), "labels": torch.tensor([0, 1, 2, 0])}


def with_value(x, index, value):
    x = x.clone()
    x[index] = value
    return x


BAD = [
    ({"labels": torch.tensor([0, 1, 3, 0])}, ValueError, "labels must lie in [0, 3), got 3"),
    ({"labels": torch.tensor([0, 1, -1, 0])}, ValueError, "labels must lie in [0, 3), got -1"),
    ({"labels": torch.tensor([0, 1, 2**40, 0])}, ValueError, f"labels must lie in [0, 3), got {2**40}"),
    ({"labels": torch.tensor([0, 1, 2])}, ValueError, "labels must have shape [4] to match features, got [3]"),
    ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, "labels must have shape [4]"),
    ({"labels": torch.zeros(4)}, TypeError, "labels must be int64, got torch.float32"),
    ({"labels": torch.zeros(4, dtype=torch.int32)}, TypeError, "labels must be int64, got torch.int32"),
    ({"labels": [0, 1, 2, 0]}, TypeError, "labels must be a tensor, got list"),
    ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "labels must be on the features' device"),
    ({"features": [[1.0]]}, TypeError, "features must be a tensor, got list"),
    ({"features": torch.randn(4)}, ValueError, "features must have shape [N, D], got [4]"),
    ({"features": torch.randn(2, 2, 5)}, ValueError, "features must have shape [N, D], got [2, 2, 5]"),
    ({"features": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "features must be float32, bfloat16, float16"),
    ({"features": torch.ones(4, 0)}, ValueError, "features must have at least one dimension, got [4, 0]"),
    ({"features": with_value(torch.randn(4, 5), (2, 1), torch.nan)}, ValueError, "features must have finite norms, got nan in row 2"),
    ({"features": with_value(torch.randn(4, 5), (0, 1), torch.inf)}, ValueError, "features must have finite norms, got inf in row 0"),
    ({"features": with_value(torch.randn(4, 5), (3, 1), 1e30)}, ValueError, "features must have finite norms, got inf in row 3"),
    ({"features": torch.randn(4, 5).double()}, TypeError, "prototypes must be float64 exactly when features are, got torch.float32"),
    ({"features": torch.randn(4, 6)}, ValueError, "prototypes must have the features' dimension 6, got [3, 5]"),
    ({"prototypes": torch.randn(5)}, ValueError, "prototypes must have shape [K, D], got [5]"),
    ({"prototypes": torch.randn(0, 5)}, ValueError, "prototypes must hold at least one class, got [0, 5]"),
    ({"prototypes": None}, TypeError, "prototypes must be a tensor, got NoneType"),
    ({"prototypes": with_value(torch.randn(3, 5), (1, 1), torch.nan)}, ValueError, "prototypes must have finite norms, got nan in row 1"),
    ({"prototypes": torch.randn(3, 5, device="meta")}, ValueError, "prototypes must be on the features' device cpu, got meta"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be positive and finite, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be positive and finite, got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be positive and finite, got inf"),
    ({"temperature": "0.1"}, TypeError, "temperature must be a number or a tensor of one float, got str"),
    ({"temperature": True}, TypeError, "temperature must be a number or a tensor of one float, got bool"),
    ({"temperature": torch.ones(2)}, ValueError, "temperature must be a number or a tensor of one float, got torch.float32 [2]"),
    ({"temperature": torch.tensor(1)}, ValueError, "temperature must be a number or a tensor of one float, got torch.int64 []"),
    ({"temperature": torch.tensor(-0.5)}, ValueError, "temperature must be positive and finite, got -0.5"),
    ({"temperature": torch.tensor(torch.inf)}, ValueError, "temperature must be positive and finite, got inf"),
    ({"weight": torch.ones(4)}, ValueError, "weight must have shape [3], one class each, got [4]"),
    ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight must be a tensor of class weights, got list"),
    ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight must be a floating-point tensor, got torch.int64"),
    ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight must not require a gradient"),
    ({"weight": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "weight must be finite and not negative, got -1.0 for class 1"),
    ({"weight": torch.tensor([1.0, 1.0, torch.nan])}, ValueError, "weight must be finite and not negative, got nan for class 2"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer, got float"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ({"reduction": None}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got None"),
    ({"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
    ({"group": "world"}, ValueError, "group must be 'auto', None or a process group, got 'world'"),
    ({"group": 3}, TypeError, "group must be 'auto', None or a process group, got int"),
    ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'blockwise', 'triton', got 'cuda'"),
    ({"class_means": hc.ClassMeans(3, 4)}, ValueError, "class_means must hold [3, 5] like prototypes, got [3, 4]"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_argument(function, change, error, message, backend):
    with pytest.raises(error, match=re.escape(message)):
        function(**({"backend": backend} | good() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": "row"}, "anchor must be one of 'prototype', 'sample', 'both', got 'row'"),
        ({"empty": "skip"}, "empty must be one of 'align', 'zero', 'error', got 'skip'"),
    ],
)
def test_bad_nonl_option(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hc.nonl_loss(**good(), **change)


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' needs features on a GPU, got cpu|cannot be imported"):
        hc.ntce_loss(**good(), backend="triton")


def test_backend_override(monkeypatch):
    features = good()["features"]
    assert hc.resolve_backend("auto", features) == "blockwise"
    monkeypatch.setenv("HYPERCONTRAST_BACKEND", "reference")
    assert hc.resolve_backend("auto", features) == "reference"
    assert hc.resolve_backend("blockwise", features) == "blockwise", "an explicit backend wins"
    monkeypatch.setenv("HYPERCONTRAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"HYPERCONTRAST_BACKEND must be one of .* got 'fast'"):
        hc.resolve_backend("auto", features)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hc.PrototypeHead(0, 3), "dim and num_classes must be at least 1, got 0 and 3"),
        (lambda: hc.PrototypeHead(4, 3, neck="mlp"), "neck must be None, 'linear' or 'bn', got 'mlp'"),
        (lambda: hc.simplex_etf(9, 7), "dim must be at least num_classes - 1 = 8 for a simplex ETF, got 7"),
        (lambda: hc.ClassMeans(3, 4, mode="median"), "mode must be one of 'mean', 'ema', got 'median'"),
        (lambda: hc.ClassMeans(3, 4, momentum=1.0), "momentum must lie in [0, 1), got 1.0"),
        (lambda: hc.ClassMeans(3, 4).update(torch.randn(2, 5), torch.tensor([0, 1])), "features must have dimension 4"),
        (lambda: hc.ClassMeans(3, 4).update(torch.randn(1, 4), torch.tensor([3])), "labels must lie in [0, 3), got 3"),
        (lambda: hc.PrototypeClassifier(torch.randn(3)), "prototypes must have shape [K, D], got [3]"),
    ],
)
def test_bad_prototype_arguments(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
