"""Augmentation against torchvision's: pixels for the same parameters, distributions of the parameters, and purity."""

import itertools
import math
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hypercontrast import data
from hypercontrast.data.augment import (
    AUGMENTATIONS,
    JITTER,
    Augmentation,
    _compiled,
    colour_jitter,
    gaussian_blur,
    random_blur,
    random_boxes,
    random_colour,
    random_flip,
    random_jitter,
    random_shift,
    resized_crop,
)

MANY = 10_000
SIZES = [(32, 32), (31, 45), (17, 9)]
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # factors that leave a picture as it is
ORDERS = list(itertools.permutations(range(4)))


def draws(n=MANY, seed=0):
    return data.Draws(seed, torch.arange(n))


def pictures(n, channels=3, size=(32, 32), seed=0):
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed)) * 255


def colourful(n):
    """Random pictures, and among their pixels those without a hue, with two channels alike, black and white."""
    images = pictures(n, size=(9, 7))
    images[:, :, 0] = images[:, :1, 0]
    images[:, 0, 1] = images[:, 1, 1]
    images[:, 1, 2] = images[:, 2, 2]
    images[:, 2, 3] = images[:, 0, 3]
    images[:, :, 4, :3] = 0
    images[:, :, 4, 3:] = 255
    return images


def assert_share(chosen, share):
    """That `chosen` [N] is true as often as independent draws with this chance are, within 4.5 standard errors."""
    assert abs(chosen.double().mean() - share) < 4.5 * math.sqrt(share * (1 - share) / len(chosen))


def assert_uniform(values, low, high):
    scipy = pytest.importorskip("scipy.stats")
    assert low <= values.min()
    assert values.max() <= high
    assert scipy.kstest(values.double(), scipy.uniform(low, high - low).cdf).pvalue > 1e-3


def assert_same_distribution(ours, theirs):
    """Kolmogorov and Smirnov's test of two samples; where values repeat it errs on the lenient side."""
    assert pytest.importorskip("scipy.stats").ks_2samp(ours, theirs, method="asymp").pvalue > 1e-3


# Pixels for given parameters


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_resized_crop_is_torchvisions(size, channels):
    """Up to float32's rounding of where a pixel comes from, up to 1e-5 of a pixel, which 255 levels may lie apart."""
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    height, width = size
    images = pictures(44, channels, size)
    special = [[0, 0, height, width], [height - 1, width - 1, 1, 1], [0, 0, 1, width], [1, 2, height - 1, 1]]
    boxes = torch.cat([random_boxes(draws(40), size), torch.tensor(special).float()])
    flipped = random_flip(resized_crop(images, boxes), draws(44, seed=1))
    sides = []
    for image, box, ours in zip(images, boxes.int().tolist(), flipped, strict=True):
        theirs = F.resized_crop(image, *box, size=[height, width])
        sides.append(min(((theirs, False), (theirs.flip(-1), True)), key=lambda side: (ours - side[0]).abs().max()))
        torch.testing.assert_close(ours, sides[-1][0], rtol=0, atol=1e-2)
    assert len({flip for _, flip in sides}) == 2


@pytest.mark.parametrize("adjustment", range(4), ids=list(JITTER))
def test_colour_adjustments_are_torchvisions(adjustment):
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[adjustment]
    images = colourful(48)
    low, high = list(JITTER.values())[adjustment]
    factors = torch.tensor(NEUTRAL).repeat(48, 1)
    factors[:, adjustment] = torch.linspace(low, high, 48)
    ours = colour_jitter(images, factors, torch.tensor(ORDERS * 2)) / 255
    for n, factor in enumerate(factors[:, adjustment].tolist()):
        torch.testing.assert_close(ours[n], theirs(images[n] / 255, factor), rtol=0, atol=1e-6)


def test_every_order_of_the_colour_adjustments_is_torchvisions():
    """A sixth decimal for each of four adjustments, which may enlarge the error of those before them 1.4 times."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    names = [f"{name}_factor" for name in JITTER]
    images, factors = colourful(48), random_jitter(draws(48))[0]
    ours = colour_jitter(images, factors, torch.tensor(ORDERS * 2)) / 255
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    for n, order in enumerate(ORDERS * 2):
        parameters = dict(zip(names, factors[n].tolist(), strict=True), fn_idx=torch.tensor(order))
        torch.testing.assert_close(ours[n], jitter.transform(images[n] / 255, parameters), rtol=0, atol=5e-6)


def test_colours_change_with_their_order():
    images, factors = colourful(1).expand(24, -1, -1, -1), random_jitter(draws(1))[0].expand(24, -1)
    assert len(colour_jitter(images, factors, torch.tensor(ORDERS)).flatten(1).unique(dim=0)) == 24


def test_neutral_factors_leave_the_picture():
    images = colourful(24)
    jittered = colour_jitter(images, torch.tensor(NEUTRAL).expand(24, -1), torch.tensor(ORDERS))
    torch.testing.assert_close(jittered, images, rtol=0, atol=1e-4)


def test_grey_is_torchvisions():
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    images = colourful(5)
    ours = random_colour(images, draws(5), jitter_share=0, grey_share=1)
    torch.testing.assert_close(ours / 255, F.rgb_to_grayscale(images / 255, num_output_channels=3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "channels"), [((224, 224), 3), ((65, 41), 3), ((64, 100), 1), ((9, 9), 2)])
def test_blur_is_torchvisions(size, channels):
    """Up to rounding: of two sums of at most 23 products, as against theirs of 23² in one go."""
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    images = pictures(4, channels, size)
    sigmas = torch.tensor([0.1, 0.5, 1.3, 2.0])
    side = 2 * max(size[0] // 20, 1) + 1
    for image, sigma, ours in zip(images / 255, sigmas.tolist(), gaussian_blur(images, sigmas) / 255, strict=True):
        torch.testing.assert_close(ours, F.gaussian_blur(image, [side, side], [sigma, sigma]), rtol=0, atol=3e-6)


def test_blur_is_as_wide_as_simclrs():
    point = torch.zeros(1, 1, 224, 224)
    point[:, :, 112, 112] = 1
    blurred = gaussian_blur(point, torch.tensor([2.0]))[0, 0]
    assert (blurred > 0).sum(0).max() == (blurred > 0).sum(1).max() == 23
    assert blurred.sum() == pytest.approx(1, abs=1e-5)


def test_shift_gives_crops_of_the_padded_picture():
    images = pictures(50, 2, (6, 7))
    shifted = random_shift(images, draws(50), padding=2)
    padded = torch.nn.functional.pad(images, [2] * 4)
    for n in range(50):
        offsets = [(i, j) for i in range(5) for j in range(5) if padded[n, :, i : i + 6, j : j + 7].equal(shifted[n])]
        assert len(offsets) == 1


# Distributions


@pytest.mark.parametrize("size", [(32, 32), (30, 200), (152, 31)], ids=["square", "wide", "tall"])
def test_boxes_are_distributed_as_torchvisions(size):
    """A very wide or tall picture has few boxes that fit, so that some are torchvision's fallback in the middle."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    ours = random_boxes(draws(), size)
    torch.manual_seed(1)
    crop, image = v2.RandomResizedCrop(size, scale=(0.2, 1.0)), torch.zeros(3, *size)
    drawn = [crop.make_params([image]) for _ in range(MANY)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn]).float()

    top, left, height, width = ours.unbind(1)
    assert ours.equal(ours.round())
    assert bool((ours[:, :2] >= 0).all() and (top + height <= size[0]).all() and (left + width <= size[1]).all())

    def features(boxes):
        top, left, height, width = boxes.unbind(1)
        room_y, room_x = size[0] - height, size[1] - width
        return height * width, width / height, top, left, top / room_y.clamp_min(1), left / room_x.clamp_min(1)

    for x, y in zip(features(ours), features(theirs), strict=True):
        assert_same_distribution(x, y)
    if size[0] != size[1]:
        fallback = theirs.mode(0).values
        share = (theirs == fallback).all(1).double().mean()
        assert share > 0.1
        assert abs((ours == fallback).all(1).double().mean() - share) < 4.5 * math.sqrt(2 * share * (1 - share) / MANY)


def test_corners_are_uniform():
    """In the room that a box leaves: its first place as likely as its last."""
    scipy = pytest.importorskip("scipy.stats")
    top, left, height, width = random_boxes(draws(), (32, 32)).unbind(1)
    for corner, extent in ((top, height), (left, width)):
        for room in (3, 7):
            places = corner[32 - extent == room].long().bincount(minlength=room + 1)
            assert len(places) == room + 1
            assert scipy.chisquare(places).pvalue > 1e-3


def test_shifts_are_uniform():
    scipy = pytest.importorskip("scipy.stats")
    image = torch.arange(1.0, 26).view(1, 1, 5, 5)
    middles = random_shift(image.expand(MANY, -1, -1, -1), draws(), padding=2)[:, 0, 2, 2]
    assert scipy.chisquare(middles.long().bincount(minlength=26)[1:]).pvalue > 1e-3


def test_every_other_picture_is_flipped():
    images = torch.tensor([0.0, 1.0]).expand(MANY, 1, 1, 2)
    assert_share(random_flip(images, draws())[:, 0, 0, 0] == 1, 0.5)


def test_jitter_is_drawn_as_torchvisions():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    scipy = pytest.importorskip("scipy.stats")
    factors, order = random_jitter(draws())
    torch.manual_seed(1)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    drawn = [jitter.make_params([]) for _ in range(MANY)]
    for n, (name, (low, high)) in enumerate(JITTER.items()):
        assert (low, high) == getattr(jitter, name)
        assert_uniform(factors[:, n], low, high)
        assert_same_distribution(factors[:, n], [parameters[f"{name}_factor"] for parameters in drawn])
    counts = torch.tensor([(order == torch.tensor(one)).all(1).sum() for one in ORDERS])
    assert counts.sum() == MANY
    assert scipy.chisquare(counts).pvalue > 1e-3


def test_shares_of_jittered_and_of_grey_pictures():
    images = pictures(1, size=(2, 2)).expand(MANY, -1, -1, -1)

    def same(x):
        return (x == images).flatten(1).all(1)

    assert_share(~same(random_colour(images, draws(), grey_share=0)), 0.8)
    grey = random_colour(images, draws(), jitter_share=0)
    assert_share(~same(grey), 0.2)
    both = random_colour(images, draws())
    assert_share(same(both), 0.2 * 0.8)
    assert_share((both[:, :1] == both).flatten(1).all(1), 0.2)


def test_blur_is_drawn_as_simclrs():
    """Sigma from the pictures: beside the middle of a blurred point it is darker by exp(-1/(2·sigma²))."""
    point = torch.zeros(MANY, 1, 9, 9)
    point[:, :, 4, 4] = 1
    blurred = random_blur(point, draws())
    chosen = (blurred != point).flatten(1).any(1)
    assert_share(chosen, 0.5)
    ratio = blurred[chosen, 0, 4, 3] / blurred[chosen, 0, 4, 4]
    assert_uniform((-0.5 / ratio.double().log()).sqrt(), 0.1, 2.0)


def test_colour_is_distributed_as_torchvisions():
    """Of one picture's corner: mean and spread of its channels, and how often it is left as it is, or turned grey."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    n = 3000
    image = pictures(1, size=(2, 2))[0] / 255
    ours = random_colour((image * 255).expand(n, -1, -1, -1), draws(n)) / 255
    torch.manual_seed(3)
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    theirs = torch.stack([v2.RandomGrayscale(0.2)(jitter(image)) for _ in range(n)])

    def features(x):
        corner = x[:, :, 0, 0].double()
        same = (x - image).flatten(1).abs().amax(1) < 1e-6
        grey = corner.amax(1) - corner.amin(1) < 1e-6
        return torch.cat([corner, corner.square(), torch.stack([same, grey], 1).double()], 1)

    x, y = features(ours), features(theirs)
    standard_error = (x.var(0) / n + y.var(0) / n).sqrt()
    assert bool(((x.mean(0) - y.mean(0)).abs() < 4.5 * standard_error).all())


# A pure function of seed and place


@pytest.fixture(params=list(AUGMENTATIONS))
def augment(request):
    return AUGMENTATIONS[request.param]


def test_views_do_not_depend_on_the_batch(augment):
    images, places = pictures(30, size=(40, 28)), torch.randperm(1000)[:30] + 2**33
    whole = augment(images, data.Draws(7, places))
    for order in (torch.arange(30), torch.arange(30).flip(0), torch.randperm(30)):
        for part in order.split([1, 0, 17, 12]):
            assert augment(images[part], data.Draws(7, places[part])).equal(whole[part])


def test_views_depend_on_seed_and_place(augment):
    images = pictures(1, size=(40, 28)).expand(8, -1, -1, -1)
    views = torch.cat([augment(images, draws(8, seed)) for seed in (0, 1, 2**32, 2**62 + 1)])
    different = len(views.flatten(1).unique(dim=0))
    # Of the 25 shifts 32 views meet 18 on average, give or take 2.
    assert different == 32 if augment.crop == "resized" else different >= 12


def test_seeds_and_places_that_differ_by_little_share_nothing():
    seeds = [seed << shift for shift in (0, 30, 32) for seed in range(1, 33)]
    places = torch.cat([torch.arange(64) << shift for shift in (0, 32)])[1:]
    pairs = torch.cat([data.Draws(seed, places).uniform(2) for seed in seeds])
    assert len(pairs.unique(dim=0)) == len(set(seeds)) * len(places.unique())


def test_views_leave_the_generators_alone(augment):
    before = torch.get_rng_state(), random.getstate()
    images = pictures(3, size=(40, 28))
    kept = images.clone()
    augment(images, draws(3))
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert images.equal(kept)


def test_views_keep_shape_and_scale(augment):
    images = pictures(200, size=(40, 28))
    views = augment(images, draws(200))
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 255 + 1e-3  # weights of a crop and of a blur sum to 1 up to rounding


def test_a_view_is_cut_then_mirrored_then_coloured_then_blurred():
    images, steps = pictures(8, size=(24, 20)), draws(8)
    views = random_flip(resized_crop(images, random_boxes(steps, (24, 20))), steps)
    assert AUGMENTATIONS["crop_flip"](images, draws(8)).equal(views)
    views = random_colour(views, steps)
    assert AUGMENTATIONS["crop_flip_colour"](images, draws(8)).equal(views)
    assert AUGMENTATIONS["crop_flip_colour_blur"](images, draws(8)).equal(random_blur(views, steps))


def test_normalising_is_torchvisions():
    F = pytest.importorskip("torchvision.transforms.v2.functional")
    pixels = pictures(4, size=(9, 7)).to(torch.uint8)
    mean, std = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([60.0, 50.0, 70.0])
    ours = data.normalize(pixels, mean, std)
    torch.testing.assert_close(ours, F.normalize(pixels.float(), mean.tolist(), std.tolist()))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_crop_and_blur_keep_white_white():
    white = torch.full((200, 1, 40, 28), 255.0)
    torch.testing.assert_close(Augmentation("resized", blur=True)(white, draws(200)), white, rtol=0, atol=1e-2)


def test_one_channel_goes_through_all_but_colour():
    images = pictures(5, 1, (28, 28))
    for augment in (Augmentation("shift"), Augmentation("resized"), Augmentation("resized", blur=True)):
        one, three = augment(images, draws(5)), augment(images.expand(-1, 3, -1, -1), draws(5))
        torch.testing.assert_close(three, one.expand(-1, 3, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["crop_flip", "crop_flip_colour", "crop_flip_colour_blur"])
def test_pictures_that_were_cut_are_finished_alike(name):
    augment = AUGMENTATIONS[name]
    images, numbers = pictures(9, size=(40, 28)), draws(9)
    cut = resized_crop(images, random_boxes(numbers, (40, 28)))
    assert augment.finished(cut, numbers).equal(augment(images, draws(9)))


def test_what_does_not_fit_is_named():
    images = pictures(4, 1)
    with pytest.raises(ValueError, match="draws must be as many as images, got 1 for 4"):
        AUGMENTATIONS["crop_flip"](images, draws(1))
    for apply in (AUGMENTATIONS["crop_flip_colour"], AUGMENTATIONS["crop_flip_colour"].finished):
        with pytest.raises(ValueError, match="images must have 3 channels for their colours to change, got 1"):
            apply(images, draws(4))


def test_views_change_colours_where_there_are_any():
    def views_of(channels, side, augmentation):
        images = data.Images(torch.zeros(2, channels, side, side, dtype=torch.uint8), torch.arange(2))
        return data.Dataset(images, images, ("a", "b"), augmentation).view_augmentation

    assert views_of(3, 32, "crop_flip") == "crop_flip_colour"
    assert views_of(3, 65, "crop_flip") == "crop_flip_colour_blur"
    assert views_of(1, 32, "crop_flip") == "crop_flip"
    assert views_of(1, 28, "shift") == "shift"


# For a GPU


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_operation_makes_a_gpu_wait(augment):
    """On the meta device whatever has to know values raises. A constant made from Python numbers, which would be copied
    to a GPU, passes there, but shows on the CPU as `lift_fresh`.
    """
    for device in ("meta", "cpu"):
        images, places = pictures(6, size=(40, 28)).to(device), torch.arange(6, device=device)
        with _Operations() as operations:
            views = augment(images, data.Draws(3, places))
        assert views.shape == images.shape
        assert views.device.type == device
        assert "arange" in operations.names
        assert "lift_fresh" not in operations.names


class _Indices(TorchDispatchMode):
    """What torch.compile may take for an index: ranges, parts of them, and their sums and products with numbers."""

    KEEPERS = ("detach", "add", "sub", "mul", "neg", "slice", "select", "view", "unsqueeze", "expand")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        operands = [x for x in args if isinstance(x, torch.Tensor)]
        known = bool(operands) and all(any(x is index for index in self.found) for x in operands)
        if name == "arange" or (known and name in self.KEEPERS):
            self.found.append(result)
        return result


def test_indices_fit_32_bits(augment):
    """On a GPU torch.compile works them out in as many, with constants of its own: those of a sum times a number."""
    with _Indices() as indices:
        augment(pictures(6, size=(24, 20)), draws(6))
    assert indices.found
    for index in indices.found:
        assert index.is_floating_point() or index.abs().max() < 2**31


def test_views_are_one_graph_for_all_seeds(augment):
    """Captured whole, once for each shape; the draws go on afterwards as they do without."""
    torch.compiler.reset()
    captured = torch.compile(
        lambda images, draws: augment(images, draws), backend="eager", fullgraph=True, dynamic=False
    )
    for n in (6, 5):
        captured(pictures(n), draws(n))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed, n in ((1, 5), (2**62 + 5, 6)):
            images, ours, expected = pictures(n), draws(n, seed), draws(n, seed)
            assert captured(images, ours).equal(augment(images, expected))
            assert ours.uniform().equal(expected.uniform())


def test_compiled_views_are_the_same_up_to_code_generation(augment, monkeypatch):
    """Lowered as for inductor, to its operators, which are then run: no C++ compiler is needed, and no half minute."""
    asked, really = [], torch.compile

    def lowered(function, **options):
        asked.append(options)
        return really(function, backend="aot_eager_decomp_partition", **options)

    torch.compiler.reset()
    _compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lowered)
    compiled, images = replace(augment, compile=True), pictures(6, size=(24, 20))
    for seed in (3, 2**62 + 5):
        torch.testing.assert_close(compiled(images, draws(6, seed)), augment(images, draws(6, seed)), rtol=0, atol=1e-2)
    _compiled.cache_clear()
    assert asked == [{"dynamic": False}]  # once: what was compiled is kept


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_compiled_views_are_the_same(augment):
    """Up to the rounding of fused products, which is that of places in a crop above all."""
    torch.compiler.reset()
    compiled = replace(augment, compile=True)
    compiled(pictures(16), draws(16))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (0, 1, 2**62 + 5):
            images = pictures(16, seed=seed)
            expected = augment(images, draws(16, seed))
            torch.testing.assert_close(compiled(images, draws(16, seed)), expected, rtol=0, atol=1e-2)
