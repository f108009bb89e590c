"""Neural-collapse metrics against closed forms, an oracle in NumPy, and themselves under every invariance they have."""

import math
from functools import partial

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hypercontrast import metrics as measures
from hypercontrast._agreement import LostRankError
from hypercontrast.metrics import DESCRIPTIONS, NeuralCollapse, neural_collapse

close = partial(pytest.approx, rel=1e-9, abs=1e-9)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def etf(num_classes):
    return torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes


def frame(num_classes):
    return torch.eye(num_classes, dtype=torch.float64)


def collapsed(points, per_class=3):
    labels = torch.arange(len(points)).repeat(per_class)
    return points[labels], labels


def sample(seed=0, num_classes=5, dim=7, size=60, spread=0.7, dtype=torch.float64):
    """Noisy off-centre clusters in which every class occurs, unevenly, and prototypes near them."""
    rng = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=rng, dtype=torch.float64)
    centres = normal(num_classes, dim) + 0.3
    labels = torch.cat([torch.arange(num_classes), torch.randint(num_classes, (size - num_classes,), generator=rng)])
    features = (centres[labels] + spread * normal(size, dim)) * (0.1 + 3 * torch.rand(size, 1, generator=rng))
    return features.to(dtype), labels, (centres + 0.3 * normal(num_classes, dim)).to(dtype)


def assert_same(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


def streamed(features, labels, prototypes, chunks, **options):
    metrics = NeuralCollapse(len(prototypes), features.shape[1], **options)
    for z, y in zip(features.split(chunks), labels.split(chunks), strict=True):
        metrics.update(z, y)
    return metrics.compute(prototypes)


# The oracle: each definition spelt out with the whole data set and full covariances at hand.


def np_unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def np_entropy(p):
    p = p[p > 0] / p.sum()
    return -(p * np.log(p)).sum()


def np_erank(rows, eps=0.0):
    s = np.linalg.svd(np.cov(rows.T, bias=True), compute_uv=False)
    return np.exp(np_entropy(s / s.sum() + eps))


def np_information(a, b):
    h_a, h_b, h_ab = (
        np_entropy(np.linalg.eigvalsh(g).clip(1e-14) / len(g)) for g in (a @ a.T, b @ b.T, (a @ a.T) * (b @ b.T))
    )
    return {"hdr": abs(h_a - h_b) / max(h_a, h_b), "mir": (h_a + h_b - h_ab) / min(h_a, h_b)}


def np_pairs(gram):
    return gram[~np.eye(len(gram), dtype=bool)]


def np_nc2(prefix, centred):
    lengths, cosines = np.linalg.norm(centred, axis=1), np_pairs(np_unit(centred) @ np_unit(centred).T)
    return {
        f"{prefix}_norm_cv": lengths.std() / lengths.mean(),
        f"{prefix}_angle_std": cosines.std(),
        f"{prefix}_angle_mean": np.abs(cosines + 1 / (len(centred) - 1)).mean(),
    }


def oracle(features, labels, prototypes, compat=False):
    u, y, w = np_unit(features.double().numpy()), labels.numpy(), np_unit(prototypes.double().numpy())
    num_classes = len(w)
    eps = 1e-7 if compat else 0.0
    means = np.stack([u[y == c].mean(0) for c in range(num_classes)])
    directions, centred, centred_w = np_unit(means), means - means.mean(0), w - w.mean(0)
    if compat:
        information = np_information(w, np_unit(directions - np_unit(u.mean(0))))
    else:
        information = np_information(np_unit(centred_w), np_unit(centred))
    within = (u - means[y]).T @ (u - means[y]) / len(u)
    between = centred.T @ centred / num_classes
    nearest, predicted = (u @ directions.T).argmax(1), (u @ w.T).argmax(1)
    cosines = np_pairs(directions @ directions.T)
    simplex = (num_classes * np.eye(num_classes) - 1) / (num_classes - 1)

    def distance(rows, ideal):
        return np.linalg.norm(rows @ rows.T - ideal) / np.linalg.norm(ideal)

    return {
        "intra_erank": np.mean([np_erank(u[y == c], eps) if (y == c).sum() > 1 else 0 for c in range(num_classes)]),
        "inter_erank": np_erank(means, eps),
        "weight_erank": np_erank(w, eps),
        "instance_alignment": ((u - w[y]) ** 2).sum(1).mean(),
        "weight_alignment": ((w - directions) ** 2).sum(1).mean(),
        **information,
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / num_classes,
        **np_nc2("nc2", centred),
        **np_nc2("nc2_weight", centred_w),
        "nc3": np.linalg.norm(centred_w / np.linalg.norm(centred_w) - centred / np.linalg.norm(centred)),
        "nc4": (nearest != predicted).mean(),
        "nearest_mean_accuracy": (nearest == y).mean(),
        "cos_mean": cosines.mean(),
        "cos_std": cosines.std(),
        "distance_etf": distance(directions, simplex),
        "distance_frame": distance(directions, np.eye(num_classes)),
        "weight_distance_etf": distance(w, simplex),
        "classes_seen": num_classes,
        "samples": len(u),
        "samples_kept": len(u),
    }


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(
    ("num_classes", "dim", "size"),
    [(5, 7, 60), (3, 40, 50), (12, 5, 300), (2, 3, 9), (10, 64, 40)],  # K < D, n_c < D, K > D, two classes, few samples
)
def test_every_metric_matches_its_definition(num_classes, dim, size, compat):
    features, labels, prototypes = sample(1, num_classes, dim, size)
    expected = oracle(features, labels, prototypes, compat)
    if num_classes == 2 and not compat:
        expected["hdr"] = expected["mir"] = 0.0  # two opposite points: both entropies vanish
    # Samples are kept as float32, which within-class ranks feel in the eighth digit.
    assert_same(neural_collapse(features, labels, prototypes, compat=compat), expected, tolerance=1e-6)


@pytest.mark.parametrize(("num_classes", "mir"), [(10, 0.9524), (100, 0.9978)])
def test_simplex_etf_is_ideal_in_everything(num_classes, mir):
    points = etf(num_classes)
    result = neural_collapse(*collapsed(points), 3 * points)
    k = num_classes - 1
    ideal = dict.fromkeys(DESCRIPTIONS, 0.0) | {
        "inter_erank": k,
        "weight_erank": k,
        "mir": 1 / k + (k - 1) * math.log(k - 1) / (k * math.log(k)),
        "nearest_mean_accuracy": 1.0,
        "cos_mean": -1 / k,
        "distance_frame": 1 / math.sqrt(k),
        "classes_seen": num_classes,
        "samples": 3 * num_classes,
        "samples_kept": 3 * num_classes,
    }
    assert_same(result, ideal, tolerance=1e-7)
    assert result["mir"] == pytest.approx(mir, abs=5e-5)


@pytest.mark.parametrize(
    ("num_classes", "hdr", "mir", "alignment"), [(10, 0.0496, 0.9516, 0.1026), (100, 0.3002, 0.9972, 0.0100)]
)
def test_orthogonal_frame_is_the_best_of_non_negative_features(num_classes, hdr, mir, alignment):
    features, labels = collapsed(frame(num_classes))
    result = neural_collapse(features, labels, etf(num_classes))
    assert result["distance_frame"] == close(0)
    assert result["distance_etf"] == close(1 / math.sqrt(num_classes))
    assert result["weight_distance_etf"] == close(0)
    assert result["weight_alignment"] == close(2 - 2 * math.sqrt((num_classes - 1) / num_classes))
    assert result["weight_alignment"] == pytest.approx(alignment, abs=5e-5)
    # Centring turns the frame into a simplex, so whatever centres finds nothing wrong ...
    assert result["inter_erank"] == close(num_classes - 1)
    for key in ("hdr", "nc2_norm_cv", "nc2_angle_std", "nc2_angle_mean", "nc3", "cos_mean", "cos_std"):
        assert result[key] == close(0), key
    # ... except at the wrong centre, which the public code takes.
    compat = neural_collapse(features, labels, etf(num_classes), compat=True)
    assert compat["hdr"] == pytest.approx(hdr, abs=5e-5)
    assert compat["mir"] == pytest.approx(mir, abs=5e-5)
    assert compat["inter_erank"] == pytest.approx(num_classes - 1, abs=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("copies", [1, 10])  # fewer and more samples a class than dimensions
def test_within_class_rank_of_a_known_perturbation(rank, copies):
    """Samples cos θ e_c ± sin θ v_j, with v_j orthogonal to every mean, vary in `rank` directions alike."""
    axes = torch.eye(12, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    nudges = (signs[:, None, None] * axes[4 : 4 + rank]).flatten(0, 1).repeat(copies, 1)
    features = math.cos(0.01) * axes[:4, None] + math.sin(0.01) * nudges
    labels = torch.arange(4)[:, None].expand(-1, len(nudges))
    result = neural_collapse(features.flatten(0, 1), labels.flatten())
    assert result["intra_erank"] == pytest.approx(rank, rel=1e-6)
    assert result["nc1"] == close(0)  # the means differ in none of those directions
    assert result["instance_alignment"] == close(2 - 2 * math.cos(0.01))


def test_within_class_rank_weighs_directions_by_their_variance():
    """Variances 4 : 1 have entropy log 5 − (4/5) log 4."""
    axes = torch.eye(4, dtype=torch.float64)
    angles = torch.tensor([0.02, 0.01], dtype=torch.float64)
    nudges = torch.cat([angles.sin()[:, None] * axes[2:], -angles.sin()[:, None] * axes[2:]])
    result = neural_collapse(axes[0] + nudges, torch.zeros(4, dtype=torch.int64))
    # Projecting to the sphere bends the two directions by a relative 1e-4.
    assert result["intra_erank"] == pytest.approx(5 / 4**0.8, rel=1e-3)


@quick
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(2, 9), st.booleans())
def test_rotating_everything_changes_nothing(seed, num_classes, dim, compat):
    features, labels, prototypes = sample(seed, num_classes, dim)
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.manual_seed(seed)))
    plain = neural_collapse(features, labels, prototypes, compat=compat)
    rotated = neural_collapse(features @ rotation, labels, prototypes @ rotation, compat=compat)
    assert_same(rotated, plain, tolerance=1e-5)


@quick
@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_names_and_order_of_the_classes_do_not_matter(seed, num_classes, compat):
    features, labels, prototypes = sample(seed, num_classes)
    name = torch.randperm(num_classes, generator=torch.manual_seed(seed))
    order = torch.randperm(len(labels), generator=torch.manual_seed(seed))
    plain = neural_collapse(features, labels, prototypes, compat=compat)
    shuffled = neural_collapse(features[order], name[labels][order], prototypes[name.argsort()], compat=compat)
    assert_same(shuffled, plain, tolerance=1e-9)


@quick
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.booleans())
def test_lengths_of_features_and_prototypes_do_not_matter(seed, scale, compat):
    features, labels, prototypes = sample(seed)
    plain = neural_collapse(features, labels, prototypes, compat=compat)
    scaled = neural_collapse(features * scale, labels, prototypes / scale, compat=compat)
    assert_same(scaled, plain, tolerance=1e-6)


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(0, 30), min_size=1, max_size=8), st.booleans())
def test_streaming_equals_one_shot_for_any_chunks(seed, chunks, compat):
    features, labels, prototypes = sample(seed, size=sum(chunks) + 5)
    expected = neural_collapse(features, labels, prototypes, compat=compat)
    assert_same(streamed(features, labels, prototypes, [*chunks, 5], compat=compat), expected)


@quick
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 20), st.booleans())
def test_any_labels_give_finite_values_within_their_bounds(seed, num_classes, dim, size, compat):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randint(-1, 2, (size + 1, dim), generator=rng).float()  # zeros, duplicates and opposites abound
    labels = torch.randint(num_classes, (size + 1,), generator=rng)
    prototypes = torch.randint(-1, 2, (num_classes, dim), generator=rng).float()
    result = neural_collapse(features, labels, prototypes, compat=compat)
    assert result.keys() == DESCRIPTIONS.keys()
    for key, value in result.items():
        assert math.isfinite(value), key
        assert value >= (-1 - 1e-9 if key == "cos_mean" else -1e-9 if key != "mir" else -2), key
    for key in ("hdr", "nc4", "nearest_mean_accuracy"):
        assert result[key] <= 1 + 1e-9, key
    for key in ("intra_erank", "inter_erank", "weight_erank"):
        assert result[key] <= dim + 1e-9, key


def test_a_batch_may_be_empty_and_reset_forgets():
    features, labels, prototypes = sample()
    metrics = NeuralCollapse(5, 7)
    metrics.update(features[:0], labels[:0])
    metrics.update(features + 100, labels)
    metrics.reset()
    metrics.update(features, labels)
    metrics.update(features[:0], labels[:0])
    assert_same(metrics.compute(prototypes), neural_collapse(features, labels, prototypes))
    assert_same(metrics.compute(prototypes), neural_collapse(features, labels, prototypes))  # compute only reads


def test_past_the_memory_budget_only_what_needs_samples_is_estimated():
    features, labels, prototypes = sample(size=200)
    quota = 6
    result = streamed(features, labels, prototypes, 17, memory_budget=quota * prototypes.numel() * 4 + 3)
    full = neural_collapse(features, labels, prototypes)
    first = torch.cat([(labels == c).nonzero().flatten()[:quota] for c in range(5)])
    assert result["samples_kept"] == len(first) == 5 * quota
    assert result["intra_erank"] == close(neural_collapse(features[first], labels[first])["intra_erank"])
    estimated = {"intra_erank", "nc4", "nearest_mean_accuracy", "samples_kept"}
    assert result["intra_erank"] != close(full["intra_erank"])
    for key in DESCRIPTIONS.keys() - estimated:
        assert result[key] == close(full[key]), key


@pytest.mark.parametrize("block", [1, 2, 7])
def test_blocks_of_cosines_change_nothing(block, monkeypatch):
    features, labels, prototypes = sample(num_classes=7, size=90)
    whole = neural_collapse(features, labels, prototypes)
    monkeypatch.setattr(measures, "BLOCK", block)
    assert_same(neural_collapse(features, labels, prototypes), whole)


def test_without_mir_nothing_grows_with_the_square_of_the_classes(monkeypatch):
    """Past so many classes mir is left out, and all else is there."""
    num_classes, dim, largest = 1500, 3, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            results = func(*args, **(kwargs or {}))
            for result in results if isinstance(results, tuple) else (results,):
                if isinstance(result, torch.Tensor):
                    largest = max(largest, result.numel())
            return results

    labels = torch.arange(2 * num_classes) % num_classes
    features, prototypes = torch.randn(2 * num_classes, dim), torch.randn(num_classes, dim)
    whole = neural_collapse(features, labels, prototypes)
    monkeypatch.setattr(measures, "MAX_MIR_CLASSES", num_classes - 1)
    with Largest():
        found = neural_collapse(features, labels, prototypes)
    assert largest == measures.BLOCK * num_classes
    assert whole.keys() - found.keys() == {"mir"}
    assert_same(found, {key: whole[key] for key in found})


def test_unseen_classes_are_left_out_with_their_prototypes():
    features, labels, prototypes = sample(num_classes=4)
    name = torch.tensor([0, 2, 3, 6])
    wide = torch.full((8, 7), -1.0, dtype=torch.float64)  # opposite to every sample's half-space: never the nearest
    wide[name] = prototypes
    result = neural_collapse(features, name[labels], wide)
    compact = neural_collapse(features, labels, prototypes)
    assert result["classes_seen"] == 4
    for key in DESCRIPTIONS.keys() - {"nc4"}:
        assert result[key] == close(compact[key]), key


def test_nc4_counts_samples_that_prototypes_send_to_an_unseen_class():
    features, labels = collapsed(frame(3)[:2], per_class=2)
    prototypes = torch.stack([frame(3)[2], frame(3)[1], frame(3)[0]])  # class 0's samples are drawn to unseen class 2
    assert neural_collapse(features, labels, prototypes)["nc4"] == 0.5


def test_of_many_classes_one_matrix_has_its_eigenvalues_taken(monkeypatch):
    """All others are of D x D, or of a class's samples."""
    sizes = []
    original = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: sizes.append(len(x)) or original(x))
    neural_collapse(torch.randn(80, 3), torch.arange(80) % 40, torch.randn(40, 3))
    assert sizes.count(40) == 1


def test_without_prototypes_the_class_means_stand_in():
    features, labels, _ = sample()
    result = neural_collapse(features, labels)
    means = torch.stack([torch.nn.functional.normalize(features[labels == c], dim=1).mean(0) for c in range(5)])
    against_means = neural_collapse(features, labels, means)
    left_out = {"hdr", "nc3", "nc4"} | {key for key in DESCRIPTIONS if "weight" in key}
    assert result.keys() == DESCRIPTIONS.keys() - left_out
    for key in ("instance_alignment", "inter_erank", "nc1", "distance_etf", "cos_std"):
        assert result[key] == close(against_means[key]), key
    for key in ("weight_alignment", "nc4"):
        assert against_means[key] == close(0), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_float_types_are_measured_as_they_stand(dtype):
    features, labels, prototypes = sample(dtype=dtype)
    assert_same(
        neural_collapse(features, labels, prototypes),
        neural_collapse(features.double(), labels, prototypes.double()),
    )


def test_rounding_to_float32_does_not_look_like_spread():
    """Features of one direction but different lengths: unit vectors that differ by rounding alone."""
    points = torch.randn(4, 64, generator=torch.manual_seed(0))
    labels = torch.arange(4).repeat(50)
    features = points[labels] * torch.rand(200, 1, generator=torch.manual_seed(1))
    result = neural_collapse(features, labels)
    assert result["intra_erank"] == 0
    assert result["nc1"] < 1e-12


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(
    "points",
    [etf(6), frame(6), torch.ones(6, 4), torch.zeros(3, 4), torch.ones(1, 3), torch.tensor([[1.0], [-1.0]])],
    ids=["etf", "frame", "all equal", "all zero", "one class", "one dimension"],
)
@pytest.mark.parametrize("per_class", [1, 4])
def test_degenerate_states_are_finite(points, per_class, compat):
    features, labels = collapsed(points, per_class)
    for prototypes in (None, points, torch.zeros_like(points)):
        result = neural_collapse(features, labels, prototypes, compat=compat)
        assert all(math.isfinite(value) for value in result.values()), result
        assert result["intra_erank"] == 0
        assert 0 <= result["nc1"] < 1e-9


def test_a_zero_prototype_is_one_away_from_every_sample():
    features, labels, prototypes = sample()
    result = neural_collapse(features, labels, 0 * prototypes)
    assert result["instance_alignment"] == close(1)
    assert result["weight_alignment"] == close(1)


ROW = torch.tensor([2])
BAD_BATCHES = {
    "labels must lie in [0, 5), got 5": lambda z, y: (z, y + 1),
    "labels must lie in [0, 5), got -100": lambda z, y: (z, y.index_fill(0, ROW, -100)),
    f"labels must lie in [0, 5), got {2**40}": lambda z, y: (z, y.index_fill(0, ROW, 2**40)),
    "labels must be int64, got torch.int32: pass labels.long()": lambda z, y: (z, y.int()),
    "labels must have shape [60] to match features, got [59]": lambda z, y: (z, y[1:]),
    "features must have dimension 7, got [60, 6]": lambda z, y: (z[:, 1:], y),
    "features must have shape [N, D], got [420]": lambda z, y: (z.flatten(), y),
    "features must be float32, bfloat16, float16 or float64, got torch.int64": lambda z, y: (z.long(), y),
    "features must have finite norms, got nan in row 2": lambda z, y: (z.index_fill(0, ROW, torch.nan), y),
    "features must have finite norms, got inf in row 2": lambda z, y: (z.index_fill(0, ROW, -torch.inf), y),
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_a_bad_batch_is_refused_whole(message):
    features, labels, prototypes = sample()
    metrics = NeuralCollapse(5, 7)
    metrics.update(features, labels)
    with pytest.raises((ValueError, TypeError)) as error:
        metrics.update(*BAD_BATCHES[message](features, labels))
    assert str(error.value) == message
    assert_same(metrics.compute(prototypes), neural_collapse(features, labels, prototypes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y, w: NeuralCollapse(5, 7).compute(w), "at least one sample, got 0"),
        (lambda z, y, w: neural_collapse(z[:0], y[:0]), "at least one sample, got 0"),
        (lambda z, y, w: neural_collapse(z, y - 1), r"labels must lie in .*, got -1"),
        (lambda z, y, w: neural_collapse(z, y, w[:4]), r"labels must lie in \[0, 4\), got 4"),
        (lambda z, y, w: neural_collapse(z, y, w[:, 1:]), r"prototypes must have shape \[5, 7\], got \[5, 6\]"),
        (lambda z, y, w: neural_collapse(z, y, w / 0), "prototypes must have finite norms"),
        (lambda z, y, w: NeuralCollapse(0, 7), "dim and num_classes must be at least 1, got 7 and 0"),
        (lambda z, y, w: NeuralCollapse(5, 7, memory_budget=279), "memory_budget .* 280 bytes, got 279"),
    ],
)
def test_errors_name_argument_rule_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(*sample())


def test_descriptions_are_complete_sentences():
    for key, (title, sentence, ideal) in DESCRIPTIONS.items():
        assert title, key
        assert sentence.endswith("."), key
        assert ideal, key


def test_a_gradient_is_neither_needed_nor_kept():
    features, labels, prototypes = sample()
    metrics = NeuralCollapse(5, 7)
    metrics.update(features.requires_grad_(), labels)
    assert all(isinstance(value, float) for value in metrics.compute(prototypes.requires_grad_()).values())
    assert not metrics._kept[0][0].requires_grad


# Ranks: sizes are uneven and one rank is empty; the second budget does not hold all samples of all ranks.


def _of_rank(rank, world, sizes, budget):
    features, labels, prototypes = sample(3, size=sum(sizes))
    metrics = NeuralCollapse(5, 7, memory_budget=budget)
    metrics.update(features.split(sizes)[rank], labels.split(sizes)[rank])
    metrics.all_reduce()
    return metrics.compute(prototypes)


@pytest.mark.parametrize("budget", [2**20, 8 * 5 * 7 * 4])
def test_ranks_together_equal_one_process(tmp_path, budget):
    sizes = [50, 0, 21]
    features, labels, prototypes = sample(3, size=sum(sizes))
    expected = streamed(features, labels, prototypes, sizes, memory_budget=budget)
    assert (expected["samples_kept"] < expected["samples"]) == (budget < 2**20)
    for of_rank in ranks.spawn(_of_rank, len(sizes), tmp_path, sizes, budget):
        assert_same(of_rank, expected, tolerance=1e-12)


def _disagreeing_rank(rank, world):
    with pytest.raises(
        ValueError, match=r"every rank must make the same call, got NeuralCollapse.all_reduce of \[5, 7\]"
    ):
        NeuralCollapse(5, 7 + rank).all_reduce()


def test_ranks_that_disagree_all_raise(tmp_path):
    ranks.spawn(_disagreeing_rank, 2, tmp_path)


def test_one_process_alone_needs_no_group():
    features, labels, prototypes = sample()
    metrics = NeuralCollapse(5, 7)
    metrics.update(features, labels)
    metrics.all_reduce()
    assert_same(metrics.compute(prototypes), neural_collapse(features, labels, prototypes))


def test_a_rank_lost_in_the_last_exchange_leaves_the_statistics_as_they_were(monkeypatch):
    """As seen by rank 0 of two that saw the same, when the sums have been reduced already."""
    features, labels, prototypes = sample()
    metrics = NeuralCollapse(5, 7)
    metrics.update(features, labels)
    before = metrics.compute(prototypes)

    def lost(*_):
        raise LostRankError("rank 0 of 2 lost the connection to another rank")

    for name, fake in (
        ("resolve_group", lambda group: "both ranks"),
        ("agree", lambda *_: None),
        ("world_size", lambda group: 2),
        ("gather_rows", lambda x, rows, group: torch.cat([x, x])),
        ("dist.all_reduce", lambda x, group: x.mul_(2)),
        ("dist.get_rank", lambda group: 0),
        ("_exchange", lost),
    ):
        monkeypatch.setattr(f"hypercontrast.metrics.{name}", fake)
    with pytest.raises(LostRankError):
        metrics.all_reduce()
    assert metrics.compute(prototypes) == before
