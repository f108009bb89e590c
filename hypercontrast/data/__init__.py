"""Pictures for training: small ones live on the device as uint8, larger sets stream; both are augmented there.

`locate(name, root)` checks that a data set is there, cheaply; `load(name, root)` reads it. The sets of linear transfer
are in `hypercontrast.data.transfer`.
"""

from hypercontrast.data.augment import AUGMENTATIONS, Augmentation, normalize
from hypercontrast.data.dataset import Batch, Dataset, Images, Pictures, balanced_order, limited_order
from hypercontrast.data.draws import Draws
from hypercontrast.data.facts import FACTS
from hypercontrast.data.longtail import long_tailed_counts
from hypercontrast.data.sampler import Share, derived_seed, epoch_batches, steps_per_epoch
from hypercontrast.data.sources import DATASETS, RESIDENT_BYTES, load, locate
from hypercontrast.data.streamed import Streamed

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "FACTS",
    "RESIDENT_BYTES",
    "Augmentation",
    "Batch",
    "Dataset",
    "Draws",
    "Images",
    "Pictures",
    "Share",
    "Streamed",
    "balanced_order",
    "derived_seed",
    "epoch_batches",
    "limited_order",
    "load",
    "locate",
    "long_tailed_counts",
    "normalize",
    "steps_per_epoch",
]
