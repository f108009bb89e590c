"""Neural-collapse metrics: how close features, class means and prototypes are to the ideal frames.

Everything lives on the unit sphere, where the losses live: features enter as u = z/|z| and prototypes as
ŵ = w/|w|. Papyan et al. (2020) measure raw features; on unit ones their definitions read

    μ_c = mean of the u of class c (not renormalised), μ_G = mean_c μ_c, every class once; μ̂_c = μ_c/|μ_c|;
    "centred" is μ_c − μ_G for class means and ŵ_c − mean_c ŵ_c for prototypes.

Classes without samples are left out, with their prototypes; K below is the number of classes seen. Means over
classes weigh classes equally, means over samples weigh samples equally.

What is streamed: counts [K], sums of u [K, D] and Σ u uᵀ [D, D], float64, from which every metric but three
follows exactly. Three need samples: intra_erank (a covariance per class), nc4 and nearest_mean_accuracy (a
decision per sample, known only once the means are). For these the first samples of each class are kept as float32
unit vectors within a memory budget; when it is passed, the three describe the kept samples alone, and
`samples_kept` < `samples` says so.

Shapes: N samples, K classes, D dimensions. Source: arXiv 2605.20302 and Papyan, Han, Donoho (PNAS 2020).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hypercontrast import _checks
from hypercontrast._agreement import agree, connected
from hypercontrast.distributed import gather_rows, resolve_group, world_size
from hypercontrast.reference import unit_rows

# Squared length on the unit sphere that counts as none. Rounding features to float32 leaves about 1e-15.
NEGLIGIBLE = 1e-12

# What the paper's public code adds to each normalised singular value before taking the entropy.
COMPAT_EPS = 1e-7


class Description(NamedTuple):
    title: str
    sentence: str
    ideal: str  # the value at a simplex ETF of K classes


DESCRIPTIONS: dict[str, Description] = {
    "intra_erank": Description(
        "Within-class effective rank",
        "How many directions the samples of one class spread over, on average; 0 once a class is a single point.",
        "0",
    ),
    "inter_erank": Description(
        "Class-mean effective rank", "How many directions the class means span, evenly used.", "K − 1"
    ),
    "weight_erank": Description(
        "Prototype effective rank", "How many directions the prototypes span, evenly used.", "K − 1"
    ),
    "instance_alignment": Description(
        "Instance alignment", "Mean squared distance from a sample to the prototype of its class.", "0"
    ),
    "weight_alignment": Description(
        "Weight alignment", "Mean squared distance from a prototype to the mean of its class.", "0"
    ),
    "hdr": Description(
        "Entropy difference (HDR)",
        "Relative gap between the matrix entropies of the prototypes and of the class means.",
        "0",
    ),
    "mir": Description(
        "Mutual information (MIR)",
        "Information that prototypes and class means share, as a part of the smaller of their entropies.",
        "1/(K−1) + (K−2)·log(K−2)/((K−1)·log(K−1)): .9524 for K = 10, .9978 for K = 100",
    ),
    "nc1": Description(
        "NC1, variability collapse", "Spread inside the classes, measured against the spread between them.", "0"
    ),
    "nc2_norm_cv": Description("NC2, equal lengths", "Relative spread of the lengths of the centred class means.", "0"),
    "nc2_angle_std": Description("NC2, equal angles", "Spread of the cosines between the centred class means.", "0"),
    "nc2_angle_mean": Description(
        "NC2, widest angles", "Mean gap between the cosines of the centred class means and −1/(K−1).", "0"
    ),
    "nc2_weight_norm_cv": Description(
        "NC2 of prototypes, equal lengths", "Relative spread of the lengths of the centred prototypes.", "0"
    ),
    "nc2_weight_angle_std": Description(
        "NC2 of prototypes, equal angles", "Spread of the cosines between the centred prototypes.", "0"
    ),
    "nc2_weight_angle_mean": Description(
        "NC2 of prototypes, widest angles",
        "Mean gap between the cosines of the centred prototypes and −1/(K−1).",
        "0",
    ),
    "nc3": Description(
        "NC3, self-duality",
        "Distance between the prototypes and the class means, both centred and scaled to one size.",
        "0",
    ),
    "nc4": Description(
        "NC4, nearest mean decides",
        "Share of samples whose nearest class mean and nearest prototype name different classes.",
        "0",
    ),
    "nearest_mean_accuracy": Description(
        "Nearest-mean accuracy", "Share of samples whose nearest class mean is that of their own class.", "1"
    ),
    "cos_mean": Description(
        "Mean cosine of class means", "Average cosine between the means of two different classes.", "−1/(K−1)"
    ),
    "cos_std": Description(
        "Spread of class-mean cosines",
        "How unequal the cosines between the class means are; small too when all of them crowd into one cone.",
        "0",
    ),
    "distance_etf": Description(
        "Distance to the simplex ETF",
        "Relative difference between the cosines of the class means and those of a simplex.",
        "0",
    ),
    "distance_frame": Description(
        "Distance to the orthogonal frame",
        "Relative difference between the class means' cosines and right angles, the best for non-negative features.",
        "1/√(K−1), and 0 at an orthogonal frame",
    ),
    "weight_distance_etf": Description(
        "Prototypes' distance to the simplex ETF",
        "Relative difference between the cosines of the prototypes and those of a simplex.",
        "0",
    ),
    "classes_seen": Description("Classes seen", "Classes with at least one sample; the others are left out.", "K"),
    "samples": Description("Samples", "Samples that were measured.", "all"),
    "samples_kept": Description(
        "Samples kept",
        "Samples behind the within-class rank, NC4 and nearest-mean accuracy; fewer when memory ran out.",
        "all",
    ),
}


class NeuralCollapse:
    """Streaming neural-collapse metrics: `update` over batches, `all_reduce` over ranks once, `compute`.

    Args:
        num_classes, dim: K and D.
        compat: give the numbers of the paper's public code. It adds 1e-7 to each normalised singular value of an
            effective rank; for HDR and MIR it leaves the prototypes uncentred and centres the class directions
            at the unit-normalised mean of all samples. (It never returns when a class has no spread; here that
            gives 0 in both modes.)
        memory_budget: bytes for kept samples, shared equally by the classes; see the module's text. The default,
            1 GiB, keeps all of CIFAR-100 at D = 512 and 131 samples a class of ImageNet at D = 2048.
        device: where the statistics live (it must know float64); batches are moved there.

    What is held is K x D and D x D numbers and the kept samples. `compute` takes several times K x K numbers more and,
    for the eigenvalues of one such matrix, time that grows with K³: 1.1 GiB at 6,000 classes.

    Raises ValueError when the sizes are not positive or the budget is below two samples a class or not finite,
    TypeError when the sizes are no integers or the budget is no number.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        compat: bool = False,
        memory_budget: int = 2**30,
        device: torch.device | str = "cpu",
    ) -> None:
        _checks.check_sizes(dim, num_classes)
        bytes_per_slot = num_classes * dim * torch.float32.itemsize
        _checks.check_number("memory_budget", memory_budget, "a number of bytes")
        if not 2 * bytes_per_slot <= memory_budget < math.inf:
            raise ValueError(
                f"memory_budget must be finite and hold two samples a class, {2 * bytes_per_slot} bytes,"
                f" got {memory_budget}"
            )
        self.num_classes, self.dim, self.compat = num_classes, dim, compat
        self.device = torch.device(device)
        self._quota = int(memory_budget // bytes_per_slot)
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._counts_K = torch.zeros(self.num_classes, dtype=torch.int64, device=self.device)
        self._sums_KD = torch.zeros(self.num_classes, self.dim, dtype=torch.float64, device=self.device)
        self._moment_DD = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        self._kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features [N, D] raw, of any float type; labels [N] int64. Every value is checked.

        Raises TypeError for a wrong dtype, ValueError for a wrong shape, a label outside [0, K) or a NaN or
        infinite feature; the batch is then not counted.
        """
        _checks.check_features(features, self.dim)
        _checks.check_labels(labels, len(features), features.device)
        z, y = features.to(self.device, torch.float64), labels.to(self.device)
        _check_classes(y, self.num_classes)
        _checks.check_finite_norms("features", _checks.norms(z))

        u = unit_rows(z)
        keep = self._counts_K[y] + position_in_class(y) < self._quota
        self._kept.append((u[keep].float(), y[keep]))
        self._counts_K += torch.bincount(y, minlength=self.num_classes)
        self._sums_KD.index_add_(0, y, u)
        self._moment_DD.addmm_(u.T, u)

    @connected()
    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Make every rank hold the statistics of all ranks of `group` (None: the default group, if there is one).

        Call it once, after the last `update`, on every rank; ranks may hold any number of samples, or none. Kept
        samples travel within one memory budget for all ranks together. The statistics must be on a device that
        the group's backend can reach (`device="cuda"` for NCCL). Raises ValueError on every rank when the ranks
        disagree on num_classes, dim or the samples kept a class, LostRankError if one ended or does not answer; the
        statistics are then as they were.
        """
        resolved = resolve_group("auto" if group is None else group)
        if resolved is None:
            return
        words = f"NeuralCollapse.all_reduce of [{self.num_classes}, {self.dim}], {self._quota} samples kept a class"
        agree(lambda: words, resolved, self._counts_K)
        kept_RK = gather_rows(self._counts_K.clamp(max=self._quota)[None], [1] * world_size(resolved), resolved)
        reduced = [statistic.clone() for statistic in (self._counts_K, self._sums_KD, self._moment_DD)]
        for statistic in reduced:
            dist.all_reduce(statistic, group=resolved)

        # Ranks fill each class's quota in rank order, as one process would that saw their samples in that order.
        room_RK = (self._quota - (kept_RK.cumsum(0) - kept_RK)).clamp(min=0)
        sent_RK = torch.minimum(kept_RK, room_RK)
        u, y = self._kept_samples()
        sent = position_in_class(y) < sent_RK[dist.get_rank(resolved)][y]
        kept = _exchange(u[sent], y[sent], sent_RK.sum(1).tolist(), resolved)
        self._counts_K, self._sums_KD, self._moment_DD = reduced
        self._kept = kept

    @torch.no_grad()
    def compute(self, prototypes: Tensor | None = None) -> dict[str, float]:
        """The metrics of all samples so far, keyed and explained by `DESCRIPTIONS`; every value is finite.

        prototypes: [K, D], raw, of any float type. None takes the class means in their place and leaves out what
        then says nothing: weight_*, nc2_weight_*, hdr, nc3 and nc4.

        Conventions where a definition is 0/0: an effective rank is 0 when the covariance has no trace (a point has
        no directions); nc1 is 0 when the class means coincide (the pseudo-inverse of nothing); hdr and mir are 0
        when the entropy they divide by vanishes (two classes or fewer). Raises ValueError when nothing was seen,
        TypeError or ValueError for unfit prototypes.
        """
        total = int(self._counts_K.sum())
        if total == 0:
            raise ValueError("compute needs at least one sample, got 0")
        seen_K = self._counts_K > 0
        counts_K = self._counts_K[seen_K].double()
        means_KD = self._sums_KD[seen_K] / counts_K[:, None]
        units_KD = unit_rows(means_KD)
        w_all_KD = None if prototypes is None else self._unit_prototypes(prototypes)
        w_KD = units_KD if w_all_KD is None else w_all_KD[seen_K]
        mean_of_samples = self._sums_KD.sum(0) / total
        centred_KD = means_KD - means_KD.mean(0)

        scatter_DD = (self._moment_DD - (means_KD * counts_K[:, None]).T @ means_KD) / total
        own_cosine = (w_KD * self._sums_KD[seen_K]).sum() / total
        square_lengths = (self._moment_DD.trace() + counts_K @ w_KD.square().sum(1)) / total
        if self.compat:
            information_W, information_M = w_KD, unit_rows(units_KD - unit_rows(mean_of_samples))
        else:
            information_W, information_M = unit_rows(w_KD - w_KD.mean(0)), unit_rows(centred_KD)
        hdr, mir = _information_ratios(information_W, information_M)
        cosines_KK = units_KD @ units_KD.T

        result: dict[str, Tensor | float] = {
            "inter_erank": self._effective_rank(means_KD),
            "instance_alignment": (square_lengths - 2 * own_cosine).clamp(min=0),
            "mir": mir,
            "nc1": _nc1(scatter_DD, centred_KD),
            **_nc2("nc2", centred_KD),
            "cos_mean": _off_diagonal_mean(cosines_KK),
            "cos_std": _off_diagonal_std(cosines_KK),
            "distance_etf": _distance(cosines_KK, cosine=-1 / max(len(units_KD) - 1, 1)),
            "distance_frame": _distance(cosines_KK, cosine=0.0),
            "classes_seen": len(units_KD),
            "samples": total,
            **self._sample_metrics(units_KD, seen_K, w_all_KD),
        }
        if w_all_KD is not None:
            centred_w_KD = w_KD - w_KD.mean(0)
            result |= {
                "weight_erank": self._effective_rank(w_KD),
                "weight_alignment": (w_KD - units_KD).square().sum(1).mean(),
                "hdr": hdr,
                **_nc2("nc2_weight", centred_w_KD),
                "nc3": (unit_rows(centred_w_KD.flatten()) - unit_rows(centred_KD.flatten())).norm(),
                "weight_distance_etf": _distance(w_KD @ w_KD.T, cosine=-1 / max(len(w_KD) - 1, 1)),
            }
        return {key: float(result[key]) for key in DESCRIPTIONS if key in result}

    def _unit_prototypes(self, prototypes: Tensor) -> Tensor:
        _checks.check_matrix("prototypes", prototypes, "[K, D]")
        if prototypes.shape != (self.num_classes, self.dim):
            raise ValueError(
                f"prototypes must have shape [{self.num_classes}, {self.dim}], got {list(prototypes.shape)}"
            )
        w = prototypes.to(self.device, torch.float64)
        _checks.check_finite_norms("prototypes", _checks.norms(w))
        return unit_rows(w)

    def _kept_samples(self) -> tuple[Tensor, Tensor]:
        """All kept samples: u [N, D] float32 and y [N]."""
        empty = self._sums_KD.new_empty(0, self.dim, dtype=torch.float32), self._counts_K.new_empty(0)
        features, labels = zip(empty, *self._kept, strict=True)
        self._kept = [(torch.cat(features), torch.cat(labels))]  # so that the parts are not held twice
        return self._kept[0]

    def _effective_rank(self, rows: Tensor) -> float:
        """exp H(σ/Σσ) for the eigenvalues σ of the covariance of `rows` [N, D]."""
        variances = torch.linalg.eigvalsh(_gram(rows - rows.mean(0)) / len(rows)).clamp(min=0)
        if variances.sum() <= NEGLIGIBLE:
            return 0.0
        if self.compat:
            padded = torch.cat([variances, variances.new_zeros(self.dim - len(variances))])
            variances = padded / padded.sum() + COMPAT_EPS
        return float(_entropy(variances).exp())

    def _sample_metrics(self, units_KD: Tensor, seen_K: Tensor, w_all_KD: Tensor | None) -> dict[str, float]:
        """What needs the samples themselves, class by class so that no N x K matrix is held."""
        u, y = self._kept_samples()
        classes = seen_K.nonzero().flatten()
        sizes = torch.bincount(y, minlength=self.num_classes)[classes].tolist()
        effective_ranks, correct, disagreeing = 0.0, 0, 0
        for c, members in zip(classes, y.argsort(stable=True).split(sizes), strict=True):
            rows = u[members].double()
            effective_ranks += self._effective_rank(rows)
            nearest_mean = classes[(rows @ units_KD.T).argmax(1)]
            correct += int((nearest_mean == c).sum())
            if w_all_KD is not None:
                disagreeing += int((nearest_mean != (rows @ w_all_KD.T).argmax(1)).sum())
        metrics = {
            "intra_erank": effective_ranks / len(classes),
            "nearest_mean_accuracy": correct / len(y),
            "samples_kept": len(y),
        }
        return metrics if w_all_KD is None else metrics | {"nc4": disagreeing / len(y)}


def neural_collapse(
    features: Tensor, labels: Tensor, prototypes: Tensor | None = None, *, compat: bool = False
) -> dict[str, float]:
    """The metrics of features [N, D] with labels [N] in one go, on the features' device; no sample is left out.

    prototypes: [K, D]; without them the classes are those in `labels`. Otherwise as `NeuralCollapse`, which see.
    """
    _checks.check_matrix("features", features, "[N, D]")
    _checks.check_labels(labels, len(features), features.device)
    if prototypes is None:
        _check_classes(labels, torch.iinfo(torch.int64).max)
        classes, labels = labels.unique(return_inverse=True)
        num_classes = max(len(classes), 1)
    else:
        _checks.check_matrix("prototypes", prototypes, "[K, D]")
        num_classes = len(prototypes)
    dim = features.shape[1]
    everything = num_classes * max(len(features), 2) * dim * torch.float32.itemsize
    metrics = NeuralCollapse(num_classes, dim, compat=compat, memory_budget=everything, device=features.device)
    metrics.update(features, labels)
    return metrics.compute(prototypes)


def _check_classes(labels: Tensor, num_classes: int) -> None:
    # Every sample counts here, so no label is the ignored one: 0 is in range anyway.
    _checks.check_label_range(labels, num_classes, ignore_index=0)


def position_in_class(y: Tensor) -> Tensor:
    """For each sample how many of its class stand before it, [N]."""
    order = y.argsort(stable=True)
    counts_K = torch.bincount(y)
    first_K = counts_K.cumsum(0) - counts_K
    position = torch.empty_like(y)
    position[order] = torch.arange(len(y), device=y.device) - first_K[y[order]]
    return position


def _exchange(u: Tensor, y: Tensor, sizes: list[int], group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor]]:
    """(u, y) of every rank. Broadcasts, since a gather would pad every rank to the largest."""
    chunks = []
    for rank, size in enumerate(sizes):
        own = rank == dist.get_rank(group)
        chunk = (u, y) if own else (u.new_empty(size, u.shape[1]), y.new_empty(size))
        for x in chunk:
            dist.broadcast(x, group=group, group_src=rank)
        chunks.append(chunk)
    return chunks


def _entropy(values: Tensor) -> Tensor:
    """H(p) for p = values/Σ values, where 0·log 0 = 0; zero when there is nothing."""
    total = values.sum()
    p = values / torch.where(total > 0, total, 1)
    return torch.special.entr(p).sum()


def _gram(rows: Tensor) -> Tensor:
    """The smaller of the two Gram matrices: it holds all eigenvalues that are not zero."""
    return rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows


def _matrix_entropy(gram_KK: Tensor) -> Tensor:
    return _entropy(torch.linalg.eigvalsh(gram_KK).clamp(min=0))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, zero when the denominator vanishes."""
    zero = denominator <= NEGLIGIBLE
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


def _information_ratios(a_KD: Tensor, b_KD: Tensor) -> tuple[Tensor, Tensor]:
    """HDR = |H1 − H2|/max(H1, H2) and MIR = (H1 + H2 − H(G1∘G2))/min(H1, H2) of two sets of unit rows."""
    joint_KK = (a_KD @ a_KD.T) * (b_KD @ b_KD.T)  # its rank is as high as K, whatever D is
    h_a, h_b, h_joint = (_matrix_entropy(gram) for gram in (_gram(a_KD), _gram(b_KD), joint_KK))
    return (
        _ratio((h_a - h_b).abs(), torch.maximum(h_a, h_b)),
        _ratio(h_a + h_b - h_joint, torch.minimum(h_a, h_b)),
    )


def _nc1(scatter_DD: Tensor, centred_KD: Tensor) -> Tensor:
    """tr(Σ_W Σ_B⁺)/K with Σ_W the scatter of the samples about their means and Σ_B = CᵀC/K.

    With C = V S Qᵀ, Σ_B⁺ = K Q S⁻² Qᵀ: the K factors cancel and only the K x D matrix C is factorised.
    """
    _, s, q_t = torch.linalg.svd(centred_KD, full_matrices=False)
    spread = s.square() > NEGLIGIBLE * len(centred_KD)
    q_t = q_t[spread]
    return ((q_t @ scatter_DD * q_t).sum(1) / s[spread].square()).sum().clamp(min=0)


def _nc2(prefix: str, centred_KD: Tensor) -> dict[str, Tensor]:
    """Equal lengths and equal, widest angles of centred rows."""
    lengths = torch.linalg.vector_norm(centred_KD, dim=1)
    units = unit_rows(centred_KD)
    cosines_KK = units @ units.T
    return {
        f"{prefix}_norm_cv": _ratio(lengths.std(correction=0), lengths.mean()),
        f"{prefix}_angle_std": _off_diagonal_std(cosines_KK),
        f"{prefix}_angle_mean": _off_diagonal_mean((cosines_KK + 1 / max(len(cosines_KK) - 1, 1)).abs()),
    }


def _off_diagonal_mean(x_KK: Tensor) -> Tensor:
    """Mean over pairs of different classes, zero when there are none."""
    return x_KK.clone().fill_diagonal_(0).sum() / max(len(x_KK) * (len(x_KK) - 1), 1)


def _off_diagonal_std(x_KK: Tensor) -> Tensor:
    return _off_diagonal_mean((x_KK - _off_diagonal_mean(x_KK)).square()).sqrt()


def _distance(cosines_KK: Tensor, cosine: float) -> Tensor:
    """|G − G*|/|G*| (Frobenius) to the Gram matrix of unit vectors which all meet at one cosine.

    Uncentred: centring would turn the orthogonal frame into a simplex ETF and make the two indistinguishable.
    """
    ideal_KK = torch.full_like(cosines_KK, cosine).fill_diagonal_(1)
    return (cosines_KK - ideal_KK).norm() / ideal_KK.norm()
