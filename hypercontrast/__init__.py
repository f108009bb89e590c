"""hypercontrast: supervised learning on the unit hypersphere, fast and exact.

Importing it needs torch alone: no Triton, no compiled extension, no GPU, no torchvision.
"""

from hypercontrast.accumulate import accumulate_exact
from hypercontrast.blockwise import memory_budget, set_memory_budget
from hypercontrast.buffer import NegativeBuffer
from hypercontrast.ddp_check import DDPVerdict, check_ddp
from hypercontrast.distributed import LostRankError, gather_with_grad
from hypercontrast.functional import nonl_loss, normface_loss, ntce_loss, resolve_backend, supcon_loss
from hypercontrast.losses import (
    ArcFaceLoss,
    CELoss,
    CosFaceLoss,
    DCLLoss,
    ETFDRLoss,
    LogitAdjustedLoss,
    NONLLoss,
    NormFaceLoss,
    NTCELoss,
    ProxyAnchorLoss,
    SupConLoss,
)
from hypercontrast.metrics import NeuralCollapse, neural_collapse
from hypercontrast.prototypes import ClassMeans, PrototypeClassifier, PrototypeHead, simplex_etf
from hypercontrast.related import (
    arcface_loss,
    cosface_loss,
    dcl_loss,
    ldam_margins,
    logit_adjusted_loss,
    proxy_anchor_loss,
)

__version__ = "0.1.0"

__all__ = [
    "ArcFaceLoss",
    "CELoss",
    "ClassMeans",
    "CosFaceLoss",
    "DCLLoss",
    "DDPVerdict",
    "ETFDRLoss",
    "LogitAdjustedLoss",
    "LostRankError",
    "NONLLoss",
    "NTCELoss",
    "NegativeBuffer",
    "NeuralCollapse",
    "NormFaceLoss",
    "PrototypeClassifier",
    "PrototypeHead",
    "ProxyAnchorLoss",
    "SupConLoss",
    "accumulate_exact",
    "arcface_loss",
    "check_ddp",
    "cosface_loss",
    "dcl_loss",
    "gather_with_grad",
    "ldam_margins",
    "logit_adjusted_loss",
    "memory_budget",
    "neural_collapse",
    "nonl_loss",
    "normface_loss",
    "ntce_loss",
    "proxy_anchor_loss",
    "resolve_backend",
    "set_memory_budget",
    "simplex_etf",
    "supcon_loss",
]
