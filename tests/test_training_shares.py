"""Micro-batches and activations that the recipe leaves open: what is chosen, kept, refused and said."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_run import arguments, finish, make_run, metrics, start, train
from warm_python import WarmProcess

from errors import UserError
from training.config import KeepActivations, StageTraining
from training.launch import start as launch_start
from training.launch.memory import (
    Shares,
    _container_bytes,
    _divisors,
    choose_shares,
    describe_bytes,
    machine_bytes,
    ways_to_leave_open,
)
from training.launch.reckoning import Demand, GradientsIn, rank_bytes
from training.launch.start import MEMORY, StepBytes
from training.stages.weights import WeightCounts

GB = 10**9
# Of a sample by what is kept: 24, 14 and 1 units.
PER_SAMPLE = {"all": 0.42 * GB, "products": 0.25 * GB, "inputs": 0.03 * GB}
WEIGHTS = WeightCounts(trained=611_000_000)
GRADIENT_BYTES = 2 * WEIGHTS.trained


def demand(*, num_ranks: int = 1, sample_tokens: int = 256, scale: float = 1.0, **settings: object) -> Demand:
    def step_bytes(size: int, kept: KeepActivations, gradients: GradientsIn) -> int:
        return max(int(size * PER_SAMPLE[kept] * scale), (gradients == "coming") * GRADIENT_BYTES)

    return Demand(
        settings=StageTraining(**{"network": "pixart", "zero_stage": 2, "global_batch_size": 11_392} | settings),
        weights=WEIGHTS,
        num_ranks=num_ranks,
        sample_tokens=sample_tokens,
        step_bytes=step_bytes,
        batch_bytes=lambda size: size * 1_000_000,
    )


def chosen(wanted: Demand, gigabytes: float, former: tuple[int, KeepActivations] | None = None) -> Shares:
    return choose_shares(wanted, available_bytes=int(gigabytes * GB), basis="reckoned", former=former)


@pytest.mark.parametrize(
    ("settings", "gigabytes", "expected"),
    [
        # All of a share at once where that fits, else the fewest micro-batches that do.
        ({"global_batch_size": 128}, 80, (1, "all")),
        ({}, 74, (89, "all")),
        ({"num_ranks": 8}, 74, (16, "all")),
        # 8,192 image tokens at once, 32 of these samples, come before keeping all.
        ({}, 24, (356, "products")),
        ({}, 18, (89, "inputs")),
        # What is typed stays; what is not is chosen around it.
        ({"keep_activations": "inputs"}, 74, (8, "inputs")),
        ({"gradient_accumulation_steps": 64}, 74, (64, "products")),
        ({"gradient_accumulation_steps": 1, "keep_activations": "all"}, 74, (1, "all")),
        ({"global_batch_size": 8, "sample_tokens": 4096, "scale": 16.0}, 24, (4, "products")),
        # Where no micro-batch is large enough, the largest there is.
        ({"global_batch_size": 8, "sample_tokens": 1024, "scale": 16.0}, 14.7, (4, "inputs")),
    ],
)
def test_what_fits_is_chosen(settings: dict, gigabytes: float, expected: tuple[int, str]) -> None:
    shares = chosen(demand(**settings), gigabytes)
    assert (shares.num_micro_batches, shares.kept) == expected
    assert shares.num_micro_batches * shares.micro_batch_size == demand(**settings).share
    assert shares.fits or settings.get("gradient_accumulation_steps") == 1
    assert sum(shares.parts.values()) > rank_bytes(demand(**settings).settings, WEIGHTS, num_ranks=8)


def test_fewer_micro_batches_would_not_fit() -> None:
    for gigabytes in (18, 24, 40, 74):
        shares = chosen(demand(), gigabytes)
        fewer = max(n for n in range(1, shares.num_micro_batches) if 11_392 % n == 0)
        assert sum(demand().parts(fewer, shares.kept).values()) > shares.available_bytes >= shares.total_bytes


def test_a_share_is_cut_by_all_its_divisors_however_large_it_is() -> None:
    for number in (1, 36, 97, 11_392):
        assert _divisors(number) == [each for each in range(1, number + 1) if number % each == 0]
    with pytest.raises(ValueError, match="less than or equal to 1048576"):
        StageTraining(network="pixart", global_batch_size=10**12)


def test_what_a_stage_was_begun_with_stays_as_long_as_it_fits() -> None:
    assert chosen(demand(), 74).num_micro_batches == 89
    kept = chosen(demand(), 74, former=(356, "products"))
    assert (kept.num_micro_batches, kept.kept, kept.is_kept) == (356, "products", True)
    # Not where there is less memory now, or another number of ranks that it does not share evenly.
    assert chosen(demand(), 18, former=(128, "all")).kept == "inputs"
    odd = chosen(demand(num_ranks=89), 74, former=(89, "all"))
    assert odd.num_micro_batches != 89 and not odd.is_kept


def test_where_nothing_fits_it_is_said_what_to_change() -> None:
    message = (
        r"^even micro-batches of 1 with training\.keep_activations = 'inputs' need 14\.7 GB a rank of 10 GB that it "
        r"may take: weights 1\.22 GB, gradients 2\.44 GB, optimizer .*activations 1\.22 GB.*; "
        r"add SET='training\.offload=average training\.optimizer=adamw8bit' \(in a stage that begins\): "
        r"9\.34 GB in micro-batches of 64, keeping 'inputs', which fits, or take more GPUs"
    )
    with pytest.raises(UserError, match=message):
        chosen(demand(), 10)
    # What cannot be chosen for the user is found for him, that which costs least first; or nothing is enough.
    for gigabytes, settings, said in (
        (12.5, {}, "add SET=training.offload=average: 12."),
        (12, {}, "add SET=training.optimizer=adamw8bit (in a stage that begins): 11"),
        (8, {}, "add SET='training.offload=optimizer training.zero_stage=0' (in a stage that begins): 7.3"),
        (8, {"num_ranks": 2}, "add SET=training.offload=average: 7."),
        (4, {}, "set training.offload to 'average' (a GPU's alone), or set training.optimizer to"),
    ):
        with pytest.raises(UserError) as lack:
            chosen(demand(**settings), gigabytes)
        assert said in str(lack.value)
    with pytest.raises(
        UserError, match=r"raise training\.zero_stage = 0, or leave .*keep_activations = 'all' out, or add"
    ):
        chosen(demand(num_ranks=2, zero_stage=0, keep_activations="all"), 10)
    # What is typed is tried, and the plan names the keys that are typed and no others.
    for settings, ways in (
        ({"gradient_accumulation_steps": 4, "keep_activations": "inputs"}, ["gradient_accumulation_steps = 4"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps = 4"]),
        ({"keep_activations": "products"}, ["keep_activations = 'products'"]),
        ({}, []),
    ):
        assert ways_to_leave_open(demand(**settings).settings) == [f"leave training.{way} out" for way in ways]
    typed = chosen(demand(gradient_accumulation_steps=11_392, keep_activations="inputs"), 10)
    assert not typed.fits


def test_a_container_has_what_its_groups_leave_it(tmp_path: Path) -> None:
    def group(path: str, limit: str, used: int, inactive: int, names: tuple[str, str, str]) -> None:
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")

    second = ("memory.max", "memory.current", "inactive_file")
    group("a", "1000", 400, 100, second)
    group("a/b", "max", 300, 0, second)
    assert list(_container_bytes("0::/a/b\n", tmp_path)) == [700]
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group("memory", "500", 450, 20, first)
    # In a container the group's own path is often not there, and the root is its group.
    assert list(_container_bytes("4:cpu,memory:/docker/x\n0::/\n", tmp_path)) == [70]
    assert 0 < machine_bytes() < 1 << 60


def test_sizes_are_written_with_three_digits() -> None:
    assert [describe_bytes(size) for size in (7, 1234, 56_789_000, 75.6e9, 4.7e12)] == [
        *("7 B", "1.23 kB", "56.8 MB", "75.6 GB", "4.7 TB"),
    ]


class CountingStep:
    """Stands for a step on a GPU whose allocator says 100 bytes, and 7 for each sample."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, str]] = []
        self.settings = StageTraining(network="pixart")
        self.networks: dict = {}
        self.sample = launch_start.SampleShape(channels=4, height=32, width=32, num_text_tokens=1, text_width=8)

    def measure(self, size: int, kept: str, *, device: torch.device, meter: object, gradients: str) -> int:
        self.asked.append(("measure", size, kept))
        if size > 8:
            raise torch.OutOfMemoryError
        return 100 + 7 * size

    def reckon(self, size: int, kept: str, *, gradients: str) -> int:
        self.asked.append(("reckon", size, kept))
        return 50 + 3 * size + (gradients == "coming")


def test_a_gpu_measures_two_small_sizes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(launch_start, "CudaBytes", lambda device: SimpleNamespace())
    settings = {"path": tmp_path / MEMORY, "share": 178, "device": torch.device("cuda", 0)}
    step = CountingStep()
    sizes = StepBytes(step, **settings, sample_tokens=512)
    assert [sizes(size, "all", "there") for size in (178, 4, 89)] == [100 + 7 * size for size in (178, 4, 89)]
    assert step.asked == [("measure", 4, "all"), ("measure", 8, "all")]
    assert sizes.basis == "measured on NVIDIA H100"
    sizes.save()
    again = CountingStep()
    assert StepBytes(again, **settings, sample_tokens=512)(178, "all", "there") == 100 + 7 * 178 and again.asked == []
    # Another card, and a size that it has no room for.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert StepBytes(again, **settings, sample_tokens=256)(178, "all", "there") > 1 << 50
    # A file that somebody has damaged is made again.
    (tmp_path / MEMORY).write_text("{")
    assert StepBytes(again, **settings, sample_tokens=512)(178, "all", "there") == 100 + 7 * 178


def test_a_cpu_reckons_the_share_and_what_lies_between(tmp_path: Path) -> None:
    step = CountingStep()
    sizes = StepBytes(step, path=tmp_path / MEMORY, share=64, device=torch.device("cpu"), sample_tokens=256)
    assert sizes(64, "all", "there") == 50 + 3 * 64 and step.asked == [("reckon", 64, "all")]
    assert sizes(16, "all", "there") == 50 + 3 * 16 and step.asked[1:] == [("reckon", 1, "all")]


def test_a_run_chooses_and_a_resume_keeps_what_it_chose(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    settings = {"starts_from": "scratch", "num_processes": 1, "checkpoint_every": 2, "log_every": 1}
    said = train(run, 2, **settings, num_steps=2, gradient_accumulation_steps=4)
    assert "1 ranks x 4 micro-batches x 2, keeping 'all' activations; chosen to fit" in said
    # Left out now, it stays; so does what is written of it.
    said = train(run, 2, **settings, num_steps=4)
    assert "1 ranks x 4 micro-batches x 2, keeping 'all' activations; as it was begun" in said
    assert "gradient_accumulation_steps:" not in said
    trainer = json.loads((run / "training" / "stage2" / "step-4" / "trainer.json").read_text())
    assert trainer["steering"]["gradient_accumulation_steps"] == 4 and trainer["keep_activations"] == "all"
    said = train(run, 2, **settings, num_steps=6, gradient_accumulation_steps=1)
    assert "training.stage2.gradient_accumulation_steps: 4 -> 1; the same samples, but sums are rounded" in said
    assert len(metrics(run, 2)) == 6
    # As the plan says it, without a rank.
    process = start(run, 2, **settings, num_steps=8)
    assert "as it was begun" in finish(process)


def test_numbers_that_hardly_anybody_means_are_said_before_they_cost_anything(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def said(**settings: object) -> str:
        flags = [*arguments(run, 2, starts_from="scratch", num_processes=1, **settings), "--plan"]
        return finish(WarmProcess("training", flags))

    calm = said()
    assert "WARNING" not in calm and "1.92 epochs" in calm
    loud = said(num_steps=150_000, global_batch_size=11_392, checkpoint_every=200_000, warmup_steps=150_000)
    assert "34,176,000 epochs over 50 samples: training.stage2.num_steps 150,000 x global_batch_size 11,392" in loud
    assert "global_batch_size 11,392 is more than the 50 samples there are" in loud
    assert "steps would be" not in said(global_batch_size=60_000), "one step is more than enough of them"
    assert "warmup_steps 150,000 of num_steps 150,000: the learning rate never reaches 0.001" in loud
    assert "checkpoint_every 200,000 of num_steps 150,000: the only checkpoint is the last" in loud
    rate = said(learning_rate=0.5, decay_shape="sqrt")
    assert "learning_rate 0.5 is high for AdamW" in rate
    assert "decay_shape 'sqrt' shapes no decay: training.stage2.decay_fraction is 0" in rate
    summed = said(dtype="bf16", gradient_accumulation_steps=16, global_batch_size=16)
    assert "16 micro-batches are summed in bf16 under training.zero_stage = 0" in summed
