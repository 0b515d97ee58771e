"""The host waits for the device at lines of metrics and checkpoints alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_run import arguments, make_run

from training.launch.placement import on_this_machine
from training.launch.ranks import rank_environment

# Of the verdict on the step before, which is on its way since then; it is read with one `tolist` of host memory.
LOOK = "training/loop/health.py"


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "fp32"), (0, "bf16"), (2, "fp32"), (2, "bf16")])
def test_only_lines_of_metrics_wait_for_the_device(tmp_path: Path, zero_stage: int, dtype: str) -> None:
    run = make_run(tmp_path)
    settings = {"num_steps": 9, "log_every": 4, "checkpoint_every": 6, "zero_stage": zero_stage, "dtype": dtype}
    given = arguments(run, 2, starts_from="scratch", num_processes=1, **settings)
    environment = rank_environment(on_this_machine(1), threads_per_rank=1, errors=str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("step_syncs.py")), *given],
        env=environment | {"RANK": "0", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    waits = json.loads(done.stdout.splitlines()[-1])
    assert len(waits) == 9
    for step, seen in enumerate(waits, 1):
        is_line = step in (4, 8, 9)
        looks = [each for each in seen if LOOK in each]
        assert (len(seen) > len(looks)) == is_line, (step, seen)
        assert is_line or len(looks) == (step not in (1, 5, 7)), "after a line or a checkpoint there is none to look at"
