"""Duplicates by embedding: near in their cell, and each near the one that stands for it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_clip import save_clip

from curation.__main__ import main
from curation.duplicates import embedding
from curation.duplicates.embedding import join_by_embedding
from curation.duplicates.gathering import Part, Samples, gather
from curation.duplicates.grouping import KINDS, Groups
from curation.hashing import EXACT_BYTES, THUMBNAIL_BYTES
from tests.raw_shards import write_tar
from toyworld.copies import as_file, photo_likes

WIDTH = 16


def samples_of(vectors: np.ndarray, scratch: Path, *, num_parts: int = 3) -> Samples:
    """Return samples with embeddings and all else alike, the first the best."""

    def part(rows: np.ndarray) -> Part:
        table = pa.table(
            {
                "key": [str(row) for row in rows],
                "hashes.exact_hash": pa.array([bytes(EXACT_BYTES)] * len(rows), pa.binary(EXACT_BYTES)),
                "hashes.perceptual_hash": pa.array(rows, pa.uint64()),
                "hashes.thumbnail": pa.array([bytes(THUMBNAIL_BYTES)] * len(rows), pa.binary(THUMBNAIL_BYTES)),
                "clip.clip_embedding": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors[rows].astype(np.float16).ravel()), vectors.shape[1]
                ),
            }
        )
        return Part(name="", run=0, read=lambda: table, preferences=lambda keys: -rows.astype(np.float64))

    parts = [part(rows) for rows in np.array_split(np.arange(len(vectors)), num_parts)]
    return gather(parts, scratch, crops=False, mirror=False, num_threads=1)


def alone(num: int) -> Groups:
    return Groups(leader=np.arange(num, dtype=np.uint32), kind=np.zeros(num, np.uint8))


def test_planted_neighbours_are_found_in_their_cells(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(embedding, "MIN_CELL", 50)
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(12, WIDTH)) * 3
    originals = middles[rng.integers(12, size=600)] + rng.normal(size=(600, WIDTH))
    copies = originals[:200] + rng.normal(size=(200, WIDTH)) * 0.005
    vectors = np.concatenate([originals, copies])
    samples = samples_of(vectors, tmp_path)
    groups = join_by_embedding(samples, alone(800), ranked=samples.preferred, threshold=0.999)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (unit[:600] @ unit[:600].T - np.eye(600)).max() < 0.998
    assert not groups.kind[:600].any()
    right = groups.leader[600:] == np.arange(200)
    assert right.mean() >= 0.97  # some lie where two cells meet
    assert {KINDS[kind] for kind in groups.kind[600:][right]} == {"embedding"}


def test_followers_of_what_is_now_a_duplicate_join_or_are_kept(tmp_path) -> None:
    angles = np.array([0.0, 0.1, 0.15, 0.5])
    vectors = np.zeros((4, WIDTH))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    samples = samples_of(vectors, tmp_path, num_parts=1)
    leader, kind = np.array([0, 1, 1, 1], np.uint32), np.array([0, 0, 2, 2], np.uint8)
    groups = join_by_embedding(
        samples, Groups(leader=leader, kind=kind), ranked=samples.preferred, threshold=float(np.cos(0.2))
    )
    assert groups.leader.tolist() == [0, 0, 0, 3]
    assert [KINDS[one] for one in groups.kind] == [None, "embedding", "embedding", None]


def test_the_score_reads_the_embeddings_that_it_makes(tmp_path, monkeypatch) -> None:
    images = dict(zip("abcd", photo_likes(4), strict=True))
    write_tar(tmp_path / "raw/a.tar", [(f"{key}.jpg", as_file(each, "PNG")) for key, each in images.items()])
    clip = save_clip(tmp_path / "clip")

    def columns(**settings: str) -> pa.Table:
        named = {f"columns.{name.replace('__', '.')}": value for name, value in settings.items()}
        named |= {"data.shards": f"{tmp_path}/raw/*.tar", "engine.in_process": "true", "columns.clip_model": str(clip)}
        words = [part for key, value in named.items() for part in ("--set", f"{key}={value}")]
        monkeypatch.setattr("sys.argv", ["curation", "--run", str(tmp_path / "run"), *words])
        main()
        return pq.read_table(tmp_path / f"run/columns/{json.loads(settings['scores'])[0]}/a.parquet")

    vectors = np.array(columns(scores='["clip"]')["clip_embedding"].to_pylist(), np.float32)
    cosines = np.triu(vectors @ vectors.T, 1)
    second, first = np.sort(cosines[np.triu_indices(4, 1)])[-2:]
    assert first - second > 0.0005
    threshold = str((first + second) / 2)
    rows = columns(scores='["duplicates"]', duplicates__embedding=threshold, duplicates__radius="0").to_pylist()
    pair = {"abcd"[place] for place in np.unravel_index(cosines.argmax(), cosines.shape)}
    (found,) = (row for row in rows if row["duplicate"])
    assert {found["key"], found["duplicate_of"].removeprefix("a/")} == pair
    assert found["duplicate_kind"] == "embedding"
