"""Parquet files of image features: one row per image, written in row groups, and how they were computed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from configs.errors import UserError, reason
from configs.files import atomic_file
from data.reading import Reading

FORMAT, KEY = "convnext-fcmae-features/1", b"convnext-fcmae"  # KEY: of the file's metadata
COLUMNS = ["name", "split", "sample", "feature"]  # those that are read; `label` is for other programs
TYPES = [pa.string(), pa.string(), pa.int64()]
ELEMENTS = {"float32": pa.float32(), "float16": pa.float16()}
ROW_GROUP = 8192  # images: 25 MB of 768 float32 features


@dataclass(frozen=True)
class Origin:
    """How the features of a file were computed."""

    weights: str  # path
    digest: str  # of the weights
    ema: bool
    size: tuple[int, int]  # pixels
    precision: str
    source: str  # path or URL of the images
    reading: Reading = field(default_factory=Reading)  # how files were read; older files do not record it


@dataclass(frozen=True)
class FeatureTable:
    """The content of a feature file: N rows, D features each."""

    names: list[str]  # escaped as in `data.name_lists`
    splits: list[str]
    samples: list[int]  # index of each image in its split
    x: np.ndarray  # [N, D] float32 or float16
    origin: Origin


class FeatureWriter:
    """Writes rows to an open file. Row groups have `ROW_GROUP` rows, so the bytes do not depend on the batches."""

    def __init__(self, file: BinaryIO, width: int, kind: str, origin: Origin):
        about = {KEY: json.dumps({"format": FORMAT, **asdict(origin)})}
        fields = [("name", pa.string()), ("split", pa.string()), ("sample", pa.int64()), ("label", pa.string())]
        self.schema = pa.schema([*fields, ("feature", pa.list_(ELEMENTS[kind], width))], about)
        self.writer = pq.ParquetWriter(file, self.schema, use_dictionary=["split", "label"])
        self.waiting = self.schema.empty_table()
        self.rows = 0

    def add(self, names: list[str], split: str, samples: list[int], labels: list[str | None], x: np.ndarray) -> None:
        """Append images; `x` is [B, D] fp32. Raises `UserError` if float16 cannot hold a feature."""
        kind = self.schema.field("feature").type
        with np.errstate(over="ignore"):  # checked here
            values = x.astype(kind.value_type.to_pandas_dtype()).reshape(-1)
        if not np.isfinite(values).all():
            raise UserError(f"a feature is {np.abs(x).max():g}, too large for float16: use --dtype float32")
        feature = pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind)
        columns = [names, [split] * len(names), samples, labels]
        table = pa.table([*columns, feature], schema=self.schema)
        self.waiting = pa.concat_tables([self.waiting, table])
        self.rows += len(names)
        while len(self.waiting) >= ROW_GROUP:
            self.writer.write_table(self.waiting[:ROW_GROUP], ROW_GROUP)
            self.waiting = self.waiting[ROW_GROUP:]


@contextmanager
def feature_file(path: Path, width: int, kind: str, origin: Origin) -> Iterator[FeatureWriter]:
    """Open a file for `width` features an image, of type `kind`, float32 or float16; it appears when it is complete."""
    with atomic_file(path) as file:
        writer = FeatureWriter(file, width, kind, origin)
        try:
            yield writer
            if len(writer.waiting):
                writer.writer.write_table(writer.waiting, ROW_GROUP)
        finally:
            writer.writer.close()  # while the file is open, also after an error


def read_features(path: Path) -> FeatureTable:
    """Read a feature file. Raises `UserError` if it is damaged, or not written by finetune/embed.py."""
    try:
        file = pq.ParquetFile(path)
        about = json.loads((file.schema_arrow.metadata or {})[KEY])
        if about.pop("format") != FORMAT:
            raise KeyError
        origin = TypeAdapter(Origin).validate_python(about)
        table = file.read(COLUMNS)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({reason(error)}): make it again") from None
    except (KeyError, AttributeError, TypeError, ValueError):  # of the metadata
        raise UserError(f"{path} was not written by finetune/embed.py of this version: make it again") from None
    kind = dict(zip(table.schema.names, table.schema.types, strict=True)).get("feature")
    width = kind.list_size if kind and pa.types.is_fixed_size_list(kind) else 0
    expected = [[*TYPES, pa.list_(element, width)] for element in ELEMENTS.values()]
    if table.schema.names != COLUMNS or width < 1 or table.schema.types not in expected:
        raise UserError(f"{path} has columns of other types than finetune/embed.py writes: make it again")
    feature = table["feature"].combine_chunks()
    if not len(table) or any(column.null_count for column in (*table.columns, feature.values)):
        raise UserError(f"{path} {'has missing values' if len(table) else 'has no images'}: make it again")
    x = feature.flatten().to_numpy().reshape(len(table), width)
    if not np.isfinite(x).all():
        raise UserError(f"{path} has features that are not finite: make it again")
    return FeatureTable(*(table[name].to_pylist() for name in ("name", "split", "sample")), x, origin)
