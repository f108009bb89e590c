"""Pictures that stream: the same views as those that live on the device, whatever the workers, and what damage does."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from pictures import encoded, make_folder, picture, write_parquet

from hypercontrast import data
from hypercontrast.config import UsageError
from hypercontrast.data import AUGMENTATIONS, Share, sources
from hypercontrast.data.augment import random_boxes
from hypercontrast.data.encoded import Files, resized_box, square
from hypercontrast.data.streamed import CHUNK, Streamed

pytest.importorskip("PIL")

N = 2 * CHUNK + 6  # the last chunk is a part
SIZES = ((40, 24), (24, 60), (33, 33), (100, 80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of mixed sizes, two classes."""
    return make_folder(tmp_path_factory.mktemp("mixed"), SIZES, counts=(("train", N // 2), ("val", 2)))


def files(folder, part="train"):
    return sorted((folder / part).rglob("*.png"))


def streamed(paths, side=24, workers=0, mode="RGB"):
    n = len(paths)
    return Streamed(Files(paths), torch.arange(n), torch.arange(n) % 2, side, mode, workers)


def shares(n, sizes):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return [Share(own, place, n) for own, place in zip(order.split(sizes), torch.arange(n).split(sizes), strict=True)]


def test_load_streams_what_is_too_large(folder, monkeypatch):
    resident = data.load(f"folder:{folder}")
    assert isinstance(resident.train, data.Images)
    decoded = (N + 4) * 3 * 24**2
    monkeypatch.setattr(sources, "RESIDENT_BYTES", decoded - 1)
    dataset = data.load(f"folder:{folder}", workers=3)
    for part, images in ((dataset.train, resident.train), (dataset.validation, resident.validation)):
        assert isinstance(part, Streamed)
        assert part.workers == 3
        assert part.shape == images.shape
        assert part.labels.equal(images.labels)
    assert dataset.class_names == resident.class_names
    limited = data.load(f"folder:{folder}", limit=N - 1)
    assert isinstance(limited.train, data.Images)
    monkeypatch.setattr(sources, "RESIDENT_BYTES", decoded)
    assert isinstance(data.load(f"folder:{folder}").train, data.Images)


def test_large_pictures_stream_at_224(tmp_path, monkeypatch):
    """For the first of many tells little of the others."""
    root = make_folder(tmp_path, sizes=((100, 80),))
    assert data.load(f"folder:{root}").train.shape == (3, 80, 80)
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    assert data.load(f"folder:{root}", workers=0).train.shape == (3, 224, 224)


def test_plain_pictures_are_those_on_the_device(folder, monkeypatch):
    resident = data.load(f"folder:{folder}").train
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    train = data.load(f"folder:{folder}", workers=0).train
    batches = torch.randperm(N, generator=torch.Generator().manual_seed(2)).split(50)
    for ours, theirs in zip(train.plain(batches), resident.plain(batches), strict=True):
        assert ours.pixels.dtype == torch.uint8
        assert all(x.equal(y) for x, y in zip(ours, theirs, strict=True))
    assert train.damaged == ()


@pytest.mark.parametrize(("side", "scaled"), [(24, 24), (64, 64), (96, 109), (224, 256)])
def test_plain_pictures_are_resized_and_cut_as_torchvision_does(folder, side, scaled):
    """The shorter side to 256/224 of the size above 64 pixels, and the middle of it."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    theirs = transforms.Compose([transforms.Resize(scaled), transforms.CenterCrop(side)])
    paths = files(folder)[: len(SIZES)]
    [batch] = streamed(paths, side).plain([torch.arange(len(paths))])
    for n, ours in enumerate(batch.pixels):
        from PIL import Image

        assert ours.equal(torch.from_numpy(np.array(theirs(Image.open(paths[n])))).permute(2, 0, 1))


def test_boxes_are_resized_as_torchvision_does():
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    boxes = random_boxes(data.Draws(3, torch.arange(20)), (90, 70)).int().tolist()
    for n, box in enumerate(boxes):
        image = picture((70, 90), seed=n)
        assert np.array_equal(resized_box(image, box, 32), F.resized_crop(image, *box, size=[32, 32], antialias=True))


@pytest.mark.parametrize("name", ["crop_flip", "crop_flip_colour", "crop_flip_colour_blur"])
def test_views_are_those_on_the_device(tmp_path, name):
    """Of pictures that have the target size: the same boxes, flips and colours, but for the cuts' rounding.

    A cut is rounded to whole numbers twice, along either axis. Brightness enlarges that up to 1.4 times, contrast and
    saturation, which also move a mean, up to 1.8 times each.
    """
    paths = files(make_folder(tmp_path, counts=(("train", 20), ("val", 1))))
    pixels = torch.stack([torch.from_numpy(np.array(picture(seed=10 * (n // 20) + n % 20))) for n in range(40)])
    order = [int(path.stem) + 20 * (path.parent.name == "bee") for path in paths]
    labels = torch.arange(40) % 2
    images = data.Images(pixels[order].permute(0, 3, 1, 2), labels)
    stream = Streamed(Files(paths), torch.arange(40), labels, 32, "RGB", 0)
    augment, seeds = AUGMENTATIONS[name], [11, 12]
    pairs = zip(stream.views(shares(40, 17), augment, seeds), images.views(shares(40, 17), augment, seeds), strict=True)
    for ours, theirs in pairs:
        assert ours.pixels.dtype == torch.float32
        assert ours.pixels.shape == theirs.pixels.shape
        assert ours.labels.equal(theirs.labels)
        assert ours.indices.equal(theirs.indices)
        difference = (ours.pixels - theirs.pixels).abs()
        assert difference.mean() < 0.5
        assert difference.max() < (1.05 if name == "crop_flip" else 1.05 * 1.4 * 1.8**2)


def test_a_view_is_a_box_of_the_whole_picture(folder):
    """Also where it is wide or tall: cut from all of it by the numbers of (seed, place), the rest by those after them."""
    from PIL import Image

    paths, augment = files(folder)[: 2 * len(SIZES)], AUGMENTATIONS["crop_flip"]
    places = torch.arange(len(paths)) + 5
    [batch] = streamed(paths).views([Share(places - 5, places, len(paths))], augment, [9])
    for path, place, ours in zip(paths, places, batch.pixels, strict=True):
        image, draws = Image.open(path), data.Draws(9, place[None])
        [box] = random_boxes(draws, (image.height, image.width)).int().tolist()
        cut = torch.from_numpy(np.array(resized_box(image, box, 24))).permute(2, 0, 1)
        assert ours.equal(augment.finished(cut[None].float(), draws)[0])


@pytest.mark.parametrize("seeds", [[], [5, 6]])
def test_batches_do_not_depend_on_workers(folder, seeds):
    def batches(workers):
        pictures = streamed(files(folder), workers=workers)
        if not seeds:
            return list(pictures.plain(torch.arange(N).split(45)))
        return list(pictures.views(shares(N, 45), AUGMENTATIONS["crop_flip_colour"], seeds))

    alone, helped = batches(0), batches(2)
    assert len(alone) == len(helped) == 2
    for one, other in zip(alone, helped, strict=True):
        assert all(x.equal(y) for x, y in zip(one, other, strict=True))


def test_any_rank_and_any_batch_sees_the_same_views(folder):
    """A picture's view belongs to its place in the epoch, so that a run may go on with other ranks."""
    pictures = streamed(files(folder))

    def views(world, batch_size):
        seen = {}
        for rank in range(world):
            own = list(data.epoch_batches(pictures.labels, batch_size, seed=3, epoch=1, rank=rank, world=world))
            for share, batch in zip(own, pictures.views(own, AUGMENTATIONS["crop_flip"], [9]), strict=True):
                assert batch.indices.equal(share.indices)
                seen |= dict(zip(share.places.tolist(), batch.pixels, strict=True))
        return seen

    alone, three = views(1, 50), views(3, 20)
    assert alone.keys() == three.keys() == set(range(N))
    assert all(alone[place].equal(three[place]) for place in alone)


def test_the_global_generator_is_left_alone(folder):
    state = torch.get_rng_state()
    list(streamed(files(folder)[:4], workers=1).plain([torch.arange(4)]))
    assert torch.get_rng_state().equal(state)


def test_grey_pictures_stream_in_one_channel(tmp_path):
    paths = files(make_folder(tmp_path, mode="L"))
    [batch] = streamed(paths, mode="L").plain([torch.arange(len(paths))])
    assert batch.pixels.shape == (6, 1, 24, 24)
    assert batch.pixels[0, 0].equal(torch.from_numpy(np.array(square(picture(mode="L"), 24, 24))))


def test_select_keeps_pictures_and_labels_together(folder):
    pictures = streamed(files(folder))
    chosen = torch.tensor([7, 3, 60])
    part = pictures.select(chosen).select(torch.tensor([2, 0]))
    assert part.labels.tolist() == [0, 1]
    [batch] = part.plain([torch.arange(2)])
    [expected] = pictures.plain([chosen[[2, 0]]])
    assert batch.pixels.equal(expected.pixels)


def test_only_resized_crops_stream(folder):
    with pytest.raises(ValueError, match="augment must cut resized crops of pictures that stream, got 'shift'"):
        next(streamed(files(folder)).views(shares(N, 9), AUGMENTATIONS["shift"], [1]))


def test_a_share_without_pictures_gives_a_batch_without(folder):
    own = [Share(torch.arange(0), torch.arange(0), 1), Share(torch.arange(2), torch.arange(2), 3)]
    empty, two = streamed(files(folder)).views(own, AUGMENTATIONS["crop_flip"], [1, 2])
    assert empty.pixels.shape == (0, 3, 24, 24)
    assert len(empty.labels) == 0
    assert two.pixels.shape == (4, 3, 24, 24)


# Damage


def broken(paths, places, text=b"nothing"):
    for place in places:
        paths[place].write_bytes(text)
    return tuple(str(paths[place]) for place in places)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_left_out_and_named(tmp_path, workers):
    """Within the first chunk and the last, unreadable and truncated; the others are what they would have been."""
    paths = files(make_folder(tmp_path, counts=(("train", 105), ("val", 1)), classes=("ant", "bee")))
    paths = [path for path in paths if path.parts[-3] == "train"]
    seeds, augment = [5, 6], AUGMENTATIONS["crop_flip_colour"]
    own = shares(210, 70)
    intact = streamed(paths).views(own, augment, seeds)
    intact = [(batch, batch.pixels.unflatten(0, (2, -1))) for batch in intact]
    damaged = [int(own[0].indices[2]), int(own[0].indices[-1])]
    names = broken(paths, damaged[:1]) + broken(paths, damaged[1:], paths[damaged[1]].read_bytes()[:300])
    pictures = streamed(paths, workers=workers)
    for (before, pixels), after in zip(intact, pictures.views(own, augment, seeds), strict=True):
        kept = ~torch.isin(before.indices, torch.tensor(damaged))
        assert after.indices.equal(before.indices[kept])
        assert after.labels.equal(before.labels[kept])
        assert after.pixels.equal(pixels[:, kept].flatten(0, 1))
    assert set(pictures.damaged) == set(names)
    [batch] = pictures.plain([torch.arange(210)])
    assert len(batch.labels) == len(batch.pixels) == 208
    assert len(pictures.damaged) == 2
    assert pictures.select(torch.arange(9)).damaged == ()


def test_a_batch_of_damaged_pictures_alone_is_empty(tmp_path):
    paths = [p for p in files(make_folder(tmp_path, counts=(("train", 50), ("val", 1)))) if p.parts[-3] == "train"]
    broken(paths, [4])
    first, second = streamed(paths).plain([torch.tensor([4]), torch.tensor([5])])
    assert first.pixels.shape == (0, 3, 24, 24)
    assert second.indices.tolist() == [5]


def test_more_than_a_hundredth_damaged_is_an_error(tmp_path):
    paths = [p for p in files(make_folder(tmp_path, counts=(("train", 50), ("val", 1)))) if p.parts[-3] == "train"]
    first = broken(paths, [4])[0]
    pictures = streamed(paths)
    list(pictures.plain([torch.arange(100)]))
    assert pictures.damaged == (first,)
    second = broken(paths, [60])[0]
    with pytest.raises(UsageError) as error:
        list(pictures.plain([torch.arange(100)]))
    assert str(error.value) == f"at most 1% of the pictures may be damaged, got 2 of 100: {first}, {second}"
    with pytest.raises(UsageError, match="got 1 of 50"):  # counted in what was selected, not in what it came from
        list(streamed(paths).select(torch.arange(50)).plain([torch.arange(50)]))


def test_the_first_picture_may_be_the_damaged_one(tmp_path, monkeypatch):
    root = make_folder(tmp_path, counts=(("train", 60), ("val", 1)))
    (root / "train" / "ant" / "0.png").write_bytes(b"nothing")
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    assert data.load(f"folder:{root}", workers=0).train.shape == (3, 32, 32)


def test_parquet_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    pictures = [encoded(seed=n) for n in range(210)]
    pictures[150] = b"nothing"
    write_parquet(tmp_path / "train-0.parquet", pictures[:100], [n % 3 for n in range(100)])
    write_parquet(tmp_path / "train-1.parquet", pictures[100:], [n % 3 for n in range(110)])
    write_parquet(tmp_path / "test.parquet", pictures[:3], [0, 1, 2])
    train = data.load(f"parquet:{tmp_path}", workers=2).train
    [batch] = train.plain([torch.tensor([149, 150, 0])])
    assert batch.indices.tolist() == [149, 0]
    assert batch.pixels[0].equal(torch.from_numpy(np.array(picture(seed=149))).permute(2, 0, 1))
    assert train.damaged == (f"{tmp_path}/train-1.parquet, row 50",)


def test_a_worker_that_dies_is_an_error_of_the_next_batch_and_no_hang(folder):
    """Not in the middle of whatever else is done, such as a step of training."""
    handler = signal.getsignal(signal.SIGCHLD)
    before = set(multiprocessing.active_children())
    batches = streamed(files(folder) * 50, workers=1).plain(torch.arange(50 * N).split(CHUNK))
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    worker.kill()
    worker.join(10)
    time.sleep(0.2)
    assert signal.getsignal(signal.SIGCHLD) == handler
    started = time.monotonic()
    with pytest.raises(
        UsageError, match="a process that decodes pictures died, try fewer --workers: DataLoader worker"
    ):
        list(batches)
    assert time.monotonic() - started < 30


# The driver


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_run_leaves_out_damaged_pictures(tmp_path, monkeypatch, workers):
    """One epoch, a damaged picture in either set, one of them with a name that is no UTF-8; the same lines whatever the
    workers, and without any, resident.
    """
    for extra in ("safetensors", "yaml"):
        pytest.importorskip(extra)
    from hypercontrast.config import configure
    from hypercontrast.train import train

    root = make_folder(tmp_path / "data", counts=(("train", 75), ("val", 51)))
    bees = root / "train" / "bee"
    (bees / "7.png").rename(bees / os.fsdecode(b"7\xff.png"))
    names = [str(bees / os.fsdecode(b"7\xff.png")), str(root / "val" / "bee" / "7.png")]
    for name in names:
        with open(name, "wb") as file:
            file.write(b"nothing")
    if workers is not None:
        monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    run = tmp_path / "run"
    config = configure(
        dataset=f"folder:{root}", run_dir=str(run), epochs=1, batch_size=50, cpu_ranks=1, workers=workers or 0, quiet=True,
        warmup_epochs=0,
    )  # fmt: skip
    train(config)
    [record] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert record["damaged"] == 2
    assert os.fsdecode((run / "damaged.txt").read_bytes()).splitlines() == names
    assert record["samples"] == 149
