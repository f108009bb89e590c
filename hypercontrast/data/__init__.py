"""Pictures for training: small ones, kept on the device as uint8, with batched augmentation there.

`locate(name, root)` checks that a data set is there, cheaply; `load(name, root)` reads it.
"""

from hypercontrast.data.augment import AUGMENTATIONS, normalize
from hypercontrast.data.dataset import Dataset, Images, balanced_order
from hypercontrast.data.sampler import derived_seed, epoch_batches, steps_per_epoch
from hypercontrast.data.sources import DATASETS, load, locate

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Dataset",
    "Images",
    "balanced_order",
    "derived_seed",
    "epoch_batches",
    "load",
    "locate",
    "normalize",
    "steps_per_epoch",
]
