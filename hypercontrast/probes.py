"""Classifiers trained on a frozen backbone: what the fixed class-mean prototypes are compared with.

A probe sees the backbone's pooled features [N, D], before the projection or neck, as is usual for linear evaluation
(Khosla et al. 2020). Two ways to train one: `train_probe` sends newly augmented pictures through the backbone every
epoch, as the paper does; `fit_probe` sends them through once, as they are, and `fit_features` solves on the kept ones.

Both minimise the cross-entropy over the samples of all ranks, `train_probe` without weight decay, and every rank ends
with the same weights. Shapes: N samples, K classes, D dimensions. Source: arXiv 2605.20302, appendix E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hypercontrast.data import AUGMENTATIONS, derived_seed, epoch_batches
from hypercontrast.launch import Ranks
from hypercontrast.models import LinearHead
from hypercontrast.objective import TrainingError
from hypercontrast.progress import Progress
from hypercontrast.prototypes import PrototypeHead
from hypercontrast.workspace import Workspace

DECAY = 0.2  # of the learning rate at every milestone
SOLVER_STEPS = 200
RIDGE = 1e-5  # where a linear probe separates the kept features, there is no minimum without one


@dataclass(frozen=True)
class ProbeSettings:
    """How `train_probe` trains."""

    epochs: int
    lr: float
    batch_size: int
    seed: int
    milestones: tuple[float, ...] = (0.6, 0.75, 0.9)  # shares of the epochs after which the learning rate falls


class CosineProbe(PrototypeHead):
    """The normalised probe: logits cos(x, w_c)/τ [N, K]."""

    def __init__(self, dim: int, num_classes: int, temperature: float) -> None:
        super().__init__(dim, num_classes)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


Probe = LinearHead | CosineProbe


def train_probe(probe: Probe, workspace: Workspace, settings: ProbeSettings, progress: Progress) -> None:
    """SGD with momentum 0.9 on features of newly augmented pictures every epoch; the learning rate falls in steps.

    Raises TrainingError if the probe's weights stop being finite.
    """
    ranks, dataset = workspace.ranks, workspace.dataset
    augment = AUGMENTATIONS[dataset.augmentation]
    optimizer = torch.optim.SGD(probe.parameters(), lr=settings.lr, momentum=0.9)
    milestones = [round(share * settings.epochs) for share in settings.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=DECAY)
    workspace.network.eval()
    for epoch in range(1, settings.epochs + 1):
        progress.start_epoch(epoch)
        shares = list(
            epoch_batches(
                dataset.train.labels,
                settings.batch_size,
                seed=derived_seed(settings.seed, "probe"),
                epoch=epoch,
                rank=ranks.rank,
                world=ranks.world,
            )
        )
        seed = derived_seed(settings.seed, epoch, "probe")
        for share, batch in zip(shares, dataset.train.views(shares, augment, [seed]), strict=True):
            features = workspace.embed(workspace.normalized(batch.pixels), batch.labels).backbone
            optimizer.zero_grad()
            _backward(probe, features, batch.labels, share.global_size, ranks)
            optimizer.step()
            progress.step()
        schedule.step()
        if not all(torch.isfinite(parameter).all() for parameter in probe.parameters()):
            raise TrainingError(f"a probe must stay finite, got epoch {epoch} without: try a smaller --lr")


def fit_probe(probe: Probe, workspace: Workspace) -> None:
    """`fit_features` on the training pictures as they are, computed once and kept; the linear probe's ridge is 1e-5."""
    batches = list(workspace.embedded(workspace.dataset.train))
    features, labels = torch.cat([b.backbone for b in batches]), torch.cat([b.labels for b in batches])
    fit_features(probe, features, labels, workspace.ranks, ridge=RIDGE if isinstance(probe, LinearHead) else 0.0)


def fit_features(probe: Probe, features: Tensor, targets: Tensor, ranks: Ranks, *, ridge: float) -> None:
    """L-BFGS from the probe's weights as they are, to the minimum of mean loss + ridge/2·|W|², the bias left free.

    With a ridge the answer is one for a linear probe, whatever the start.

    features: [N, D] of this rank's samples.
    targets: labels [N] for the cross-entropy; or [N, K] of 0 and 1 for K logistic regressions of a class against the
        rest, NaN for a sample that one of them is to leave out. The mean is over samples, the sum over classes.
    """
    total = int(ranks.sum(torch.tensor(len(features), device=features.device)))
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=SOLVER_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        mean = _backward(probe, features, targets, total, ranks)
        penalty = ridge / 2 * probe.prototypes.square().sum()
        penalty.backward()  # the same on every rank, so after the sum over them
        return mean + penalty.detach()

    optimizer.step(loss)


def _backward(probe: Probe, features: Tensor, targets: Tensor, global_size: int, ranks: Ranks) -> Tensor:
    """The mean loss over all ranks' samples; leaves its gradient on every rank."""
    loss = _summed_loss(probe(features), targets) / global_size
    loss.backward()
    for parameter in probe.parameters():
        assert parameter.grad is not None
        ranks.sum(parameter.grad)
    return ranks.sum(loss.detach())


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="sum")
    known = (~targets.isnan()).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), known, reduction="sum")
