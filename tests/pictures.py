"""Small pictures of noise, and data sets made of them, in the layouts that the package reads."""

import io
import json

import numpy as np
import pytest


def picture(size=(32, 32), mode="RGB", seed=0):
    Image = pytest.importorskip("PIL.Image")
    channels = () if mode == "L" else (3,)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(**options):
    buffer = io.BytesIO()
    picture(**options).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root, sizes=((32, 32),), mode="RGB", counts=(("train", 3), ("val", 2)), classes=("ant", "bee")):
    """{train,val}/CLASS/N.png: picture n of class c has the seed 10 c + n."""
    for split, count in counts:
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                picture(sizes[n % len(sizes)], mode, seed=10 * c + n).save(root / split / name / f"{n}.png")
    return root


def write_parquet(path, pictures, labels, *, column="image", label="label", names=None):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({column: [{"bytes": p, "path": None} for p in pictures], label: labels})
    if names:
        metadata = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
