"""Families of features as records: tensors of a directory's members, columns of its index, how they go together.

A directory says in its manifest (`extra.family`) of which family it is, so that whoever checks or reads features knows
no family by name. Directories made before that are text or latents, which `schema_of` tells apart.
"""

# D text width, H W pixels

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from pipelines.as_typed import typed_command
from pipelines.store.feature_store import FeatureTarWriter, payload_crc32, read_payload
from pipelines.store.manifest import Fingerprint, Manifest

# How captions may be stored (`features.text_storage`), and the numpy dtype of the stored values [L, D]. The 8-bit ones
# come with one float32 scale per token [L]: value = stored * scale[token].
TEXT_STORAGE_DTYPES = {"bfloat16": "uint16", "float8_e4m3": "uint8", "int8": "int8"}
NULL_CAPTION_FILE = "null.safetensors"

TEXT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("caption_index", pa.int32()),
        ("offset", pa.int64()),
        ("scale_offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("crc32", pa.uint32()),
        ("num_tokens", pa.int32()),
        ("weight", pa.float32()),
        ("reject", pa.string()),
    ]
)
LATENT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("mean_offset", pa.int64()),
        ("std_offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("crc32", pa.uint32()),
        ("channels", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bucket", pa.string()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("resized_width", pa.int32()),
        ("resized_height", pa.int32()),
        ("crop_x", pa.int32()),
        ("crop_y", pa.int32()),
        ("label", pa.int32()),
        ("reject", pa.string()),
    ]
)
# Crops have no class label: what is made of images alone has no condition.
PIXEL_SCHEMA = pa.schema(
    [field for field in LATENT_SCHEMA if field.name not in ("mean_offset", "std_offset", "label")]
    + [pa.field("pixels_offset", pa.int64())]
)
PIXELS = "pixels"


def mend_null_caption() -> str:
    """Return what to do about a damaged null caption."""
    return f"remove it and type `{typed_command('features')}` again: that writes it anew, with one shard's texts"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a member, and the columns of an index row that say where it lies.

    Attributes:
        name: in the member; `{column}` stands for the row's value, as in `embedding_{caption_index}`.
        dtype: numpy's name of it; bfloat16 is uint16 and float8_e4m3 uint8.
        offset: column with the position of its first byte in the tar.
        shape: its dimensions, each a column or a number.
    """

    name: str
    dtype: str
    offset: str
    shape: tuple[str | int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    def shape_in(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape that an index row gives it."""
        return tuple(row[size] if isinstance(size, str) else size for size in self.shape)

    def end(self, row: Mapping[str, Any]) -> int:
        """Return the position behind its last byte in the tar."""
        return row[self.offset] + int(np.prod(self.shape_in(row))) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class FamilySchema:
    """What a directory of features holds.

    Every index has the columns `key`, `shard`, `crc32` (over a row's payloads end to end) and `reject`. A reject has no
    payload: its `crc32` is null, or of a caption that is `unreadable_text` that of the caption in UTF-8.

    Attributes:
        name: of the family, the same for every resolution and every choice of columns.
        tensors: of each row, in the order of their payloads.
        columns: of the index.
        leads: whether it says which samples there are: its index has `bucket` and, where there may be a condition,
            `label`, and batches are cut from its buckets. Other families are joined to it by key.
        rows_per_sample: rows of each sample; of several, a batch draws one by `weight`.
        null_file: of a family whose rows differ in their first dimension, as captions do: the file beside the shards
            with the tensor of a dropped row. In a batch such rows lie end to end. Their first tensor is [n, D]; a
            second is its float32 scale [n]. Without a null file all rows of a bucket have one shape, and are stacked.
    """

    name: str
    tensors: tuple[StoredTensor, ...]
    columns: pa.Schema
    leads: bool = False
    rows_per_sample: int = 1
    null_file: str | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in their first dimension."""
        return self.null_file is not None

    def spec(self) -> dict[str, Any]:
        """Return it as JSON, for a manifest."""
        columns = [[field.name, str(field.type)] for field in self.columns]
        fields = {name: getattr(self, name) for name in ("name", "leads", "rows_per_sample", "null_file")}
        return fields | {"tensors": [asdict(tensor) for tensor in self.tensors], "columns": columns}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """Return what `spec` gave."""
        tensors = [StoredTensor(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in spec["tensors"]]
        columns = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in spec["columns"]])
        return cls(**{**spec, "tensors": tuple(tensors), "columns": columns})

    def read(self, tar: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Return views of a member's tensors by name, in their order; `rows` are those of its sample that were kept."""
        return {
            tensor.name.format_map(row): read_payload(
                tar, row[tensor.offset], dtype=tensor.dtype, shape=tensor.shape_in(row)
            )
            for tensor in self.tensors
            for row in rows
        }

    def names_in(self, row: Mapping[str, Any]) -> list[str]:
        """Return what the tensors of an index row are called in their member."""
        return [tensor.name.format_map(row) for tensor in self.tensors]

    def write(
        self,
        tar: FeatureTarWriter,
        rows: Sequence[dict[str, Any]],
        payloads: Sequence[Sequence[np.ndarray]],
    ) -> None:
        """Write one sample's member, and put into its `rows` where each of its `payloads` lies, how large it is.

        Tensors of a kind lie together: those of all rows, then the next of all rows.
        """
        names = [self.names_in(row) for row in rows]
        tensors = {names[i][j]: arrays[j] for j in range(len(self.tensors)) for i, arrays in enumerate(payloads)}
        offsets = tar.add(rows[0]["key"], tensors)
        for row, own_names, arrays in zip(rows, names, payloads, strict=True):
            for tensor, name, array in zip(self.tensors, own_names, arrays, strict=True):
                sizes = zip(tensor.shape, array.shape, strict=True)
                row |= {size: found for size, found in sizes if isinstance(size, str)}
                assert (tensor.shape_in(row), tensor.dtype) == (array.shape, array.dtype.name), name
                row[tensor.offset] = offsets[name]
            row |= {"nbytes": arrays[0].nbytes, "crc32": payload_crc32(*arrays)}


def text_schema(storage: str, width: int, *, rows_per_sample: int = 1) -> FamilySchema:
    """Return the record of captions of `width` D, stored as `features.text_storage` says."""
    dtype = TEXT_STORAGE_DTYPES[storage]
    values = StoredTensor(name="embedding_{caption_index}", dtype=dtype, offset="offset", shape=("num_tokens", width))
    scale = StoredTensor(name="scale_{caption_index}", dtype="float32", offset="scale_offset", shape=("num_tokens",))
    return FamilySchema(
        name="text",
        # Scales last: values then start at multiples of a cache line for every D that is one itself.
        tensors=(values,) if storage == "bfloat16" else (values, scale),
        columns=TEXT_SCHEMA,
        rows_per_sample=rows_per_sample,
        null_file=NULL_CAPTION_FILE,
    )


def latent_schema(*, has_std: bool = True, name: str = "latents", leads: bool = True) -> FamilySchema:
    """Return the record of a codec's latents, fp16 [channels, height, width]; `std` where it has one.

    What else lies on the grid of the latents, such as an edge map through the same codec, is a family of another
    `name` with the same tensors and columns.
    """
    names = ("mean", "std") if has_std else ("mean",)
    absent = set() if has_std else {"std_offset"}
    return FamilySchema(
        name=name,
        tensors=tuple(
            StoredTensor(name=tensor, dtype="float16", offset=f"{tensor}_offset", shape=("channels", "height", "width"))
            for tensor in names
        ),
        columns=pa.schema([field for field in LATENT_SCHEMA if field.name not in absent]),
        leads=leads,
    )


def pixel_schema() -> FamilySchema:
    """Return the record of crops of images, uint8 [3, H, W]: what a codec is trained on."""
    stored = StoredTensor(name="pixels", dtype="uint8", offset="pixels_offset", shape=("channels", "height", "width"))
    return FamilySchema(name=PIXELS, tensors=(stored,), columns=PIXEL_SCHEMA, leads=True)


def schema_of(manifest: Manifest) -> FamilySchema | None:
    """Return the record of a directory's family; None where it holds no features.

    Before manifests said it there were captions and latents, and captions were stored as bfloat16 at first.
    """
    extra = manifest.extra
    if "family" in extra:
        return FamilySchema.from_spec(extra["family"])
    if "text" in extra:
        text = extra["text"]
        rows_per_sample = len(extra.get("captions", ())) or 1
        return text_schema(text.get("storage", "bfloat16"), text["d_text"], rows_per_sample=rows_per_sample)
    return latent_schema() if "vae" in extra else None


def text_directory(run: Path, caption_columns: Sequence[str] = ("caption",), *, variant: str | None = None) -> Path:
    """Return where a run keeps its text features: `features/text`, or `features/text-<column>+<column>` for others.

    Those of a `variant` lie beside them, as `features/text@<variant>`.
    """
    name = "text" if tuple(caption_columns) == ("caption",) else f"text-{'+'.join(caption_columns)}"
    return run / "features" / _variant_of(name, variant)


def texts_digest(captions: Manifest, columns: Sequence[str]) -> str:
    """Return what text features of some columns know their captions by: what would be their fingerprint without scores.

    Captioning writes it, of given captions for each column; captions of an older version have their fingerprint alone.
    """
    whole = captions.extra.get("texts", captions.fingerprint.digest)
    if "texts_of" not in captions.extra:
        return whole
    return Fingerprint.of({column: captions.extra["texts_of"].get(column, whole) for column in columns}).digest


def caption_columns(text: Manifest) -> list[str]:
    """Return the columns of captions that a directory of text features was made of."""
    return [caption["column"] for caption in text.extra.get("captions", [{"column": "caption"}])]


def latent_directory(run: Path, resolution: int, *, variant: str | None = None) -> Path:
    """Return where a run keeps its latents of a base resolution in pixels: `features/latent-<resolution>`.

    Those of a `variant`, such as another VAE's, lie beside them, as `features/latent-<resolution>@<variant>`.
    """
    return image_directory(run, "latent", resolution, variant=variant)


def image_directory(run: Path, name: str, resolution: int, *, variant: str | None = None) -> Path:
    """Return where a run keeps a family made of its images: `features/<name>-<resolution>`, of the base resolution."""
    return run / "features" / _variant_of(f"{name}-{resolution}", variant)


def _variant_of(name: str, variant: str | None) -> str:
    return name if variant is None else f"{name}@{variant}"


def family_directory(run: Path, name: str) -> Path:
    """Return where a run keeps a family that is of no resolution, neither text nor images: `features/<name>`."""
    return run / "features" / name
