"""hypercontrast: supervised learning on the unit hypersphere, fast and exact.

Importing it needs torch alone: no Triton, no compiled extension, no GPU, no torchvision.
"""

from hypercontrast.accumulate import accumulate_exact
from hypercontrast.blockwise import memory_budget, set_memory_budget
from hypercontrast.buffer import NegativeBuffer
from hypercontrast.ddp_check import DDPVerdict, check_ddp
from hypercontrast.distributed import gather_with_grad
from hypercontrast.functional import nonl_loss, normface_loss, ntce_loss, resolve_backend, supcon_loss
from hypercontrast.losses import CELoss, ETFDRLoss, NONLLoss, NormFaceLoss, NTCELoss, SupConLoss
from hypercontrast.metrics import NeuralCollapse, neural_collapse
from hypercontrast.prototypes import ClassMeans, PrototypeClassifier, PrototypeHead, simplex_etf

__version__ = "0.1.0"

__all__ = [
    "CELoss",
    "ClassMeans",
    "DDPVerdict",
    "ETFDRLoss",
    "NONLLoss",
    "NTCELoss",
    "NegativeBuffer",
    "NeuralCollapse",
    "NormFaceLoss",
    "PrototypeClassifier",
    "PrototypeHead",
    "SupConLoss",
    "accumulate_exact",
    "check_ddp",
    "gather_with_grad",
    "memory_budget",
    "neural_collapse",
    "nonl_loss",
    "normface_loss",
    "ntce_loss",
    "resolve_backend",
    "set_memory_budget",
    "simplex_etf",
    "supcon_loss",
]
