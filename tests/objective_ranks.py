"""Ranks of `test_training_parts.py`: train stages one after the other in one process group, for the objectives there.

Usage: python objective_ranks.py CASE..., each the JSON of {"run": folder, "objective": name, "settings": {...}}.
"""

import copy
import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from training_run import arguments

from pipelines.command import parse_command
from training.data.batch import Batch
from training.launch.rank import run_rank
from training.loop.zero import initialize_ranks
from training.objectives.choice import choose_objective
from training.objectives.denoise import Denoise
from training.objectives.objective import Average, Frozen, Losses, Objective, Role, Trained
from training.stages import starts
from training.stages.shared_weights import SharedWeights
from training.stages.stage import TrainingJob, open_stage


@dataclass(frozen=True)
class Distil:
    """Say what the teacher says, and stay near the average of what one has said."""

    denoise: Denoise

    @property
    def networks(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained(), "average": Average()}

    @property
    def families(self) -> tuple[str, ...]:
        return self.denoise.families

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        process, inputs = self.denoise.process, self.denoise.inputs
        times = process.times(batch.timestep_draws)
        noisy = process.noisy(inputs.latents(batch), batch.noise, times)
        with torch.no_grad():
            taught = inputs.output(networks["teacher"], noisy, times, batch=batch)
            averaged = inputs.output(networks["average"], noisy, times, batch=batch)
        said = inputs.output(networks["student"], noisy, times, batch=batch)
        parts = {
            name: (said - target).float().square().mean(dim=(1, 2, 3))
            for name, target in (("taught", taught), ("averaged", averaged))
        }
        return Losses(total=parts["taught"] + parts["averaged"], parts=parts, times=times.double() / process.num_times)


def choose(job: TrainingJob, device: torch.device) -> Objective:
    denoise = choose_objective(job, device)
    assert isinstance(denoise, Denoise)
    return Distil(denoise)


class Apart(SharedWeights):
    """Nothing is held once for several networks."""

    def within(self, network: Any) -> Any:
        return network

    def average_of(self, trained: Any) -> Any:
        return copy.deepcopy(trained).requires_grad_(False)


def main() -> None:
    """Train the stages of the command line."""
    initialize_ranks()
    for case in map(json.loads, sys.argv[1:]):
        argv = arguments(Path(case["run"]), 2, **case["settings"])
        job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
        starts.SharedWeights = Apart if case["objective"] == "apart" else SharedWeights
        run_rank(job, threading.Event(), choose=choose if case["objective"] == "distil" else choose_objective)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
