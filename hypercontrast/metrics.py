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

# MIR alone needs the eigenvalues of a K x K matrix: 8 GiB for so many classes, and time that grows with K³.
MAX_MIR_CLASSES = 32_768

# Rows of a block of cosines: no matrix of all classes, or of all samples, with all classes is held.
BLOCK = 256


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

    What is held is K x D and D x D numbers and the kept samples. `compute` goes over the K x K cosines block by block;
    only MIR needs a K x K matrix whole, and its eigenvalues, in time that grows with K³.

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
        then says nothing: weight_*, nc2_weight_*, hdr, nc3 and nc4. With more than 32,768 classes seen mir is left out.

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
        h_W, h_M = (_matrix_entropy(_gram(rows_KD)) for rows_KD in (information_W, information_M))
        pairs = _Pairs.of(units_KD)

        result: dict[str, Tensor | float] = {
            "inter_erank": self._effective_rank(means_KD),
            "instance_alignment": (square_lengths - 2 * own_cosine).clamp(min=0),
            "nc1": _nc1(scatter_DD, centred_KD),
            **_nc2("nc2", centred_KD),
            "cos_mean": pairs.mean,
            "cos_std": pairs.std,
            "distance_etf": pairs.distance_etf,
            "distance_frame": pairs.distance_frame,
            "classes_seen": len(units_KD),
            "samples": total,
            **self._sample_metrics(units_KD, seen_K, w_all_KD),
        }
        if len(units_KD) <= MAX_MIR_CLASSES:
            joint_KK = (information_W @ information_W.T).mul_(information_M @ information_M.T)  # of any rank up to K
            result["mir"] = _ratio(h_W + h_M - _matrix_entropy(joint_KK), torch.minimum(h_W, h_M))
        if w_all_KD is not None:
            centred_w_KD = w_KD - w_KD.mean(0)
            result |= {
                "weight_erank": self._effective_rank(w_KD),
                "weight_alignment": (w_KD - units_KD).square().sum(1).mean(),
                "hdr": _ratio((h_W - h_M).abs(), torch.maximum(h_W, h_M)),
                **_nc2("nc2_weight", centred_w_KD),
                "nc3": (unit_rows(centred_w_KD.flatten()) - unit_rows(centred_KD.flatten())).norm(),
                "weight_distance_etf": _Pairs.of(w_KD).distance_etf,
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
        """What needs the samples themselves."""
        u, y = self._kept_samples()
        classes = seen_K.nonzero().flatten()
        sizes = torch.bincount(y, minlength=self.num_classes)[classes].tolist()
        members = y.argsort(stable=True).split(sizes)
        correct, disagreeing = torch.zeros(2, dtype=torch.int64, device=self.device)
        for u_ND, y_N in zip(u.split(BLOCK), y.split(BLOCK), strict=True):
            u_ND = u_ND.double()
            nearest_N = classes[(u_ND @ units_KD.T).argmax(1)]
            correct += (nearest_N == y_N).sum()
            if w_all_KD is not None:
                disagreeing += (nearest_N != (u_ND @ w_all_KD.T).argmax(1)).sum()
        metrics = {
            "intra_erank": sum(self._effective_rank(u[rows].double()) for rows in members) / len(classes),
            "nearest_mean_accuracy": float(correct) / len(y),
            "samples_kept": len(y),
        }
        return metrics if w_all_KD is None else metrics | {"nc4": float(disagreeing) / len(y)}


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
    pairs = _Pairs.of(unit_rows(centred_KD))
    return {
        f"{prefix}_norm_cv": _ratio(lengths.std(correction=0), lengths.mean()),
        f"{prefix}_angle_std": pairs.std,
        f"{prefix}_angle_mean": pairs.simplex_gap,
    }


class _Pairs(NamedTuple):
    """The cosines between different rows of unit length, zero where there are no two, and how far off they are.

    Distances are |G − G*|/|G*| (Frobenius) to the Gram matrix of unit vectors that all meet at one cosine. Uncentred:
    centring would turn the orthogonal frame into a simplex ETF and make the two indistinguishable.
    """

    mean: Tensor
    std: Tensor
    simplex_gap: Tensor  # the mean of |cosine + 1/(K−1)|
    distance_etf: Tensor
    distance_frame: Tensor

    @classmethod
    def of(cls, units_KD: Tensor) -> _Pairs:
        num_rows = len(units_KD)
        pairs = num_rows * (num_rows - 1)
        simplex = -1 / max(num_rows - 1, 1)
        squares_K = units_KD.square().sum(1)  # 1, or 0 for a row without a direction
        mean = (units_KD.sum(0).square().sum() - squares_K.sum()) / max(pairs, 1)
        variance, simplex_gap, square_gap, square_cosine = sums = units_KD.new_zeros(4)
        measures = (variance, mean, 2), (simplex_gap, simplex, 1), (square_gap, simplex, 2), (square_cosine, 0.0, 2)
        blocks = units_KD.split(BLOCK)
        for i, rows_BD in enumerate(blocks):
            for j, columns_BD in enumerate(blocks[: i + 1]):
                cosines_BB = rows_BD @ columns_BD.T
                for total, centre, power in measures:
                    if i == j:
                        cosines_BB.fill_diagonal_(float(centre))
                    tile = torch.linalg.vector_norm(cosines_BB - centre, power) ** power
                    total += tile if i == j else 2 * tile  # and the one on the other side of the diagonal
        sums[:2] /= max(pairs, 1)
        sums[2:] += (1 - squares_K).square().sum()  # a Gram matrix of unit vectors has ones on its diagonal
        sums[2:] /= num_rows + pairs * units_KD.new_tensor([simplex, 0.0]).square()
        return cls(mean, variance.sqrt(), simplex_gap, square_gap.sqrt(), square_cosine.sqrt())
