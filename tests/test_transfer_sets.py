"""The eight data sets of linear transfer, from small copies of the layouts in which they are published."""

import json

import numpy as np
import pytest
import torch
from pictures import encoded, picture, write_parquet

from hypercontrast.config import UsageError
from hypercontrast.data.facts import TRANSFER_FACTS
from hypercontrast.data.transfer import locate

pytest.importorskip("PIL")


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture((20, 30), seed=seed).save(path)


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def save_matlab(path, **values):
    scipy_io = pytest.importorskip("scipy.io")
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, values)


# Each writes a set whose picture n has the seed n, and returns the seeds and labels of training and test set.


def food101(root):
    folder = root / "food-101"
    for n in range(6):
        save(folder / "images" / ("apple_pie", "waffles")[n % 2] / f"{n}.jpg", n)
    write_lines(folder / "meta" / "classes.txt", ["apple_pie", "waffles"])
    for split, pictures in (("train", [0, 2, 1, 3]), ("test", [5, 4])):
        paths = [f"{('apple_pie', 'waffles')[n % 2]}/{n}" for n in pictures]
        write_lines(folder / "meta" / f"{split}.txt", paths)
        by_class = {name: [path for path in paths if path.startswith(name)] for name in ("apple_pie", "waffles")}
        write_lines(folder / "meta" / f"{split}.json", [json.dumps(by_class)])
    return [0, 2, 1, 3], [0, 0, 1, 1], [5, 4], [1, 0]


def cars(root):
    folder = root / "stanford_cars"
    for n in range(3):
        save(folder / "cars_train" / f"0000{n}.jpg", n)
        save(folder / "cars_test" / f"0000{n}.jpg", n + 3)

    def annotations(classes):
        kinds = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        rows = [(1, 1, 9, 9, label, f"0000{n}.jpg") for n, label in enumerate(classes)]
        return np.array([rows], dtype=kinds)

    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], dtype=object)
    save_matlab(folder / "devkit" / "cars_meta.mat", class_names=names)
    save_matlab(folder / "devkit" / "cars_train_annos.mat", annotations=annotations([2, 1, 2]))
    save_matlab(folder / "cars_test_annos_withlabels.mat", annotations=annotations([1, 1, 2]))
    return [0, 1, 2], [1, 0, 1], [3, 4, 5], [0, 0, 1]


def dtd(root, folder="dtd"):
    folder = root / folder
    for n in range(7):
        save(folder / "images" / ("banded", "zigzagged")[n % 2] / f"{n}.jpg", n)
    write_lines(folder / "labels" / "train1.txt", ["banded/0.jpg", "zigzagged/1.jpg"])
    write_lines(folder / "labels" / "val1.txt", ["zigzagged/3.jpg", "banded/6.jpg"])
    write_lines(folder / "labels" / "test1.txt", ["banded/2.jpg", "zigzagged/5.jpg", "banded/4.jpg"])
    return [0, 1, 3, 6], [0, 1, 1, 0], [2, 5, 4], [0, 1, 0]


def dtd_of_torchvision(root):
    return dtd(root, "dtd/dtd")


def pets(root):
    folder = root / "oxford-iiit-pet"
    names = ["Abyssinian_1", "american_bulldog_1", "Abyssinian_12", "american_bulldog_20"]
    for n, name in enumerate(names):
        save(folder / "images" / f"{name}.jpg", n)
    write_lines(folder / "annotations" / "trainval.txt", ["Abyssinian_1 1 1 1", "american_bulldog_20 2 2 1"])
    write_lines(folder / "annotations" / "test.txt", ["american_bulldog_1 2 2 1", "Abyssinian_12 1 1 1"])
    return [0, 3], [0, 1], [1, 2], [1, 0]


def flowers(root):
    folder = root / "flowers-102"
    for n in range(1, 7):
        save(folder / "jpg" / f"image_{n:05d}.jpg", n)
    save_matlab(folder / "imagelabels.mat", labels=np.array([[1, 2, 3, 3, 2, 1]], dtype=np.uint8))
    save_matlab(folder / "setid.mat", trnid=[[6, 2]], valid=[[3, 4]], tstid=[[1, 5]])
    return [6, 2, 3, 4], [0, 1, 2, 2], [1, 5], [0, 1]


def voc2007(root):
    folder = root / "VOCdevkit" / "VOC2007"
    for n in range(1, 6):
        save(folder / "JPEGImages" / f"{n:06d}.jpg", n)
    lists = folder / "ImageSets" / "Main"
    write_lines(lists / "trainval.txt", ["000001", "000002", "000004"])
    write_lines(lists / "test.txt", ["000003", "000005"])
    write_lines(lists / "aeroplane_trainval.txt", ["000001 -1", "000002  1", "000004  0"])
    write_lines(lists / "person_trainval.txt", ["000001  1", "000002  1", "000004 -1"])
    write_lines(lists / "aeroplane_test.txt", ["000003 -1", "000005 -1"])
    write_lines(lists / "person_test.txt", ["000003  0", "000005  1"])
    return [1, 2, 4], [0, 0, 0], [3, 5], [0, 0]


def cifar10(root):
    # All ten classes, or it would not be CIFAR-10; pictures of its size.
    for split, seeds in (("train", range(12)), ("test", range(12, 22))):
        pictures = [encoded(seed=seed) for seed in seeds]
        names = list("abcdefghij")
        write_parquet(root / "cifar10" / f"{split}.parquet", pictures, [seed % 10 for seed in seeds], names=names)
    return (
        list(range(12)),
        [seed % 10 for seed in range(12)],
        list(range(12, 22)),
        [seed % 10 for seed in range(12, 22)],
    )


SETS = {
    "food101": food101,
    "cars": cars,
    "dtd": dtd,
    "pets": pets,
    "flowers": flowers,
    "voc2007": voc2007,
    "cifar10": cifar10,
}


@pytest.mark.parametrize("make", [*SETS.values(), dtd_of_torchvision])
def test_published_layouts(tmp_path, make):
    name = make.__name__.partition("_")[0]
    train_seeds, train_labels, test_seeds, test_labels = make(tmp_path)
    found = locate(name, tmp_path)(0, size=20, workers=0)
    size = (32, 32) if name == "cifar10" else (20, 30)
    for part, seeds, labels in ((found.train, train_seeds, train_labels), (found.test, test_seeds, test_labels)):
        assert part.labels.tolist() == labels
        assert part.shape == (3, 20, 20)
        [batch] = part.plain([torch.arange(len(seeds))])
        assert part.damaged == ()
        # Noise, compressed and scaled, is still nearest to itself.
        expected = torch.stack([torch.from_numpy(np.array(picture(size, seed=seed))).float() for seed in seeds])
        expected = torch.nn.functional.adaptive_avg_pool2d(expected.permute(0, 3, 1, 2), 20)
        distance = torch.cdist(batch.pixels.float().flatten(1), expected.flatten(1))
        assert distance.argmin(1).tolist() == list(range(len(seeds)))
    assert (found.targets is not None) == (name == "voc2007")


@pytest.mark.parametrize("make", [food101, cars, dtd_of_torchvision, pets])
def test_torchvision_reads_the_same(tmp_path, make):
    """Labels and class order of torchvision's readers, where they take a set of any content."""
    datasets = pytest.importorskip("torchvision.datasets")
    make(tmp_path)
    kind, train_splits = {
        food101: (datasets.Food101, ["train"]),
        cars: (datasets.StanfordCars, ["train"]),
        dtd_of_torchvision: (datasets.DTD, ["train", "val"]),
        pets: (datasets.OxfordIIITPet, ["trainval"]),
    }[make]
    found = locate(make.__name__.partition("_")[0], tmp_path)(0, workers=0)
    for part, splits in ((found.train, train_splits), (found.test, ["test"])):
        theirs = [pair for split in splits for pair in kind(tmp_path, split=split, download=False)]
        mean = [np.asarray(image).mean() for image, _ in theirs]
        order = [int(np.abs(np.array(mean) - np.asarray(part.pictures.opened(n)).mean()).argmin()) for n in part.rows]
        assert sorted(order) == list(range(len(theirs)))
        assert part.labels.tolist() == [theirs[n][1] for n in order]
    assert len(found.class_names) == len(kind(tmp_path, split="test").classes)


def test_class_names(tmp_path):
    for make in SETS.values():
        make(tmp_path)
    names = {name: locate(name, tmp_path)(0).class_names for name in SETS}
    assert names["food101"] == ("apple_pie", "waffles")
    assert names["cars"] == ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")
    assert names["dtd"] == ("banded", "zigzagged")
    assert names["pets"] == ("Abyssinian", "american_bulldog")
    assert names["flowers"] == ("1", "2", "3")
    assert names["voc2007"] == ("aeroplane", "person")


def test_objects_marked_difficult_do_not_count(tmp_path):
    voc2007(tmp_path)
    found = locate("voc2007", tmp_path)(0)
    train, test = found.targets
    nan = torch.nan
    torch.testing.assert_close(train, torch.tensor([[0.0, 1], [1, 1], [nan, 0]]), equal_nan=True)
    torch.testing.assert_close(test, torch.tensor([[0.0, nan], [0, 1]]), equal_nan=True)
    assert train.dtype == torch.float32
    few = locate("voc2007", tmp_path)(2)
    assert (len(few.train), len(few.test)) == (2, 2)
    assert few.targets[0].equal(train[:2])


def test_a_limit_takes_evenly_from_every_class(tmp_path):
    food101(tmp_path)
    few = locate("food101", tmp_path)(2)
    assert sorted(few.train.labels.tolist()) == [0, 1]


def test_small_pictures_come_at_the_networks_size_in_its_channels(tmp_path):
    cifar10(tmp_path)
    found = locate("cifar10", tmp_path)(0, channels=1, workers=0)
    assert found.train.shape == (1, 224, 224)
    [batch] = found.test.plain([torch.arange(3)])
    assert batch.pixels.shape == (3, 1, 224, 224)


@pytest.mark.parametrize("name", list(TRANSFER_FACTS))
def test_what_is_missing_is_named_with_its_layout_and_origin(tmp_path, name):
    with pytest.raises(UsageError) as error:
        locate(name, tmp_path)
    message = str(error.value)
    assert message.startswith(f"data_root must hold {name}: expected {tmp_path}/")
    assert "; get it from " in message
    assert "http" in message
    assert "\n" not in message
    assert "ROOT" not in message


def test_an_unknown_set_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"datasets must be of food101, cifar10, .*, voc2007, got 'sun397'"):
        locate("sun397", tmp_path)


def test_lists_that_are_not_as_published(tmp_path):
    food101(tmp_path)
    write_lines(tmp_path / "food-101" / "meta" / "test.txt", ["soup/5"])
    with pytest.raises(UsageError, match="the lists of food101 must be as published: ValueError"):
        locate("food101", tmp_path)(0)
    voc2007(tmp_path)
    write_lines(tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "person_test.txt", ["000003 1"])
    with pytest.raises(UsageError, match="the lists of voc2007 must be as published: KeyError"):
        locate("voc2007", tmp_path)(0)


def test_labels_are_those_of_classes(tmp_path):
    pets(tmp_path)
    trainval = tmp_path / "oxford-iiit-pet" / "annotations" / "trainval.txt"
    for lines, says in (
        (["Abyssinian_1 1 1 1", "american_bulldog_20 7 2 1"], "training labels 0 to 6 of 3 classes"),
        (["Abyssinian_1 0 1 1", "american_bulldog_20 2 2 1"], "training labels -1 to 1 of 3 classes"),
        ([], "no training pictures"),
    ):
        write_lines(trainval, lines)
        with pytest.raises(UsageError, match=f"the lists of pets must be as published: ValueError.*{says}"):
            locate("pets", tmp_path)(0)
    flowers(tmp_path)
    save_matlab(tmp_path / "flowers-102" / "imagelabels.mat", labels=np.array([[1, 2, 3, 3, 2, 2**40]]))
    with pytest.raises(UsageError, match=r"the lists of flowers must be as published: ValueError.* of 6 classes"):
        locate("flowers", tmp_path)(0)
