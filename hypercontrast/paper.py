"""What the paper publishes: every value of its tables that is on hand, and the recipe and run file that make ours.

`TABLES` maps a table's number to its cells. A cell names the recipes that lead to it and where a run folder keeps our
value, so that `hypercontrast.table` can put the two side by side.

Source: arXiv 2605.20302, tables 1 to 14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypercontrast.evaluate import METHODS, NC_COLUMNS
from hypercontrast.runs import LOSS_TITLES


@dataclass(frozen=True)
class Quantity:
    """How a value is printed, and the standard deviation over seeds it is taken to have where none is published."""

    scale: float  # ours times this is the paper's unit
    digits: int  # decimals the paper prints
    our_digits: int
    spread: float = 0.0  # in the paper's unit
    relative_spread: float = 0.0  # as a share of the value

    def assumed_std(self, value: float) -> float:
        return self.spread + self.relative_spread * abs(value)


POINTS = Quantity(scale=100, digits=1, our_digits=2, spread=0.3)  # accuracies and mAP, in per cent
SEEDED_POINTS = Quantity(scale=100, digits=2, our_digits=2)  # table 13, where every value has its own
CORRUPTION_ERROR = Quantity(scale=1, digits=1, our_digits=2, spread=0.3)  # ours is in per cent too
RANK = Quantity(scale=1, digits=1, our_digits=2, relative_spread=0.05)
RATIO = Quantity(scale=1, digits=2, our_digits=4, spread=0.01)  # the last decimal published
ITERATIONS = Quantity(scale=100, digits=1, our_digits=1, spread=3.0)
TEMPERATURE = Quantity(scale=1, digits=2, our_digits=2)

# How the assumed standard deviations read in words.
ASSUMED = (
    "0.3 points for accuracies, mAP and mCE, 5 % of an effective rank, 0.01 for alignments, MIR and HDR, 3 points of"
    " iterations, and 0 for a best temperature"
)


@dataclass(frozen=True)
class Cell:
    """One published value: of a method (a row of the paper's), on a data set, in a further column where there is one.

    recipes: names of recipes that make it, the first is the one to run; several where the paper took the best.
    source: file in a run folder, then keys within it; or BEST_TEMPERATURE.
    identity: settings a run must share with a recipe to be compared with the cell at all.
    seeds: runs behind the published value.
    """

    method: str
    dataset: str
    column: str
    quantity: Quantity
    value: float
    recipes: tuple[str, ...]
    source: tuple[str, ...]
    std: float | None = None
    identity: tuple[str, ...] = ("dataset", "loss", "imbalance")
    seeds: int = 1


@dataclass(frozen=True)
class Table:
    """heading: what `Cell.column` is called, empty where the table has one column a data set."""

    name: str
    title: str
    heading: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()


DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet100": "ImageNet-100",
    "imagenet1k": "ImageNet-1K",
}
# Which of them a data set that the paper does not have stands beside, by its number of classes.
CLASSES = {10: "cifar10", 100: "cifar100", 1000: "imagenet1k"}
# Epochs and first learning rate of the linear probes (appendix E).
PROBES = {"cifar10": (100, 5.0), "cifar100": (100, 5.0), "imagenet100": (90, 2.0), "imagenet1k": (90, 0.8)}
# What was tried for tables 9 and 10 (appendix E).
TEMPERATURES = (0.07, *(tenths / 10 for tenths in range(1, 11)))

# Places in a run folder, as of `Cell.source`.
BEST_TEMPERATURE = ("best temperature",)  # in no file, but over several runs
ACCURACY = ("metrics.jsonl", "accuracy")
COLLAPSE_SHARE = "share_to_collapse"  # with the last epoch's values, though made from all epochs

# Means and standard deviations over 5 seeds.
TABLE_13 = {
    "cifar100": {"ce": (72.16, 0.20), "normface": (72.32, 0.17), "ntce": (72.78, 0.21), "nonl": (73.38, 0.28)},
    "cifar10": {"ce": (94.52, 0.15), "normface": (94.64, 0.10), "ntce": (94.68, 0.07), "nonl": (94.84, 0.15)},
}

TABLE_1 = {
    "ce": (94.6, 72.1, 84.4, 75.4),
    "etf-dr": (94.4, 72.1, 84.5, 75.4),
    "normface": (94.8, 72.4, 84.4, 76.4),
    "ntce": (94.7, 72.9, 84.7, 76.7),
    "nonl": (94.9, 73.6, 84.9, 76.5),
}

TABLE_2 = {
    "linear-probe": (95.0, 73.9, 84.8, 75.1),
    "normalized-probe": (94.9, 73.6, 84.8, 75.1),
    "prototypes": (95.0, 73.9, 86.8, 75.1),
}

# Key of the metric -> its column and how it is printed.
COLLAPSE = {key: (title, RANK if key.endswith("erank") else RATIO) for key, title in NC_COLUMNS.items()}
# CIFAR-10 and CIFAR-100 of every metric in that order.
TABLE_3 = {
    "ce": ((22.5, 96.4), (8.6, 57.1), (8.9, 89.7), (0.59, 0.83), (0.69, 1.05), (0.98, 0.97), (0.03, 0.13)),
    "etf-dr": ((9.0, 18.4), (8.9, 94.8), (9.0, 99.0), (0.58, 0.59), (0.59, 0.61), (0.98, 1.0), (0.02, 0.11)),
    "normface": ((10.5, 13.6), (9.0, 96.2), (9.0, 96.1), (0.12, 0.01), (0.14, 0.06), (0.95, 1.0), (0.04, 0.30)),
    "ntce": ((9.0, 12.6), (9.0, 99.0), (8.9, 98.9), (0.08, 0.01), (0.10, 0.05), (0.96, 1.0), (0.05, 0.30)),
    "nonl": ((4.0, 11.4), (9.0, 99.0), (9.0, 99.0), (0.11, 0.01), (0.16, 0.06), (0.95, 1.0), (0.05, 0.30)),
}
TABLE_3_PROBE = ((4.5, 7.5), (9.0, 66.7), (8.3, 77.8), (0.99, 1.03), (0.10, 0.34), (0.99, 0.95), (0.07, 0.11))
TABLE_3_PROTOTYPES = {
    "weight_erank": (9.0, 66.5),
    "weight_alignment": (0.0, 0.0),
    "mir": (1.0, 0.87),
    "hdr": (0.09, 0.14),
}

# Key of the data set in transfer.json -> its column.
TRANSFER = {
    "food101": "Food-101",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cars": "Cars",
    "dtd": "DTD",
    "pets": "Pets",
    "flowers": "Flowers",
    "voc2007": "VOC07 mAP",
}
TABLE_4 = {
    "ce": (68.0, 88.6, 67.7, 25.9, 69.9, 67.0, 81.4, 67.1),
    "nonl": (70.7, 90.0, 71.0, 38.1, 69.4, 72.9, 85.2, 68.3),
    "ntce": (69.3, 89.9, 69.8, 28.1, 70.0, 69.4, 81.9, 67.8),
    "normface": (69.8, 89.8, 69.7, 29.7, 70.1, 69.7, 83.2, 67.9),
    "etf-dr": (57.2, 83.9, 54.3, 9.8, 64.0, 49.2, 58.3, 60.0),
}

TABLE_5 = {"ce": 80.1, "etf-dr": 79.2, "normface": 77.8, "ntce": 77.6, "nonl": 77.8}

IMBALANCES = ("0.1", "0.02", "0.01")
# CIFAR-10-LT, then CIFAR-100-LT.
TABLE_6 = {
    "ce": ((88.1, 76.8, 70.2), (55.5, 41.5, 37.4)),
    "etf-dr": ((88.0, 77.8, 71.3), (54.4, 40.6, 36.2)),
    "normface": ((88.0, 79.0, 74.3), (54.6, 40.1, 35.9)),
    "ntce": ((88.8, 80.8, 77.3), (56.8, 43.7, 39.0)),
    "nonl": ((89.2, 80.5, 76.3), (57.4, 44.7, 40.0)),
}

TABLE_7_METRICS = ("instance_alignment", "weight_alignment", "weight_erank", "intra_erank", "inter_erank")
TABLE_7 = {
    "normface": (79.4, 8.2, 52.6, 45.4, 56.2),
    "ntce": (79.4, 6.8, 56.4, 36.6, 52.4),
    "nonl": (79.4, 7.4, 34.6, 14.6, 47.2),
}

TABLES_9_10 = {
    "cifar100": {"normface": 0.3, "ntce": 0.2, "nonl": 0.1},
    "cifar10": {"normface": 0.6, "ntce": 0.6, "nonl": 0.2},
}

# Batch size -> suffix of the recipe.
BATCHES = {2048: "", 4096: "-4096", 8192: "-8192"}
TABLE_11 = {
    "ce": (75.4, 75.4, 75.1),
    "normface": (75.6, 76.4, 76.3),
    "ntce": (76.0, 76.7, 76.7),
    "nonl": (75.0, 76.2, 76.5),
}


def _recipes(dataset: str, loss: str) -> tuple[str, ...]:
    """The recipe of the data set and the loss; on ImageNet-1K that of the batch size table 11 calls best."""
    name = f"{dataset}-{loss}"
    if dataset != "imagenet1k" or loss not in TABLE_11:
        return (name,)
    published = dict(zip(BATCHES.values(), TABLE_11[loss], strict=True))
    return tuple(name + suffix for suffix, value in published.items() if value == max(published.values()))


def _table_1() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            LOSS_TITLES[loss],
            dataset,
            "",
            POINTS,
            value,
            _recipes(dataset, loss),
            ACCURACY,
            std=TABLE_13.get(dataset, {}).get(loss, (None, None))[1],
        )
        for loss, row in TABLE_1.items()
        for dataset, value in zip(DATASETS, row, strict=True)
    )


def _table_2() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            f"SCL, {METHODS[method]}",
            dataset,
            "",
            POINTS,
            value,
            _recipes(dataset, "scl"),
            ("evaluation.json", method, "accuracy"),
        )
        for method, row in TABLE_2.items()
        for dataset, value in zip(DATASETS, row, strict=True)
    )


def _table_3() -> tuple[Cell, ...]:
    rows: list[tuple[str, str, str, Mapping[str, tuple[float, float]]]] = [
        (LOSS_TITLES[loss], loss, "head", dict(zip(COLLAPSE, row, strict=True))) for loss, row in TABLE_3.items()
    ]
    of_scl = {"linear-probe": dict(zip(COLLAPSE, TABLE_3_PROBE, strict=True)), "prototypes": TABLE_3_PROTOTYPES}
    rows += [(f"SCL, {METHODS[method]}", "scl", method, row) for method, row in of_scl.items()]
    return tuple(
        Cell(
            title,
            dataset,
            COLLAPSE[key][0],
            COLLAPSE[key][1],
            values[column],
            _recipes(dataset, loss),
            ("evaluation.json", method, "nc_compat", key),
        )
        for title, loss, method, row in rows
        for column, dataset in enumerate(("cifar10", "cifar100"))
        for key, values in row.items()
    )


def _table_4() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            LOSS_TITLES[loss],
            "imagenet1k",
            title,
            POINTS,
            value,
            _recipes("imagenet1k", loss),
            ("transfer.json", "results", name, "value"),
        )
        for loss, row in TABLE_4.items()
        for (name, title), value in zip(TRANSFER.items(), row, strict=True)
    )


def _table_5() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            LOSS_TITLES[loss],
            "imagenet1k",
            "",
            CORRUPTION_ERROR,
            value,
            _recipes("imagenet1k", loss),
            ("corruptions.json", "mce"),
        )
        for loss, value in TABLE_5.items()
    )


def _table_6() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            LOSS_TITLES[loss],
            dataset,
            imbalance,
            POINTS,
            value,
            (f"{dataset}lt-{imbalance}-{loss}",),
            ACCURACY,
        )
        for loss, rows in TABLE_6.items()
        for dataset, row in zip(("cifar10", "cifar100"), rows, strict=True)
        for imbalance, value in zip(IMBALANCES, row, strict=True)
    )


def _table_7() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            LOSS_TITLES[loss],
            "cifar100",
            COLLAPSE[key][0],
            ITERATIONS,
            value,
            _recipes("cifar100", loss),
            ("metrics.jsonl", COLLAPSE_SHARE, key),
        )
        for loss, row in TABLE_7.items()
        for key, value in zip(TABLE_7_METRICS, row, strict=True)
    )


def _tables_9_10() -> tuple[Cell, ...]:
    return tuple(
        Cell(LOSS_TITLES[loss], dataset, "", TEMPERATURE, value, _recipes(dataset, loss), BEST_TEMPERATURE)
        for dataset, row in TABLES_9_10.items()
        for loss, value in row.items()
    )


def _table_11() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            LOSS_TITLES[loss],
            "imagenet1k",
            str(batch),
            POINTS,
            value,
            (f"imagenet1k-{loss}{suffix}",),
            ACCURACY,
            identity=("dataset", "loss", "imbalance", "batch_size"),
        )
        for loss, row in TABLE_11.items()
        for (batch, suffix), value in zip(BATCHES.items(), row, strict=True)
    )


def _table_13() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            LOSS_TITLES[loss],
            dataset,
            "",
            SEEDED_POINTS,
            mean,
            _recipes(dataset, loss),
            ACCURACY,
            std=std,
            seeds=5,
        )
        for dataset, row in TABLE_13.items()
        for loss, (mean, std) in row.items()
    )


def _absent(number: int) -> Table:
    note = f"The values of table {number} are not on hand: there is nothing to compare with."
    return Table(f"Table {number}", "values not on hand", "", (), (note,))


def _tables() -> dict[str, Table]:
    tables = {
        "1": Table(
            "Table 1",
            "top-1 accuracy, %",
            "",
            _table_1(),
            (
                "On ImageNet-1K the paper takes the best of the batch sizes in table 11; so do the recipes here."
                " ETF+DR is not in that table and stays at 2048.",
            ),
        ),
        "2": Table(
            "Table 2",
            "top-1 accuracy of classifiers on features trained by SCL, %",
            "",
            _table_2(),
        ),
        "3": Table("Table 3", "neural collapse on the training set", "metric", _table_3(), NOTES_3),
        "4": Table("Table 4", "linear transfer from ImageNet-1K, % (top-1, or mAP)", "to", _table_4()),
        "5": Table(
            "Table 5",
            "mean corruption error on ImageNet-C relative to AlexNet, %",
            "",
            _table_5(),
        ),
        "6": Table("Table 6", "top-1 accuracy after long-tailed training, %", "imbalance", _table_6()),
        "7": Table("Table 7", "share of the iterations to 95 % of neural collapse, %", "metric", _table_7(), NOTES_7),
        "11": Table("Table 11", "top-1 accuracy by batch size, %", "batch", _table_11()),
        "13": Table("Table 13", "top-1 accuracy, mean ± standard deviation over 5 seeds, %", "", _table_13()),
    }
    # The values on hand do not say which of the two tables has which data set: they stay together.
    tables["9"] = tables["10"] = Table(
        "Tables 9 and 10", "best temperature at batch size 512, by top-1 accuracy", "", _tables_9_10()
    )
    return {str(number): tables.get(str(number), _absent(number)) for number in range(1, 15)}


NOTES_3 = (
    "Ours are the numbers as the paper's public code computes them (NeuralCollapse(compat=True), nc_compat in"
    " evaluation.json), with the trained head's weights, for SCL with the linear probe's or the class means.",
    "Features of a ResNet are non-negative (ReLU, then average pooling), so they cannot form a simplex ETF. At the"
    " best even state within reach, an orthogonal frame for the features and a simplex ETF for the weights, both"
    " alignments are 2 − 2√((K−1)/K) = 0.1026 for K = 10 and 0.0100 for K = 100, MIR is 0.9516 and 0.9972, HDR 0.0496"
    " and 0.3002, inter and W erank K − 1, intra 0.",
    "For SCL with fixed prototypes the paper's intra, inter and instance are not on hand.",
)
NOTES_7 = (
    "The definition is ours, for the material on hand does not have the paper's. A metric's values over the measured"
    " epochs are smoothed by an exponential moving average, bias-corrected, whose weights fall by 0.9 an epoch. A run's"
    " own last smoothed value stands for its neural collapse. Given is the share of all epochs, hence of all"
    " iterations, after which the smoothed metric has covered 95 % of the way from its first value to its last, and"
    " from which on it stays there.",
)

TABLES: dict[str, Table] = _tables()
