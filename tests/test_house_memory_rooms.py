"""Each room, out of memory: one line that names the shard or step and which key of the recipe to lower."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from feature_run import extract, write_run
from line_worker import IN_PROCESS, LineWorker
from sampling_run import make_run, write_recipe
from stats_run import caption_rows, run_stage, write_caption_shards
from tiny_models import save_llava

import captioning.__main__ as captioning_main
from errors import MemoryShortageError, UserError
from pipelines.engine.pieces import Source
from pipelines.engine.run import QuarantinedShardError, run_over_shards
from pipelines.raw.images import SampleReject, _require_memory, decode_image
from pipelines.store.manifest import Fingerprint, ShardDirectory
from tests.raw_shards import encode, photo, write_laion

IMPOSSIBLE_BYTES = 1 << 50


def allocate(*_: Any, **__: Any) -> None:
    """Ask torch's own allocator for more than any machine has."""
    torch.empty(IMPOSSIBLE_BYTES, dtype=torch.uint8)


def said_by(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(MemoryShortageError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and "what is done is kept" in said
    for part in ("out of memory (can't allocate memory: you tried to allocate", *parts):
        assert part in said, said


def test_captioning(tmp_path, monkeypatch):
    write_laion(tmp_path / "raw" / "laion_00000.tar", 4, first=0)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[data]\nshards = "{run}/raw/*.tar"\n[engine]\nin_process = true\n'
        f'[captioning]\nmodel = "{save_llava(tmp_path / "llava")}"\nmax_new_tokens = 24\nbatch_size = 4\n'
    )
    monkeypatch.setattr(sys, "argv", ["captioning", "--recipe", str(recipe), "--run", str(tmp_path)])
    monkeypatch.setattr("captioning.engines.transformers_engine.ContinuousDecoder.decode", allocate)
    said_by(
        captioning_main.main,
        "captions: laion_00000, samples 0 to 4: out of memory",
        "lower captioning.batch_size = 4 or captioning.max_new_tokens = 24",
    )
    # What the room was thought to hold can be wrong: prompts that came were longer.
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--set", "captioning.batch_size=0"])
    said_by(
        captioning_main.main,
        "lower captioning.batch_size = 0 (32 on a CPU, as many as fit a GPU) or captioning.max_new_tokens = 24",
    )


def test_features_halve_the_batch_and_then_name_the_image(tmp_path, monkeypatch, caplog):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=6)
    monkeypatch.setattr("encoders.kl.KLCodec.start", allocate)
    # All images are cut to one size: it is a batch of three, then one alone.
    said_by(lambda: extract(run), "latent-32: laion_00000, samples 0 to", "lower features.stage2.resolution = 32")
    assert "out of memory: going on with batches of 1" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr("encoders.text.HiddenStatesEncoder._start", allocate)
    # The empty caption comes first, alone.
    said_by(lambda: extract(run, "features.max_tokens=39"), "text: laion_00000", "lower features.max_tokens = 39")


def test_sampling(tmp_path, monkeypatch):
    from sampling.__main__ import main

    run = make_run(tmp_path)
    arguments = ["--recipe", str(write_recipe(run)), "--run", str(run), "--stage", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("sampling.renderer.denoise", allocate)
        said_by(
            lambda: main(arguments),
            "samples/stage2: samples, samples 0 to 2: out of memory",
            "lower sampling.batch_size = 2 or sampling.size = 32x32 or sampling.text_encoder = device (8bit takes half",
        )
    monkeypatch.setattr("sampling.text_encoding.open_text_encoder", allocate)
    path = tmp_path / "prompts.safetensors"
    said_by(
        lambda: main([*arguments, "--set", f"sampling.write_embeddings={path}"]),
        f"embeddings of the prompts for {path}: out of memory",
        "sampling.text_encoder = device",
    )
    assert not path.exists()


def test_statistics(tmp_path, monkeypatch):
    write_caption_shards(tmp_path / "run", {"one": caption_rows("one", ["a cat", "a dog"], ["a cat sits", "a dog"])})
    monkeypatch.setattr("dataset_stats.worker.read_rows", lambda *_, **__: iter([pa.allocate_buffer(IMPOSSIBLE_BYTES)]))
    with pytest.raises(MemoryShortageError) as caught:
        run_stage(tmp_path / "run")
    said = str(caught.value)
    assert "counts: " in said and "samples 0 to 2: out of memory (malloc of size 1125899906842624 failed)" in said
    assert "lower dataset_stats.max_characters = 100000; what is done" in said


def test_evaluation(tmp_path, monkeypatch):
    from tiny_clip import save_clip

    from pipelines.engine.run import EngineConfig
    from sampling.evaluation.config import EvaluationConfig
    from sampling.evaluation.features import compute_features
    from sampling.evaluation.image_sets import open_folder
    from sampling.evaluation.networks import find_networks

    (tmp_path / "set").mkdir()
    for number in range(4):
        (tmp_path / "set" / f"{number}.png").write_bytes(encode(photo(number), "PNG"))
    config = EvaluationConfig(clip=str(save_clip(tmp_path / "clip")), batch_size=4)
    (network,) = find_networks(config)
    monkeypatch.setattr("encoders.vision.ClipTowers.features", allocate)
    said_by(
        lambda: compute_features(
            open_folder(tmp_path / "set", cache=tmp_path),
            network,
            cache=tmp_path,
            config=config,
            engine=EngineConfig(in_process=True),
        ),
        "images, samples 0 to 4: out of memory",
        # A batch of one did not fit either, so that batches are not to blame.
        "lower evaluation.decode_threads = 2 or evaluation.max_pixels",
    )


def test_a_rank_of_training(monkeypatch):
    from training.config import StageTraining
    from training.launch import rank

    settings = StageTraining(network="pixart", global_batch_size=8, zero_stage=1)
    job = SimpleNamespace(settings=settings, command=SimpleNamespace(stage_name="stage2"))
    for name, value in {"parse_command": allocate_nothing, "open_stage": lambda *_, **__: job}.items():
        monkeypatch.setattr(rank, name, value)
    monkeypatch.setattr(rank, "initialize_ranks", allocate_nothing)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rank, "run_rank", lambda job, stop: np.empty(IMPOSSIBLE_BYTES, dtype=np.uint8))
    monkeypatch.setattr("signal.signal", allocate_nothing)
    monkeypatch.setattr("signal.pthread_sigmask", allocate_nothing)
    expected = (
        r"^the machine's memory does not suffice for training\.stage2 \(Unable to allocate .*\): set "
        r"training\.gradient_accumulation_steps above what it says was chosen \(smaller micro-batches\), or set "
        r"training\.keep_activations = 'auto' to 'inputs', or raise training\.zero_stage = 1, or set "
        r"training\.offload to 'average' \(a GPU's alone\), or set training\.optimizer to 'adamw8bit' in a stage that "
        r"begins, or lower training\.num_processes = 0 .*; the last"
    )
    with pytest.raises(MemoryShortageError, match=expected):
        rank.main()
    # As torch says it.
    monkeypatch.setattr(rank, "run_rank", allocate)
    with pytest.raises(MemoryShortageError, match=r"\(can't allocate memory: you tried"):
        rank.main()
    # On a machine with a GPU the error tells which memory it was.
    for error, memory in (
        (MemoryError("Unable to allocate 1 PiB"), "the machine's memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the machine's memory"),
        (torch.OutOfMemoryError("Tried to allocate 20 GiB"), "the GPU's memory"),
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory"),
    ):
        monkeypatch.setattr(rank, "rank_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(rank, "run_rank", failing_with(error))
        with pytest.raises(MemoryShortageError, match=f"^{memory} does not suffice for training"):
            rank.main()


def failing_with(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def allocate_nothing(*_: Any, **__: Any) -> None:
    return None


def test_a_rank_that_the_machine_ends_says_what_to_lower(tmp_path):
    from training.launch.placement import on_this_machine
    from training.launch.ranks import _raise_failure

    with pytest.raises(
        UserError, match=r"rank 1 was ended by SIGKILL; the machine may be out of memory: raise it\. The"
    ):
        _raise_failure({0: 0, 1: -9}, tmp_path, on_this_machine(2), memory_advice="raise it")


def test_the_app_shows_it_on_the_page():
    gradio = pytest.importorskip("gradio")
    from sampling.app import _draw

    studio: Any = SimpleNamespace(choose=lambda checkpoint: None, draw_all=lambda wishes, on_step: allocate())
    with pytest.raises(gradio.Error, match="the image does not fit the memory of the device: choose a smaller size"):
        list(_draw(studio, "stage2", [SimpleNamespace(size="64x64")], on_step=None))  # pyright: ignore[reportArgumentType]


def test_workers_that_the_machine_ends_are_told_from_a_fault_by_what_to_lower(tmp_path):
    """The piece has killed three workers already: what the kernel ends leaves no word."""
    output = ShardDirectory(tmp_path / "out")
    source = Source(name="s0", path="", identity="id0", num_samples=8)
    sources, fingerprint = [source], Fingerprint.of({"version": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.engine.run.begun_attempts", lambda *_: [])
        folder = tmp_path / "out" / ".parts" / "s0"
        folder.mkdir(parents=True)
        (folder / "000000000-000000008.attempts").write_bytes(b"...")
        expected = "killed the worker: s0; if the machine is out of memory, lower a.batch_size = 4$"
        with pytest.raises(QuarantinedShardError, match=expected):
            run_over_shards(
                LineWorker,
                {"calls": str(tmp_path / "calls")},
                sources=sources,
                output=output,
                fingerprint=fingerprint,
                engine=IN_PROCESS,
                max_reject_fraction=1.0,
                room="test",
                memory_settings={"a.batch_size": 4},
            )


def test_a_sound_image_is_no_reject_for_want_of_memory(monkeypatch):
    def starve(*_: Any, **__: Any) -> None:
        raise MemoryError

    data = encode(photo(0), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", starve)
    # Four bytes a pixel are to be had: it is the file that asks for too much.
    with pytest.raises(SampleReject, match="corrupt_image"):
        decode_image(data, max_pixels=10**9)
    with pytest.raises(MemoryError):
        _require_memory(MemoryError(), IMPOSSIBLE_BYTES)


def test_weights_are_not_called_damaged_for_want_of_memory(tmp_path: Path, monkeypatch):
    from pixart.tensor_files import read_weight_file

    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "load", allocate)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        read_weight_file(tmp_path / "weights.pth")
