"""Bad input gives one named error (argument, rule, value), or the finite result that the documentation promises.

One table a part: operators, settings, data, checkpoints, commands. The test of a part goes through all of its table, so
that what it counts is what it ran.
"""

import errno
import hashlib
import io
import os
import pickle
import shutil
import struct
import warnings
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pictures import encoded, make_folder, picture, write_parquet

import hypercontrast as hc
from bench.__main__ import main as bench
from hypercontrast import checkpoint, corruptions, data, demo, evaluate, report, table, train, transfer
from hypercontrast.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from hypercontrast.config import UsageError, configure, read_config

NAN, INF = float("nan"), float("inf")
FUNCTIONS = [hc.normface_loss, hc.ntce_loss, hc.nonl_loss]


def refused(call, error, says):
    """What is wrong with how `call` fails; empty where it raises `error` with a message of one line that says so."""
    try:
        result = call()
    except error as raised:
        message = str(raised)
        return "" if says in message and "\n" not in message else f"said {message!r}, not {says!r}"
    except Exception as raised:
        return f"raised {type(raised).__name__}: {raised}"
    return f"returned {result}"


def all_passed(part, outcomes, figure):
    """Nothing went wrong, over a table from name to what did; the figure counts its rows."""
    failures = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome]
    assert not failures, "\n".join(failures)
    figure("R1", f"{part}: {len(outcomes)} of {len(outcomes)} bad inputs give one named error or a finite result")


# Operators


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
    ({"labels": torch.tensor([0, 1, 2**63 - 1, 0])}, ValueError, f"labels must lie in [0, 3), got {2**63 - 1}"),
    ({"labels": torch.tensor([0, 1, -(2**63), 0])}, ValueError, f"labels must lie in [0, 3), got {-(2**63)}"),
    ({"labels": torch.tensor([0, 1, 2, 0]).to_sparse()}, TypeError, "labels must be a dense tensor, got torch.sparse_coo"),
    ({"features": torch.randn(4, 5).to_sparse()}, TypeError, "features must be a dense tensor, got torch.sparse_coo"),
    ({"features": torch.randn(4, 5, dtype=torch.complex64)}, TypeError, "features must be float32, bfloat16, float16 or float64, got torch.complex64"),
    ({"features": with_value(torch.randn(4, 5), (1, 1), torch.inf), "normalize": False}, ValueError, "features must have finite norms, got inf in row 1"),
    ({"features": with_value(torch.randn(4, 5), (1, 1), torch.nan).half()}, ValueError, "features must have finite norms, got nan in row 1"),
    ({"prototypes": torch.randn(3, 0), "features": torch.randn(4, 0)}, ValueError, "features must have at least one dimension, got [4, 0]"),
    ({"prototypes": torch.randn(3, 5).long()}, TypeError, "prototypes must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"temperature": 1e-40}, ValueError, "temperature must be at least 1.2e-07, got 1e-40"),
    ({"temperature": torch.tensor(1e-30)}, ValueError, "temperature must be at least 1.2e-07, got 1"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": torch.tensor(torch.nan)}, ValueError, "temperature must be positive and finite, got nan"),
    ({"temperature": torch.ones((), device="meta")}, ValueError, "temperature must be on the features' device cpu, got meta"),
    ({"temperature": None}, TypeError, "temperature must be a number or a tensor of one float, got NoneType"),
    ({"weight": torch.ones(3, device="meta")}, ValueError, "weight must be on the features' device cpu, got meta"),
    ({"ignore_index": 2**70}, ValueError, f"ignore_index must fit int64, got {2**70}"),
    ({"class_means": "mean"}, TypeError, "class_means must be ClassMeans or None, got str"),
]  # fmt: skip

QUEUED = [  # of ntce_loss and nonl_loss
    ("past", TypeError, "queue must be a NegativeBuffer or a pair (features, labels), got str"),
    ((torch.randn(2, 5),), TypeError, "queue must be a NegativeBuffer or a pair (features, labels), got tuple"),
    ((torch.randn(2, 6), torch.tensor([0, 1])), ValueError, "queue must hold features of dimension 5, got [2, 6]"),
    (
        (torch.randn(2, 5), torch.tensor([0])),
        ValueError,
        "queue labels must have shape [2] to match queue features, got [1]",
    ),
    ((torch.randn(2, 5), torch.tensor([0, 3])), ValueError, "queue labels must lie in [0, 3), got 3"),
    ((torch.randn(2, 5), torch.tensor([0, -1])), ValueError, "queue labels must lie in [0, 3), got -1"),
    ((torch.randn(2, 5, requires_grad=True), torch.tensor([0, 1])), ValueError, "queue must not require a gradient"),
    ((torch.full((2, 5), NAN), torch.tensor([0, 1])), ValueError, "queue must have finite norms, got nan in row 0"),
    ((torch.full((2, 5), INF), torch.tensor([0, 1])), ValueError, "queue must have finite norms, got inf in row 0"),
    (
        (with_value(torch.randn(2, 5), (1, 1), NAN), torch.tensor([0, hc.NegativeBuffer.ABSENT])),
        ValueError,
        "queue must have finite norms, got nan in row 1",
    ),
    ((torch.randn(2, 5, device="meta"), torch.tensor([0, 1])), ValueError, "queue must be on the features' device cpu"),
    (
        (torch.full((2, 5), 1e100, dtype=torch.float64), torch.tensor([0, 1])),
        ValueError,
        "queue in torch.float32 must have finite norms, got inf in row 0",
    ),
]
SUPCON = [
    ({"features": torch.full((4, 5), NAN)}, ValueError, "features must have finite norms, got nan in row 0"),
    ({"features": torch.randn(4)}, ValueError, "features must have shape [N, D] or [B, V, D], got [4]"),
    ({"features": torch.randn(4, 0)}, ValueError, "features must have at least one dimension, got [4, 0]"),
    ({"features": [[1.0]]}, TypeError, "features must be a tensor, got list"),
    ({"labels": None}, ValueError, "labels or mask must be given for features [N, D], got neither for [4, 5]"),
    ({"labels": torch.zeros(4)}, TypeError, "labels must be int64, got torch.float32"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels must have shape [4] to match features, got [3]"),
    ({"mask": torch.ones(4, 4, dtype=torch.bool)}, ValueError, "labels and mask must not both be given"),
    ({"labels": None, "mask": torch.ones(4, 4)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    ({"labels": None, "mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, "mask must have shape [4, 4], got [4, 3]"),
    ({"ref_features": torch.randn(4, 5)}, ValueError, "ref_labels must be given exactly when ref_features are"),
    ({"ref_labels": torch.zeros(4, dtype=torch.int64)}, ValueError, "ref_labels must come with ref_features"),
    ({"ref_features": torch.randn(2, 6), "ref_labels": torch.tensor([0, 1])}, ValueError, "ref_features must have the features' dimension 5, got [2, 6]"),
    ({"ref_features": torch.full((2, 5), NAN), "ref_labels": torch.tensor([0, 1])}, ValueError, "ref_features must have finite norms, got nan in row 0"),
    ({"ref_features": torch.randn(2, 5).double(), "ref_labels": torch.tensor([0, 1])}, TypeError, "ref_features must be float64 exactly when features are"),
    ({"queue": (torch.full((2, 5), NAN), torch.tensor([0, 1]))}, ValueError, "queue must have finite norms, got nan in row 0"),
    ({"queue": (torch.full((2, 5), NAN), torch.full((2,), hc.NegativeBuffer.ABSENT))}, ValueError, "queue must have finite norms, got nan in row 0"),
    ({"queue": (torch.full((2, 5), 1e100, dtype=torch.float64), torch.tensor([0, 1]))}, ValueError, "queue in torch.float32 must have finite norms, got inf in row 0"),
    ({"features": torch.randn(4, 5).half(), "ref_features": torch.full((2, 5), 1e6), "ref_labels": torch.tensor([0, 1]), "normalize": False}, ValueError, "ref_features in torch.float16 must have finite norms, got inf in row 0"),
    ({"features": torch.randn(4, 5).half(), "ref_features": torch.full((2, 5), NAN), "ref_labels": torch.tensor([0, 1])}, ValueError, "ref_features must have finite norms, got nan in row 0"),
    ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    ({"base_temperature": -1}, ValueError, "base_temperature must be positive and finite, got -1"),
    ({"base_temperature": "1"}, TypeError, "base_temperature must be a number or None, got str"),
    ({"variant": "mid"}, ValueError, "variant must be one of 'out', 'in', got 'mid'"),
    ({"singletons": "drop"}, ValueError, "singletons must be one of 'exclude', 'zero', 'error', got 'drop'"),
    ({"labels": torch.arange(4), "singletons": "error"}, ValueError, "labels must give every anchor a positive (singletons='error'), got 4 without"),
]  # fmt: skip
OTHERS = [
    (lambda: hc.nonl_loss(**good(), anchor="row"), ValueError, "anchor must be one of 'prototype', 'sample', 'both', got 'row'"),
    (lambda: hc.nonl_loss(**good(), empty="skip"), ValueError, "empty must be one of 'align', 'zero', 'error', got 'skip'"),
    (lambda: hc.nonl_loss(**good() | {"labels": torch.zeros(4, dtype=torch.int64)}, empty="error"), ValueError, "labels must hold at least two classes"),
    (lambda: hc.nonl_loss(**good(), anchor="sample", queue=(torch.randn(2, 5), torch.tensor([0, 1]))), ValueError, "queue must be None for anchor='sample'"),
    (lambda: hc.PrototypeHead(0, 3), ValueError, "dim and num_classes must be at least 1, got 0 and 3"),
    (lambda: hc.PrototypeHead(4, 3, neck="mlp"), ValueError, "neck must be None, 'linear' or 'bn', got 'mlp'"),
    (lambda: hc.simplex_etf(9, 7), ValueError, "dim must be at least num_classes - 1 = 8 for a simplex ETF, got 7"),
    (lambda: hc.ClassMeans(3, 4, mode="median"), ValueError, "mode must be one of 'mean', 'ema', got 'median'"),
    (lambda: hc.ClassMeans(3, 4, momentum=1.0), ValueError, "momentum must lie in [0, 1), got 1.0"),
    (lambda: hc.ClassMeans(3, 4).update(torch.randn(2, 5), torch.tensor([0, 1])), ValueError, "features must have dimension 4"),
    (lambda: hc.ClassMeans(3, 4).update(torch.randn(1, 4), torch.tensor([3])), ValueError, "labels must lie in [0, 3), got 3"),
    (lambda: hc.PrototypeClassifier(torch.randn(3)), ValueError, "prototypes must have shape [K, D], got [3]"),
    (lambda: hc.PrototypeHead("4", 3), TypeError, "dim and num_classes must be integers, got '4' and 3"),
    (lambda: hc.PrototypeHead(4, 3)(torch.randn(2, 5)), ValueError, "features must have dimension 4, got [2, 5]"),
    (lambda: hc.simplex_etf(0, 3), ValueError, "dim and num_classes must be at least 1, got 3 and 0"),
    (lambda: hc.ClassMeans(0, 4), ValueError, "dim and num_classes must be at least 1, got 4 and 0"),
    (lambda: hc.ClassMeans(3, 4).update(torch.randn(1, 4), torch.tensor([-1])), ValueError, "labels must lie in [0, 3), got -1"),
    (lambda: hc.ClassMeans(3, 4).update(torch.full((1, 4), NAN), torch.tensor([0])), ValueError, "features must have finite norms, got nan in row 0"),
    (lambda: hc.PrototypeClassifier(torch.randn(0, 3)), ValueError, "prototypes must hold at least one class, got [0, 3]"),
    (lambda: hc.PrototypeClassifier(torch.randn(2, 3)).predict(torch.randn(2, 4)), ValueError, "features must have dimension 3, got [2, 4]"),
    (lambda: hc.CELoss()(torch.randn(2, 3), torch.tensor([0, 5])), ValueError, "labels must lie in [0, 3), got 5"),
    (lambda: hc.CELoss(torch.ones(4))(torch.randn(2, 3), torch.tensor([0, 1])), ValueError, "weight must have shape [3], one class each, got [4]"),
    (lambda: hc.ETFDRLoss()(torch.randn(2, 3), torch.randn(2, 1), torch.tensor([0, 1])), ValueError, "prototypes must have the features' dimension 3, got [2, 1]"),
    (lambda: hc.ETFDRLoss()(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, -1])), ValueError, "labels must lie in [0, 2), got -1"),
    (lambda: hc.NeuralCollapse(0, 4), ValueError, "dim and num_classes must be at least 1, got 4 and 0"),
    (lambda: hc.NeuralCollapse(2.5, 4), TypeError, "dim and num_classes must be integers, got 4 and 2.5"),
    (lambda: hc.NeuralCollapse(True, 4), TypeError, "dim and num_classes must be integers, got 4 and True"),
    (lambda: hc.NeuralCollapse(3, 4, memory_budget=INF), ValueError, "memory_budget must be finite and hold two samples a class, 96 bytes, got inf"),
    (lambda: hc.NeuralCollapse(3, 4, memory_budget="1 GiB"), TypeError, "memory_budget must be a number of bytes, got str"),
    (lambda: hc.NegativeBuffer(4, 4, device="bogus", group=None), ValueError, "device must be one that torch knows, got 'bogus'"),
    (lambda: hc.NeuralCollapse(3, 4).compute(), ValueError, "compute needs at least one sample, got 0"),
    (lambda: hc.NeuralCollapse(3, 4).update(torch.randn(1, 5), torch.tensor([0])), ValueError, "features must have dimension 4, got [1, 5]"),
    (lambda: hc.NeuralCollapse(3, 4).update(torch.randn(1, 4), torch.tensor([3])), ValueError, "labels must lie in [0, 3), got 3"),
    (lambda: hc.neural_collapse(torch.full((6, 4), NAN), torch.arange(6)), ValueError, "features must have finite norms, got nan in row 0"),
    (lambda: hc.NegativeBuffer(0, 4, group=None), ValueError, "dim must be at least 1, got 0"),
    (lambda: hc.NegativeBuffer(4, 0, group=None), ValueError, "batch must be at least 1, got 0"),
    (lambda: hc.NegativeBuffer(4, 4, queue=-1, group=None), ValueError, "queue must be at least 0, got -1"),
    (lambda: hc.NegativeBuffer(4, 2, group=None).gather(torch.randn(3, 4), torch.arange(3)), ValueError, "features must have at most batch = 2 rows, got 3"),
    (lambda: hc.NegativeBuffer(4, 2, group=None).gather(torch.full((1, 4), NAN), torch.arange(1)), ValueError, "features must have finite norms, got nan in row 0"),
    (lambda: hc.check_ddp(hc.NTCELoss(), world_size=1), ValueError, "world_size must be at least 2, got 1"),
    (lambda: hc.gather_with_grad("x"), TypeError, "x must be a tensor, got str"),
]  # fmt: skip
NONE = torch.zeros(0, dtype=torch.int64)
EMPTY = {"features": torch.randn(0, 5), "prototypes": torch.randn(3, 5), "labels": NONE}
ONE_CLASS = {"labels": torch.zeros(4, dtype=torch.int64)}
# What has nothing to average is zero; equal logits are the log of how many there are.
FINITE = [
    ("N = 0 in ntce_loss", lambda **b: hc.ntce_loss(**EMPTY, **b), 0.0),
    ("N = 0 in nonl_loss", lambda **b: hc.nonl_loss(**EMPTY, **b), 0.0),
    ("N = 0 in normface_loss", lambda **b: hc.normface_loss(**EMPTY, **b), 0.0),
    ("N = 0 in supcon_loss", lambda **b: hc.supcon_loss(torch.randn(0, 5), NONE, **b), 0.0),
    ("no views", lambda **b: hc.supcon_loss(torch.randn(3, 0, 5), **b), 0.0),
    ("one view", lambda **b: hc.supcon_loss(torch.randn(3, 1, 5), **b), 0.0),
    ("no references", lambda **b: hc.supcon_loss(torch.randn(4, 5), ONE_CLASS["labels"], ref_features=torch.randn(0, 5), ref_labels=NONE, **b), 0.0),
    ("no positives", lambda **b: hc.supcon_loss(torch.randn(4, 5), torch.arange(4), **b), 0.0),
    ("an empty mask", lambda **b: hc.supcon_loss(torch.randn(4, 5), mask=torch.zeros(4, 4, dtype=torch.bool), **b), 0.0),
    ("no negatives, zero", lambda **b: hc.nonl_loss(**good() | ONE_CLASS, empty="zero", **b), 0.0),
    ("all ignored", lambda **b: hc.ntce_loss(**good() | {"labels": torch.full((4,), -100)}, **b), 0.0),
    ("weights of zero", lambda **b: hc.ntce_loss(**good(), weight=torch.zeros(3), **b), 0.0),
    ("features of zero", lambda **b: hc.ntce_loss(**good() | {"features": torch.zeros(4, 5)}, **b), 4.0),
    ("prototypes of zero", lambda **b: hc.normface_loss(**good() | {"prototypes": torch.zeros(3, 5)}, **b), 3.0),
    ("an infinitely warm temperature", lambda **b: hc.normface_loss(**good(), temperature=1e300, **b), 3.0),
    ("one class of prototypes", lambda **b: hc.normface_loss(**good() | ONE_CLASS | {"prototypes": torch.randn(1, 5)}, **b), 1.0),
]  # fmt: skip


def finite(call, logits):
    """What is wrong with a loss that is to be the log of so many equal logits, or zero; its gradient is to be finite."""
    try:
        loss = call()
    except Exception as raised:
        return f"raised {type(raised).__name__}: {raised}"
    expected = torch.tensor(logits).log() if logits else torch.tensor(0.0)
    return "" if torch.allclose(loss, expected, atol=1e-6) else f"returned {loss.item()}, not {expected.item()}"


def test_operators(figure):
    outcomes = {}
    backends = ("reference", "blockwise")
    for n, (change, error, says) in enumerate(BAD):
        every = [partial(f, **({"backend": b} | good() | change)) for f in FUNCTIONS for b in backends]
        outcomes[f"loss {n}, {says}"] = "; ".join(filter(None, (refused(call, error, says) for call in every)))
    for n, (queue, error, says) in enumerate(QUEUED):
        every = [partial(f, **good(), queue=queue, backend=b) for f in FUNCTIONS[1:] for b in backends]
        outcomes[f"queue {n}, {says}"] = "; ".join(filter(None, (refused(call, error, says) for call in every)))
    for n, (change, error, says) in enumerate(SUPCON):
        options = {"features": torch.randn(4, 5), "labels": torch.tensor([0, 1, 0, 1])} | change
        every = [partial(hc.supcon_loss, **options, backend=b) for b in backends]
        outcomes[f"supcon {n}, {says}"] = "; ".join(filter(None, (refused(call, error, says) for call in every)))
    for n, (call, error, says) in enumerate(OTHERS):
        outcomes[f"other {n}, {says}"] = refused(call, error, says)
    for name, call, logits in FINITE:
        every = [finite(partial(call, backend=b), logits) for b in backends]
        outcomes[name] = "; ".join(filter(None, every))
    outcomes["N = 0 in CELoss"] = finite(lambda: hc.CELoss()(torch.randn(0, 3), NONE), 0.0)
    outcomes["N = 0 in ETFDRLoss"] = finite(lambda: hc.ETFDRLoss()(torch.randn(0, 3), torch.randn(2, 3), NONE), 0.0)
    all_passed("operators", outcomes, figure)


# Settings


FILES = [
    ("lr: 0.1\nlearning_rate: 0.2\n", "must hold known settings only, got learning_rate"),
    ("epochs: many\n", "epochs must be int, got 'many'"),
    ("epochs: 2.5\n", "epochs must be int, got 2.5"),
    ("quiet: 1\n", "quiet must be bool, got 1"),
    ("loss: hinge\n", "loss must be one of ce, normface, ntce, nonl, scl, etf-dr, got 'hinge'"),
    ("loss: [ce]\n", "etf-dr, got ['ce']"),
    ("- ce\n", "must hold a mapping of settings, got list"),
    ("lr: {", "must be readable YAML"),
    ("run_dir: !!python/object/apply:os.mkdir [executed]\n", "must be readable YAML"),
    ("", "must hold a mapping of settings, got NoneType"),
    ("42", "must hold a mapping of settings, got int"),
    ("!!set {lr}\n", "must hold a mapping of settings, got set"),
    ("1: 2\n", "must hold known settings only, got 1"),
    ("base: cifar10-ce\n", "must hold known settings only, got base"),
    ("a: &a [*a]\n", "must hold known settings only, got a"),
    ("lr: 0.1\nlr: 0.2\n", "lr stands there twice"),
    ("lr: 1\n---\nlr: 2\n", "must be readable YAML: expected a single document"),
    ("<<: 3\n", "must be readable YAML"),
    ("? [a]\n: 3\n", "must be readable YAML"),
    ("lr: *unknown\n", "must be readable YAML: found undefined alias"),
    ("lr: !!python/name:os.system\n", "must be readable YAML: could not determine a constructor"),
    ("lr: !!python/object/new:os.system [x]\n", "must be readable YAML: could not determine a constructor"),
    ("lr: !!float fast\n", "must be readable YAML: could not convert string to float"),
    ("lr: !!timestamp soon\n", "must be readable YAML"),
    ("lr: 2020-99-99\n", "must be readable YAML: month must be in 1..12"),
    ("lr: !!binary x\n", "must be readable YAML: failed to decode base64 data"),
    ("\0", "must be readable YAML: unacceptable character"),
    ("[" * 3000, "must be readable YAML: maximum recursion depth exceeded"),
    ("lr: .nan\n", "lr must be positive and finite, got nan"),
    ("lr: '0.1'\n", "lr must be float, got '0.1'"),
    ("epochs: true\n", "epochs must be int, got True"),
    ("epochs: 1e3\n", "epochs must be int, got '1e3'"),
    ("temperature: null\n", "temperature must be float, got None"),
    ("temperature: .inf\n", "temperature must be positive and finite, got inf"),
    ("loss: no\n", "loss must be one of ce, normface, ntce, nonl, scl, etf-dr, got False"),
    ("dataset: 2020-01-01\n", "dataset must be str, got datetime.date(2020, 1, 1)"),
    ('dataset: "a\\nb"\n', r"dataset must be printable text, got 'a\nb'"),
    ('run_dir: "\\0"\n', r"run_dir must be printable text, got '\x00'"),
    (f"seed: {10**30}\n", f"seed must fit 64 bits, got {10**30}"),
    ("seed: -1\n", "seed must be at least 0, got -1"),
    ("warmup_epochs: 100\n", "warmup_epochs must be between 0 and epochs, got 100"),
    ("weight_decay: -1\n", "weight_decay must be finite and not negative, got -1.0"),
    ("imbalance: 2\n", "imbalance must be above 0 and at most 1, got 2.0"),
]


def test_settings(figure, tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    outcomes = {}
    for text, says in FILES:
        Path("config.yaml").write_text(text)
        outcomes[text[:40]] = refused(lambda: read_config(Path("config.yaml")), UsageError, says)
    Path("config.yaml").write_bytes(b"lr: \xed\xa0\x80")
    outcomes["not UTF-8"] = refused(lambda: read_config(Path("config.yaml")), UsageError, "must be readable YAML")
    outcomes["a folder"] = refused(lambda: read_config(tmp_path), UsageError, "must be readable YAML")
    outcomes["a recipe elsewhere"] = refused(
        lambda: configure(recipe="../x"), UsageError, "recipe must be auto, none or"
    )
    assert not (tmp_path / "executed").exists()
    all_passed("settings", outcomes, figure)


# Data


def png(width, height, chunk=b""):
    """A picture that declares this size, with no pixels; `chunk` stands before them."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            chunk,
            png_chunk(b"IDAT", zlib.compress(b"")),
            png_chunk(b"IEND", b""),
        ]
    )


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg(width, height):
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def gif(width, height):
    frame = struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02D\x01\0;"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0," + frame


def tiff(size, tile):
    """A picture of this size in one tile, which is empty."""
    bits, content = struct.pack("<HHH", 8, 8, 8), zlib.compress(b"")
    # Tag, type (3 for 16 bits, 4 for 32), count and value, or where it stands: after header, directory and its end.
    tags = [(256, 4, 1, size), (257, 4, 1, size), (258, 3, 3, 134), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3)]
    tags += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 140), (325, 4, 1, len(content))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + bits + content


BOMB = zlib.compress(bytes(1 << 28))
PICTURES = [
    ("empty", b"", "must be a picture, in BMP, GIF"),
    ("text", b"hello", "must be a picture, in BMP, GIF"),
    ("SVG", b"<svg onload='x'></svg>", "must be a picture, in BMP, GIF"),
    ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "must be a picture, in BMP, GIF"),
    ("a pickle", pickle.dumps([1]), "must be a picture, in BMP, GIF"),
    ("no pixels", png(0, 0), "must be a picture, in BMP, GIF"),
    ("no content", png(100, 100), "must be an intact picture"),
    ("a line", png(6500, 100), "must be at most 64 times as long as wide, got (6500, 100)"),
    ("PNG of 2^62 pixels", png(2**31 - 1, 2**31 - 1), "must be an intact picture: Image size"),
    ("PNG of more than 2^26 pixels", png(2**13 + 1, 2**13), "must have at most 67108864 pixels, got (8193, 8192)"),
    ("JPEG of 2^32 pixels", jpeg(65535, 65535), "must be an intact picture: Image size"),
    ("BMP of 2^60 pixels", bmp(2**30, 2**30), "must be an intact picture: Image size"),
    ("GIF of 2^32 pixels", gif(65535, 65535), "must be an intact picture: Image size"),
    ("PPM of 10^18 pixels", b"P6 999999999 999999999 255\n", "must be an intact picture: Image size"),
    ("PPM with an endless number", b"P6 " + b"9" * 10**5 + b" 3 255\n", "must be an intact picture"),
    ("TIFF in an empty tile", tiff(8, 16), "must be an intact picture"),
    ("TIFF in a tile of 2^28 pixels", tiff(8, 2**14), "must have at most 67108864 pixels, got (16384, 16384)"),
    ("text that unpacks to 256 MiB", png(8, 8, png_chunk(b"zTXt", b"k\0\0" + BOMB)), "must be an intact picture"),
    ("a profile that unpacks to 256 MiB", png(8, 8, png_chunk(b"iCCP", b"k\0\0" + BOMB)), "must be an intact picture"),
]
FOLDERS = [
    (lambda root: shutil.rmtree(root / "train"), "dataset must hold"),
    (lambda root: shutil.rmtree(root / "val"), "dataset must hold"),
    (lambda root: (root / "val" / "cat").mkdir(), "must hold the same classes"),
    (lambda root: [path.unlink() for path in root.glob("val/*/*")], "must hold pictures, got none in 2 folders"),
    (lambda root: (shutil.rmtree(root / "train"), (root / "train").write_text("")), "dataset must hold"),
    (lambda root: (first(root).unlink(), first(root).symlink_to("/nowhere")), "must be an intact picture"),
    (lambda root: (first(root).unlink(), first(root).symlink_to("/dev/zero")), "must be a regular file"),
    (lambda root: (first(root).unlink(), os.mkfifo(first(root))), "must be a regular file"),
    (lambda root: (first(root).unlink(), first(root).symlink_to("0.png")), "must be an intact picture"),
]
TABLES = [  # options of write_parquet, or the bytes of train.parquet
    ({"labels": [0, -1]}, "must be at least 0, got -1"),
    ({"labels": ["ant", "bee"]}, "must hold integers in column label, got string"),
    ({"labels": [0.0, 1.0]}, "must hold integers in column label, got double"),
    ({"labels": [0, None]}, "must hold a label in every row of column label"),
    ({"labels": [], "pictures": []}, "must hold"),
    ({"labels": [0, 2], "names": ["ant", "bee"]}, "must lie in [0, 2), got 2"),
    ({"labels": [0, 2**40]}, f"must lie in [0, 2), got {2**40}"),
    ({"labels": [0, 2**62]}, f"must lie in [0, 2), got {2**62}"),
    ({"labels": [0, 1], "column": "photo"}, "must have a column img or image, got photo, label"),
    ({"labels": [0, 1], "label": "kind"}, "must have a column label or fine_label or labels, got image, kind"),
    ({"labels": [0, 1], "pictures": [None, None]}, "must hold encoded pictures in column image"),
    ({"labels": [0, 1], "pictures": [encoded(), None]}, "must hold a picture in every row of column image"),
    ({"labels": [0, 1], "pictures": [b"x", b"y"]}, "must be a picture, in BMP"),
    ({"labels": [0, 1], "pictures": ["a", "b"]}, "must hold encoded pictures in column image"),
    ({"labels": [0, 1], "names": "ab"}, "must name the classes in a list of strings, got ab"),
    ({"labels": [0, 1], "names": [["a"], {}]}, "must name the classes in a list of strings"),
    (b"", "must be readable Parquet"),
    (b"PAR1 nothing PAR1", "must be readable Parquet"),
    (b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1", "must be readable Parquet"),
]
NAMES = [
    ("", "dataset must be one of mnist5k, cifar10"),
    ("imagenet", "dataset must be one of mnist5k, cifar10"),
    ("https://example.org/x", "dataset must be one of mnist5k, cifar10"),
    ("folder:/nowhere", "dataset must hold /nowhere/train/CLASS/*"),
    ("parquet:/nowhere", "dataset must hold /nowhere/train{,-*}.parquet"),
    ("parquet:" + "a" * 5000, "dataset must be in a readable folder: [Errno 36] File name too long"),
    ("imagenet100", "data_root must hold imagenet100: expected"),
]


def first(root):
    return root / "train" / "ant" / "0.png"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_data(figure, tmp_path):
    pytest.importorskip("pyarrow")
    outcomes = {}
    root = make_folder(tmp_path / "pictures")
    for name, content, says in PICTURES:
        first(root).write_bytes(content)
        outcomes[name] = refused(lambda: data.load(f"folder:{root}"), UsageError, says)
    for n, (change, says) in enumerate(FOLDERS):
        root = make_folder(tmp_path / f"folder{n}")
        change(root)
        outcomes[f"folder {n}, {says}"] = refused(partial(data.load, f"folder:{root}"), UsageError, says)
    for n, (change, says) in enumerate(TABLES):
        root = tmp_path / f"table{n}"
        options = {"pictures": [encoded(), encoded()], "labels": [0, 1]}
        write_parquet(root / "test.parquet", **options)
        if isinstance(change, bytes):
            (root / "train.parquet").write_bytes(change)
        else:
            write_parquet(root / "train.parquet", **options | change)
        outcomes[f"table {n}, {says}"] = refused(partial(data.load, f"parquet:{root}"), UsageError, says)
    for name, says in NAMES:
        outcomes[f"data set {name[:20]!r}"] = refused(partial(data.load, name, tmp_path), UsageError, says)
    for option in ("limit", "workers"):
        load = partial(data.load, f"parquet:{tmp_path}", **{option: -1})
        outcomes[option] = refused(load, UsageError, f"{option} must be at least 0, got -1")
    all_passed("data", outcomes, figure)


# Checkpoints


def safetensors(header, content=b""):
    return struct.pack("<Q", len(header)) + header + content


def saved_state(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


W, S, SUMS = checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.SUMS
CHECKPOINTS = [  # a file and its content; checksums are made anew, as whoever writes a foreign file can
    (W, b"", "header too small"),
    (W, pickle.dumps([1]), "header too large"),
    (W, struct.pack("<Q", 2**63) + b"{}", "header too large"),
    (W, safetensors(b'{"w":'), "invalid JSON in header"),
    (W, safetensors(b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'), "incomplete metadata"),
    (W, safetensors(b'{"w":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'), "overflow"),
    (W, safetensors(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)), "invalid JSON in header"),
    (W, safetensors(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', bytes(4)), "cannot be read"),
    (W, safetensors(b'{"w":{"dtype":"Z9","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "unknown variant"),
    (S, b"", "cannot be read: EOFError"),
    (S, b"PK\x03\x04nothing", "cannot be read"),
    (S, saved_state({"epoch": 1})[:-30], "cannot be read"),
    (S, pickle.dumps({"epoch": 1}, protocol=2)[:-3], "cannot be read"),
    (S, saved_state([1, 2]), "must hold a dict as its state, got list"),
    (S, saved_state(torch.ones(1)), "must hold a dict as its state, got Tensor"),
    (SUMS, b"", "its files do not match SHA256SUMS"),
    (SUMS, b"\xff" * 100, "its files do not match SHA256SUMS"),
    (S, None, "is incomplete: No such file or directory"),
    (W, None, "is incomplete: No such file or directory"),
    (SUMS, None, "is incomplete: No such file or directory"),
]  # fmt: skip


def sealed(folder):
    """Give the files of a checkpoint the checksums that fit them."""
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in (W, S)]
    (folder / SUMS).write_text("".join(sums))


def warned_of(run):
    """The warnings of loading a run whose only checkpoint is bad, each of which names it; raises CheckpointError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return load_checkpoint(run)
        except CheckpointError as error:
            said = " ".join(str(w.message) for w in caught if w.category is RuntimeWarning)
            raise CheckpointError(f"{said} {error}") from None


def test_checkpoints(figure, tmp_path):
    pytest.importorskip("safetensors")
    outcomes = {}
    for n, (name, content, says) in enumerate(CHECKPOINTS):
        run = tmp_path / str(n)
        folder = save_checkpoint(run, Checkpoint(1, {"w": torch.ones(3)}, {"epoch": 1}))
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
            if name != SUMS:
                sealed(folder)
        outcomes[f"{n} {name}, {says}"] = refused(partial(warned_of, run), CheckpointError, says)
    for name, make in (
        ("a file for a folder", lambda place: place.write_text("")),
        ("a link to itself", lambda place: place.symlink_to(place)),
    ):
        place = tmp_path / name / "checkpoints" / "epoch-0001"
        place.parent.mkdir(parents=True)
        make(place)
        outcomes[name] = refused(partial(warned_of, tmp_path / name), CheckpointError, "is incomplete")
    (tmp_path / "digits" / "checkpoints" / "epoch-²").mkdir(parents=True)
    outcomes["a folder of another name"] = "" if load_checkpoint(tmp_path / "digits") is None else "was loaded"
    all_passed("checkpoints", outcomes, figure)


# Commands


TRAIN = [
    (["--dataset", "imagenet"], "dataset must be one of mnist5k"),
    (["--dataset", "folder:/nowhere"], "/nowhere/train/CLASS/*"),
    (["--dataset", "cifar10", "--data-root", "/nowhere"], "data_root must hold cifar10"),
    (["--gpus", "99"], "gpus must be at most"),
    (["--gpus", "1", "--cpu-ranks", "1"], "gpus must be 0 with cpu_ranks=1, got 1"),
    (["--cpu-ranks", "-1"], "cpu_ranks must be at least 0, got -1"),
    (["--loss", "hinge"], "invalid choice 'hinge'"),
    (["--model", "vgg"], "model must be one of convnet, resnet18"),
    (["--width", "32"], "width must be 64 with model convnet, which comes in one width, got 32"),
    (["--lr", "0"], "lr must be positive and finite, got 0.0"),
    (["--lr", "nan"], "lr must be positive and finite, got nan"),
    (["--lr", "fast"], "--lr"),
    (["--temperature", "-1"], "temperature must be positive and finite, got -1.0"),
    (["--epochs", "0"], "epochs must be at least 1, got 0"),
    (["--epochs"], "--epochs"),
    (["--bogus"], "--bogus"),
    (["--temperature", "1e-30"], "temperature must be at least 1.2e-07, got 1e-30"),
    (["--final-temperature", "1e-8"], "final_temperature must be at least 1.2e-07, got 1e-08"),
    (["--recipe", "secret"], "recipe must be auto, none or one of the "),
    (["--recipe", "cifar10-nnol"], "got 'cifar10-nnol', close to cifar10-nonl"),
    (["--resume", "auto"], "resume auto needs run_dir"),
    (["--resume", "/nowhere"], "resume must be auto, none or the folder of a run, got /nowhere"),
    (["--backend", "reference", "--cpu-ranks", "2"], "backend 'reference' must run on one rank, got 2"),
    (["--backend", "triton", "--cpu-ranks", "1"], "backend='triton' needs features on a GPU"),
    (["--cpu-ranks", "1000"], "every one of 1000 ranks two pictures, got batches of 128 from batch_size=128"),
    (["--cpu-ranks", "30", "--limit", "50"], "got batches of 50 from batch_size=128 and limit=50"),
    (["--batch-size", "1", "--limit", "20", "--dry-run"], "two pictures, got batches of 1"),
    (
        ["--batch-size", "50", "--limit", "50", "--accumulate", "30", "--dry-run"],
        "accumulate=30 chunks two pictures",
    ),
    (["--accumulate", "0"], "accumulate must be at least 1, got 0"),
    (["--queue", "-1"], "queue must be at least 0, got -1"),
    (["--loss", "normface", "--queue", "10"], "queue must be 0 with loss normface, got 10"),
    (["--anchor", "sample", "--queue", "10"], "queue must be 0 with anchor sample, which contrasts prototypes alone"),
    (["--loss", "scl", "--neck", "bn"], "neck must be none with loss scl, which has a --head, got bn"),
    (["--head", "conv"], "invalid choice 'conv'"),
    (["--loss", "ntce", "--anchor", "both"], "anchor must be prototype with loss ntce, got both"),
    (["--loss", "ce", "--temperature-rule", "learned"], "temperature_rule must be fixed with loss ce, got learned"),
    (
        ["--temperature", "0.07", "--temperature-rule", "learned"],
        "temperature must be between final_temperature=0.1 and 1 where it is learned, got 0.07",
    ),
    (
        ["--temperature", "2", "--temperature-rule", "learned"],
        "temperature must be between final_temperature=0.1 and 1 where it is learned, got 2.0",
    ),
    (["--loss", "scl", "--class-weights", "inverse"], "class_weights must be none with loss scl, got inverse"),
    (["--imbalance", "0"], "imbalance must be above 0 and at most 1, got 0.0"),
    (["--evaluate-every", "0"], "evaluate_every must be at least 1, got 0"),
]
ALL_COMMANDS = (train.main, evaluate.main, transfer.main, corruptions.main, table.main, report.main, demo.main, bench)


def changed(name, content):
    def change(run):
        (run / name).write_text(content)

    return change


def without(*names):
    def change(run):
        saved = load_checkpoint(run)
        tensors = {name: x for name, x in saved.tensors.items() if name not in names}
        state = {name: x for name, x in saved.state.items() if name not in names}
        save_checkpoint(run, replace(saved, tensors=tensors, state=state))

    return change


def with_tensor(name, value):
    def change(run):
        saved = load_checkpoint(run)
        save_checkpoint(run, replace(saved, tensors=saved.tensors | {name: value}))

    return change


def unfinished(change):
    def both(run):
        (run / "embeddings.safetensors").unlink()
        change(run)

    return both


DEEP = "[" * 100_000
CIFAR = ["--datasets", "cifar10", "--workers", "0"]
RUNS = [  # a command, what is wrong with its run, flags
    (report.main, lambda run: shutil.rmtree(run), [], "run folder does not exist"),
    (report.main, lambda run: (run / "metrics.jsonl").unlink(), [], "no metrics.jsonl"),
    (report.main, changed("metrics.jsonl", ""), [], "no finished epoch"),
    (report.main, changed("metrics.jsonl", "{}\n"), [], "line 1 is not"),
    (report.main, changed("metrics.jsonl", DEEP + "\n"), [], "line 1 is not"),
    (report.main, changed("metrics.jsonl", '{"epoch": "x"}\n'), [], "line 1 is not"),
    (report.main, changed("metrics.jsonl", '{"epoch": 1, "loss": ' + "9" * 400 + "}\n"), [], "line 1 is not"),
    (report.main, changed("metrics.jsonl", '{"epoch": 1, "loss": 1e308}\n'), [], "line 1 is not"),
    (report.main, changed("config.yaml", "lr: ["), [], "must be readable YAML"),
    (report.main, changed("embeddings.safetensors", "nothing"), [], "is damaged or incomplete"),
    (table.main, changed("config.yaml", "lr: ["), ["3"], "must be readable YAML"),
    (table.main, changed("config.yaml", "epoch: 3"), ["3"], "must hold known settings only, got epoch"),
    (table.main, changed("metrics.jsonl", DEEP + "\n"), ["3"], "line 1 is not"),
    (table.main, changed("evaluation.json", "{"), ["3"], "must be readable JSON"),
    (table.main, changed("evaluation.json", "[]"), ["3"], "must hold a JSON object, got list"),
    (table.main, changed("evaluation.json", '{"results": [{"method": []}]}'), ["3"], "must hold a list of results"),
    (table.main, changed("transfer.json", DEEP), ["4"], "must be readable JSON"),
    (evaluate.main, lambda run: (run / "config.yaml").unlink(), [], "RUN must be the folder of a run"),
    (evaluate.main, lambda run: shutil.rmtree(run / "checkpoints"), [], "must hold a checkpoint"),
    (evaluate.main, changed("config.yaml", "model: timm:../x\n"), [], "model"),
    (evaluate.main, changed("config.yaml", "model: os.system\n"), [], "model must be one of convnet"),
    (evaluate.main, with_tensor("head.prototypes", torch.ones(3, 3)), [], "must hold the network that config.yaml"),
    (transfer.main, changed("transfer.json", DEEP), CIFAR, "must hold results of this command"),
    (transfer.main, without("mean"), CIFAR, "got no mean"),
    (transfer.main, without("class_means"), CIFAR, "got no class_means"),
    (transfer.main, with_tensor("class_means", torch.tensor(1.0)), CIFAR, "must hold class_means [K, D], mean"),
    (transfer.main, with_tensor("mean", torch.ones(7)), CIFAR, "must hold class_means [K, D], mean"),
    (transfer.main, with_tensor("image_size", torch.tensor(2**40)), CIFAR, "must hold class_means [K, D], mean"),
    (transfer.main, with_tensor("image_size", torch.ones(7)), CIFAR, "must hold class_means [K, D], mean"),
    (corruptions.main, changed("corruptions.json", DEEP), ["--reference", "RUN"], "must be as hypercontrast.corruptions wrote it"),
    (train.main, unfinished(without("optimizer")), ["--resume"], "must hold a run's state, got no optimizer"),
    (train.main, unfinished(without("class_means")), ["--resume"], "must hold a run's state, got no class_means"),
    (train.main, unfinished(without("unfinished")), ["--resume"], "must hold a run's state, got no unfinished"),
    (train.main, unfinished(with_tensor("head.prototypes", torch.ones(3, 3))), ["--resume"], "must hold the network that config.yaml"),
    (train.main, lambda run: None, ["--resume"], "holds a finished run"),
    (train.main, unfinished(changed("config.yaml", "lr: [")), ["--resume"], "must be readable YAML"),
]  # fmt: skip


def told(main, argv, capsys, says, codes=(2,)):
    """What is wrong with how a command fails: it must exit with one line on stderr that says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checkpoints that are passed over
            code = main(argv)
    except BaseException as raised:
        return f"raised {type(raised).__name__}: {raised}"
    out, err = capsys.readouterr()
    fine = code in codes and out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err
    return "" if fine else f"exit code {code}, {out!r}, {err!r}, not {says!r}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, as small as one can be."""
    for extra in ("mlxtend", "safetensors", "yaml", "tyro"):
        pytest.importorskip(extra)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run") / "run"
    options = {"epochs": 1, "warmup_epochs": 0, "limit": 20, "batch_size": 20, "cpu_ranks": 1, "quiet": True}
    return train.train(configure(run_dir=str(folder), **options))


def test_commands(figure, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    outcomes = {}
    for argv, says in TRAIN:
        outcomes[f"train {' '.join(argv)}"] = told(train.main, argv, capsys, says)
    assert list(tmp_path.iterdir()) == []
    for main in ALL_COMMANDS:
        name = main.__module__
        outcomes[f"{name} --bogus"] = told(main, ["--bogus"], capsys, "")
        outcomes[f"{name} of no name"] = told(main, ["\0"], capsys, "")
        outcomes[f"{name} of a long name"] = told(main, ["a" * 5000], capsys, "")
    for main in (evaluate.main, transfer.main, corruptions.main, table.main, report.main):
        outcomes[f"{main.__module__} of nothing"] = told(main, [], capsys, "are required")
    outcomes["bench of nothing that there is"] = told(bench, ["cook"], capsys, "the command must be one of matrix")
    outcomes["table 99"] = told(table.main, ["99"], capsys, "table must be 1 to 14")
    for n, (main, change, flags, says) in enumerate(RUNS):
        folder = shutil.copytree(run, tmp_path / f"{n}" / "run")
        change(folder)
        flags = [str(folder) if flag == "RUN" else flag for flag in flags]
        argv = [*flags, str(folder)] if main in (table.main, train.main) else [str(folder), *flags]
        if main is transfer.main:
            argv += ["--data-root", str(cifar(tmp_path / "data"))]
        # A checkpoint that does not fit ends a run that would go on with code 1, a command that reads it with 2.
        outcomes[f"{n} {main.__module__}, {says}"] = told(main, argv, capsys, says, codes=(1, 2))
    all_passed("commands", outcomes, figure)


@pytest.mark.parametrize("main", [train.main, evaluate.main, transfer.main, corruptions.main, table.main, report.main])
def test_a_folder_that_cannot_be_read(main, tmp_path, monkeypatch, capsys):
    """As one of another user: root may read all, so the system's answer is a made one."""
    folder, real = str(tmp_path / "run"), os.stat

    def stat(path, **options):
        if str(path).startswith(folder):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    argvs = {train.main: [["--resume", folder], ["--run-dir", folder]], table.main: [["1", folder]]}
    for argv in argvs.get(main, [[folder]]):
        assert told(main, argv, capsys, f"{folder} cannot be read: Permission denied") == ""


def test_files_that_cannot_be_read_or_written(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    for argv in (["--run-dir", str(tmp_path / "file")], ["--run-dir", str(tmp_path / "file" / "run")]):
        assert told(train.main, [*argv, "--quiet"], capsys, f"{argv[1]} cannot be written: ") == ""
    output = str(tmp_path / "file" / "page.html")
    assert told(report.main, [str(run), "--output", output], capsys, f"{output} cannot be written: ") == ""
    assert told(table.main, ["figure2", str(run), "--output", output], capsys, f"{output} cannot be written: ") == ""


def cifar(root):
    if not root.exists():
        for split in ("train", "test"):
            write_parquet(root / "cifar10" / f"{split}.parquet", [encoded(seed=n) for n in range(20)], [*range(10)] * 2)
    return root


# What else an error owes


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
