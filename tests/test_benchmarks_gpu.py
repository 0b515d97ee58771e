"""The frame of `make bench-gpu`: parts in processes of their own, of which none takes another along."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report
from benchmarks.gpu.muon import BatchedMuon, cost, largest_share
from benchmarks.gpu.parts import PARTS, Bar, Figures, Part, Size
from benchmarks.gpu.process import run_job
from benchmarks.gpu.steps import case_flops, largest_fitting
from benchmarks.gpu.training import TINY, XL_256, XL_256_HEADS_64
from benchmarks.train import LEARNING_RATE, VAE_FACTOR, WEIGHT_DECAY, caption_lengths, step_flops
from training.stages.networks import blank_network

ONE = Part(name="one", module="tests.test_benchmarks_gpu", bars=(Bar(key="one_ratio", at_least=1.5),))
BROKEN = Part(name="broken", module="tests.test_benchmarks_gpu", bars=(Bar(key="broken_share", at_most=3.0),))
DEAD = Part(name="dead", module="tests.test_benchmarks_gpu", bars=())
SLOW = Part(name="slow", module="tests.test_benchmarks_gpu", bars=())
WRITING = Part(name="writing", module="tests.test_benchmarks_gpu", bars=())
READING = Part(name="reading", module="tests.test_benchmarks_gpu", bars=())
RATIOS = {"heads64_256": ("heads64_256_ratio",), "fp8_256": ("fp8_256_ratio_mlp_alone",)}
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
BARE = Part(name="bare", module="tests.test_benchmarks_gpu", bars=())


def one(size: Size) -> Figures:
    return {"one_ratio": 1.25, "one_device": size.device}


def broken(size: Size) -> Figures:
    size.keep({"broken_share": 2.0})
    raise ValueError("a | b\nc")


def dead(size: Size) -> Figures:
    os._exit(9)


def slow(size: Size) -> Figures:
    size.keep({"slow_share": 0.5})
    time.sleep(600)
    return {}


def writing(size: Size) -> Figures:
    for name in CACHES:
        folder = Path(os.environ[name])
        folder.mkdir(parents=True)
        (folder / "kernel").write_text(name)
    return {}


def reading(size: Size) -> Figures:
    for name in CACHES:
        assert (Path(os.environ[name]) / "kernel").read_text() == name
    return {"reading_folder": os.environ[CACHES[0]]}


def bare(size: Size) -> Figures:
    import no_such_package  # type: ignore[import-not-found]

    return {"bare_version": no_such_package.version}


def run_tiny(parts, *, part_seconds, total_seconds):
    deadline_seconds = time.perf_counter() + total_seconds
    return command.run_parts(parts, is_tiny=True, part_seconds=part_seconds, deadline_seconds=deadline_seconds)


def test_a_part_that_fails_or_dies_leaves_the_others_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    parts = [BROKEN, DEAD, BARE, ONE]
    figures, is_complete = run_tiny(parts, part_seconds=60, total_seconds=600)
    assert not is_complete
    assert figures["one_ratio"] == 1.25 and figures["one_device"] == "cpu" and "one_error" not in figures
    assert figures["broken_error"] == "ValueError: a | b\nc" and figures["broken_share"] == 2.0
    assert figures["dead_error"] == "its process ended by itself with status 9"
    assert figures["bare_error"] == "needs the package no_such_package, which is not here"
    shown = capfd.readouterr()
    assert "in broken" in shown.err and "no_such_package" not in shown.err
    rows = [line for line in shown.out.splitlines() if line.startswith("| `")]
    assert rows[0].endswith("**failed: ValueError: a \\| b c** | share ≤ 3.0 | met |")
    assert rows[3].endswith("| ratio ≥ 1.5 | short |")
    assert json.loads((tmp_path / "gpu-tiny.json").read_text()) == figures
    assert (tmp_path / "gpu-tiny.md").read_text().splitlines()[2:] == rows


def test_the_limit_ends_a_job_and_what_it_has_started(tmp_path):
    started = tmp_path / "pid"

    def job(keep):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        started.write_text(str(child.pid))
        keep({"early": 1.0})
        time.sleep(600)
        return {"late": 1.0}

    outcome = run_job(job, limit_seconds=3)
    assert outcome.error == "not ready after 3 s"
    assert outcome.figures == {"early": 1.0}
    assert not _is_running(int(started.read_text()))


def test_a_run_ends_with_its_time_and_what_is_left_is_not_started(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "LEAST_SECONDS", 1.0)
    figures, is_complete = run_tiny([SLOW, ONE], part_seconds=75, total_seconds=5)
    assert not is_complete
    assert figures["slow_share"] == 0.5 and figures["slow_error"].startswith("not ready after ")
    assert figures["one_error"] == "not started: 0 s left" and "one_ratio" not in figures
    rows = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| `")]
    assert rows[1] == "| `one` | seconds 0.0, **not started: 0 s left** | ratio ≥ 1.5 | open |"


def test_parts_share_a_cache_of_what_is_compiled(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "PARTS", (WRITING, READING))
    for name in CACHES:
        monkeypatch.setenv(name, "")  # so that both are as they were afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert command.main(["--tiny"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    folder = json.loads(capfd.readouterr().out.splitlines()[-1])["reading_folder"]
    assert Path(folder).parent.name.startswith("bench-gpu-") and not Path(folder).parent.exists()


def _is_running(pid: int) -> bool:
    for _ in range(100):  # its new parent has yet to take it down
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_parts_run_in_their_own_order_and_unknown_ones_are_refused(capsys):
    assert command.chosen_parts("one, broken", [BROKEN, ONE]) == [BROKEN, ONE]
    assert command.chosen_parts("one", [BROKEN, ONE]) == [ONE]
    with pytest.raises(SystemExit):
        command.main(["--tiny", "loop_265"])
    assert "no part is called loop_265" in capsys.readouterr().err


def test_a_missing_figure_leaves_its_bar_open():
    assert Bar(key="x", at_least=1).verdict({}) == Bar(key="x", at_least=1).verdict({"x": None}) == "open"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_small_on_a_cpu(tmp_path):
    program = (
        "import sys; from pathlib import Path; from benchmarks.gpu import report, __main__ as command; "
        f"report.RESULTS = Path({str(tmp_path)!r}); sys.exit(command.main(['--tiny', '--seconds', '240']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert figures["is_tiny"] and figures["device"] == "cpu" and "torch" in figures
    for part in PARTS:
        found = {key for key in figures if key.startswith(part.name)}
        assert {f"{part.name}_seconds", *RATIOS.get(part.name, ()), *(bar.key for bar in part.bars)} <= found
        assert len(found) >= 4, "beside its seconds and bars what they were made of"
    unknown = [key for key in figures if "_" in key and not key.startswith(tuple(part.name for part in PARTS))]
    assert set(unknown) == {"is_tiny", "flash_attn_4"} & set(figures)


def test_operations_of_a_step_are_those_of_all_blocks_counted():
    case = replace(TINY, num_layers=5)
    side = case.pixels // VAE_FACTOR
    num_text_tokens = int(caption_lengths(case).sum())
    counted = step_flops(case).of_samples(2, height=side, width=side, num_text_tokens=num_text_tokens)
    assert case_flops(case) == counted


def test_the_batch_shrinks_by_quarters_until_it_fits_and_what_was_measured_is_said():
    tried = []

    def measure(case):
        tried.append(case.batch_size)
        if case.batch_size > 100:
            raise torch.OutOfMemoryError

    assert largest_fitting(XL_256, measure).batch_size == 96
    assert tried == [176, 132, 96]
    with pytest.raises(torch.OutOfMemoryError):
        largest_fitting(replace(XL_256, batch_size=1024), measure)


def test_a_step_of_ours_in_other_heads_has_as_many_weights():
    counts = [
        sum(weight.numel() for weight in blank_network(case.config).parameters()) for case in (XL_256, XL_256_HEADS_64)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_in_batches_is_torchs_muon(shape):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for _ in range(3)]
    sides = [[weight.clone().requires_grad_() for weight in weights] for _ in range(2)]
    batched = BatchedMuon(sides[0])
    single = torch.optim.Muon(sides[1], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for ours, theirs in zip(*sides, strict=True):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
        batched.step()
        single.step()
    for ours, theirs, before in zip(*sides, weights, strict=True):
        change = (theirs - before).norm()
        assert change > 0 and (ours - theirs).norm() < 0.02 * change


def test_matrices_are_dealt_out_by_cost():
    weights = [torch.empty(8, 8) for _ in range(6)] + [torch.empty(8, 32) for _ in range(3)]
    costs = sorted(sum(cost(weight.shape) for weight in largest_share(weights, num_cards=num)) for num in (1, 3))
    assert costs[1] == sum(cost(weight.shape) for weight in weights)
    assert costs[0] < 1.2 * costs[1] / 3


IMPORTING = """
import os, torch

os.environ["CUDA_VISIBLE_DEVICES"] = "1"
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""

def initialise():
    raise AssertionError("CUDA was initialised")

torch.cuda._lazy_init = initialise
from benchmarks.gpu.__main__ import import_libraries

import_libraries()
assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
assert not torch.utils._triton.has_triton.cache_info().currsize
assert "torchao" in __import__("sys").modules
"""


def test_importing_the_libraries_does_not_touch_cuda_nor_remember_that_there_was_none():
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTING], check=True)
