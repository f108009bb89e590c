"""A user's program, which `make check` type-checks as strictly as mypy can: what the package returns has types."""

from torch import Tensor

import hypercontrast as hc


def loss(features: Tensor, labels: Tensor) -> Tensor:
    return hc.nonl_loss(features, features, labels) + hc.supcon_loss(features, labels)


def supcon(features: Tensor, labels: Tensor) -> Tensor:
    return hc.supcon_loss(features, labels)


def with_singletons(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return hc.supcon_loss(features, labels, return_singletons=True)


def accumulated(encoder: hc.PrototypeHead, chunks: list[Tensor]) -> Tensor:
    return hc.accumulate_exact(encoder, hc.supcon_loss, chunks, encoder.parameters())


def collapse(features: Tensor, labels: Tensor) -> float:
    return hc.neural_collapse(features, labels)["nc1"]


def gathered(buffer: hc.NegativeBuffer, features: Tensor, labels: Tensor) -> Tensor:
    return buffer.gather_async(features, labels).wait().features


def predictions(means: hc.ClassMeans, features: Tensor) -> Tensor:
    return hc.PrototypeClassifier(means.prototypes()).predict(features)


def exact() -> bool:
    return bool(hc.check_ddp(loss))
