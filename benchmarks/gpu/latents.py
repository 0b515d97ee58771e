"""`latents`: the worker of the latent family on a VAE of Stable Diffusion's shape, against a loop as users write it.

Both read the same tar of JPEGs, decode and crop ahead in as many threads, and encode in bf16 and channels-last. Ours is
the worker itself: it writes the features, too.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from benchmarks.gpu.parts import Figures, Size
from features.latent_worker import LatentWorker, LatentWorkerConfig, choose_batch_size, choose_decode_threads
from pipelines.engine.pieces import Piece
from pipelines.raw.images import decode_image, resize_and_crop
from pipelines.raw.reading import Reading
from pipelines.raw.shards import describe_shards
from pipelines.recipe import TableConfig

# Pixels of a side: images of the tar.
CASES = {256: 1024, 512: 384, 1024: 96}
TINY_CASES = {32: 40}
NUM_DISTINCT, NUM_ROUNDS, MAX_PIXELS = 32, 2, 10**9
# Photographs are larger than what is cut of them, and oblong.
SOURCE_WIDTH, SOURCE_HEIGHT = 1.5, 1.25


def latents(size: Size) -> Figures:
    """Images per second of both ways at each resolution, and which part of ours waits for decoded images."""
    cases = TINY_CASES if size.is_tiny else CASES
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="bench-latents-") as name:
        folder = Path(name)
        model = make_vae(is_tiny=size.is_tiny)
        model.save_pretrained(folder / "vae")
        plain: Any = model.to(size.device, torch.bfloat16).to(memory_format=torch.channels_last)
        for pixels, num_images in cases.items():
            batch_size = choose_batch_size(size.device, pixels)  # on both sides
            tar = write_tar(folder / f"images_{pixels}.tar", pixels, num_images=num_images)
            worker = LatentWorker(_config(folder, pixels, device=size.device))
            ours: list[tuple[float, float]] = []
            theirs: list[float] = []
            for is_warm in [False] + [True] * (1 if size.is_tiny else NUM_ROUNDS):
                found = _run_worker(
                    worker, tar, folder, num_images=num_images if is_warm else min(num_images, 2 * batch_size)
                )
                seconds = _run_loop(plain, tar, pixels, batch_size=batch_size, is_warm=is_warm)
                if is_warm:
                    ours.append(found)
                    theirs.append(seconds)
            our_seconds, wait_seconds = min(ours)
            key = f"latents_{pixels}"
            figures |= {
                f"{key}_images_per_second": round(num_images / our_seconds, 1),
                f"{key}_plain_images_per_second": round(num_images / min(theirs), 1),
                f"{key}_ratio": round(min(theirs) / our_seconds, 3),
                f"{key}_wait_share": round(wait_seconds / our_seconds, 3),
            }
            size.keep(figures)
    ratios = [value for name, value in figures.items() if name.endswith("_ratio") and isinstance(value, float)]
    return figures | {"latents_ratio": min(ratios)}


def make_vae(*, is_tiny: bool) -> Any:
    """A randomly weighted VAE of Stable Diffusion's shape, or a small one."""
    torch.manual_seed(0)
    widths = (8, 8, 8, 8) if is_tiny else (128, 256, 512, 512)
    model_class: Any = AutoencoderKL  # its annotations want tuples of one
    vae = model_class(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1 if is_tiny else 2,
        norm_num_groups=4 if is_tiny else 32,
        latent_channels=4,
    )
    return vae.eval().requires_grad_(False)


def write_tar(path: Path, pixels: int, *, num_images: int) -> Path:
    """Write a tar of JPEGs of smoothed noise, some distinct ones over and over."""
    rng = np.random.default_rng(0)
    size = (round(SOURCE_WIDTH * pixels), round(SOURCE_HEIGHT * pixels))
    contents: list[bytes] = []
    for _ in range(min(NUM_DISTINCT, num_images)):
        noise = Image.fromarray(rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = len(contents[number % len(contents)])
            tar.addfile(info, io.BytesIO(contents[number % len(contents)]))
    return path


def _config(folder: Path, pixels: int, *, device: str) -> LatentWorkerConfig:
    return LatentWorkerConfig(
        family="latents",
        leads=True,
        settings=TableConfig(),
        model=str(folder / "vae"),
        revision=None,
        dtype="bfloat16",
        batch_size=None,
        is_long_run=True,
        device=device,
        num_threads=1,
        decode_threads=None,
        num_workers_here=1,
        resolution=pixels,
        is_bucketed=False,
        max_upscale=None,
        patch_size=2,
        reading=Reading(dialect="img2dataset"),
        max_pixels=MAX_PIXELS,
        run=folder,
        preview_shard="",
        preview_path=folder / "preview.png",
        num_preview_images=1,
    )


def _run_worker(worker: LatentWorker, tar: Path, folder: Path, *, num_images: int) -> tuple[float, float]:
    """Seconds of our worker over the first images of a tar, and how many of them it waited for decoded images."""
    (shard,) = describe_shards([str(tar)], run=folder)
    piece = Piece(source=shard.source, start=0, stop=num_images, folder=folder / "out", samples_per_slice=256)
    piece.folder.mkdir(exist_ok=True)
    start_seconds = time.perf_counter()
    report = worker(piece)
    seconds = time.perf_counter() - start_seconds
    assert report.num_kept == num_images, report.rejected
    return seconds, report.wait_seconds


def _run_loop(model: Any, tar: Path, pixels: int, *, batch_size: int, is_warm: bool) -> float:
    """Seconds of a plain loop: tensors made in threads ahead, stacked, encoded, and fetched batch by batch."""
    start_seconds = time.perf_counter()
    with ThreadPoolExecutor(choose_decode_threads(1)) as threads, tarfile.open(tar) as file:
        batch: list[Tensor] = []
        found: list[Tensor] = []
        contents = _contents(file, limit=None if is_warm else 2 * batch_size)
        for image in threads.map(lambda data: _to_tensor(data, pixels), contents):
            batch.append(image)
            if len(batch) == batch_size:
                found += _encode(model, batch)
                batch = []
        found += _encode(model, batch) if batch else []
    return time.perf_counter() - start_seconds


def _contents(file: tarfile.TarFile, *, limit: int | None) -> Iterator[bytes]:
    for number, member in enumerate(file):
        if limit is not None and number == limit:
            return
        content = file.extractfile(member)
        assert content is not None
        yield content.read()


def _to_tensor(data: bytes, pixels: int) -> Tensor:
    cropped, _ = resize_and_crop(decode_image(data, max_pixels=MAX_PIXELS), pixels, pixels, max_pixels=MAX_PIXELS)
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1.0


def _encode(model: Any, batch: list[Tensor]) -> list[Tensor]:
    images = torch.stack(batch).to(model.device, model.dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        distribution = model.encode(images).latent_dist
    return list(torch.stack([distribution.mean, distribution.std], dim=1).half().cpu())
