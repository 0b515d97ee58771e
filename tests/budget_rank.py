"""One of the ranks whose living storages are counted; `test_training_budget.py` starts them and reads their file.

Usage: python budget_rank.py FILE case..., where a case is a JSON object of `Case`.
"""

import copy
import gc
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from encoders.living_bytes import LivingBytes
from pixart.dit import DiT
from pixart.model import PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM
from pixart.processes.make import process_of
from training.config import StageTraining
from training.data.blank import SampleShape, blank_batch
from training.launch import reckoning
from training.launch.reckoning import Demand, rank_parts
from training.loop import measure
from training.loop.averages import Averages
from training.loop.footprint import Step
from training.loop.measure import UpdateMeter
from training.loop.networks import Networks
from training.loop.optimizers import adamw, adamw8bit
from training.loop.zero import ZeroModel, compute_dtype, initialize_ranks
from training.objectives.consistency import Consistency
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.matching import DistributionMatching
from training.objectives.objective import Objective, Role
from training.stages.critics import add_critic
from training.stages.networks import blank_copies, count_weights
from training.stages.shared_weights import SharedWeights
from training.stages.trainable import trainable_of

PIECE_SIZE = 16384
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, its samples and how they are trained."""

    num_layers: int
    num_heads: int
    head_dim: int
    side: int
    num_text_tokens: int
    text_width: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> PixArtConfig:
        return PixArtConfig(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            caption_channels=self.text_width,
            sample_size=self.side,
        )

    @property
    def sample(self) -> SampleShape:
        return SampleShape(
            channels=4,
            height=self.side,
            width=self.side,
            num_text_tokens=self.num_text_tokens,
            text_width=self.text_width,
        )


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class HostBytes(LivingBytes):
    """Counts what has values."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, a product of bf16 in fp32: a CPU without units for bf16 takes up to fifty times as long."""
        if function not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return super().__torch_dispatch__(function, types, args, kwargs)
        result = function(*(factor.float() for factor in args), **(kwargs or {})).bfloat16()
        self._count(result, is_ignored=False)  # what is in between is not the network's, and not counted
        return result

    def _count_storage(self, storage: torch.UntypedStorage, *, is_ignored: bool) -> None:
        if storage.device.type != "meta":
            super()._count_storage(storage, is_ignored=is_ignored)


def objective_of(case: Case, settings: StageTraining, device: torch.device) -> Objective:
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=compute_dtype(settings))
    process = process_of(settings.process_spec, device=device)
    if settings.objective == "denoise":
        return Denoise(process=process, inputs=inputs)
    assert isinstance(process, DDPM)
    null = torch.zeros(case.num_text_tokens, case.text_width, dtype=torch.bfloat16, device=device)
    student = Consistency(process=process, inputs=inputs, null_text=null, guidance_range=(5.5, 5.5), huber_c=0.001)
    if settings.objective == "consistency":
        return student
    matching = settings.matching
    return DistributionMatching(
        student=student,
        schedules=matching.times,
        compared=(matching.compared_from, matching.compared_to),
        consistency_weight=matching.consistency_weight,
    )


def open_networks(case: Case, settings: StageTraining, roles: Mapping[str, Role]) -> dict[str, DiT | PixArt]:
    """As a stage opens them that starts from its teacher."""
    torch.manual_seed(0)
    network, own = case.config.network(), None
    if settings.objective != "denoise":
        own = copy.deepcopy(network)
    trainable_of(settings).prepare(network, seed=0, dtype=compute_dtype(settings), key="training.trains")
    if own is None:
        return {"network": network}
    teacher = own.requires_grad_(False)
    shared = SharedWeights(network, is_partitioned=settings.zero_stage == 3)
    networks = {"network": network, "teacher": shared.within(teacher)}
    if "target" in roles:
        networks["target"] = shared.average_of(network)
    if settings.objective == "distribution_matching":
        add_critic(network, teacher)
    return networks


def count(case: Case, settings: StageTraining) -> dict[str, int]:
    """Return the most bytes that live at a time from before the networks are there: at the start, and in steps."""
    size = settings.global_batch_size // dist.get_world_size() // settings.num_micro_batches
    objective, meter = objective_of(case, settings, CPU), HostBytes()
    counted = {}
    with meter.watching(ignored=[]):
        others = open_networks(case, settings, objective.networks)
        model = ZeroModel(others.pop("network"), settings)
        counted["start"] = meter.peak_bytes
        for network in others.values():
            network.to(dtype=model.dtype)
        networks = Networks(objective.networks, model=model, averages=Averages(model), others=others)
        for _ in range(2):  # the first makes the state of the optimizer, and the second takes all there is
            update_meter = UpdateMeter(model)
            for i in range(settings.num_micro_batches):
                # As the reader gives them: what was read ahead lies ready.
                batch = blank_batch(case.sample, size, device=CPU)
                losses = objective.loss(networks, batch)
                model.backward(losses.minimised.mean(), is_last=i + 1 == settings.num_micro_batches)
                del losses, batch
            networks.update(1e-4, step=0, is_ruined=torch.tensor(False))
            update_meter.norms()
        counted["whole"] = meter.peak_bytes
    return counted


def reckon(case: Case, settings: StageTraining) -> dict[str, Any]:
    """Return what a start would say of the same."""
    roles = objective_of(case, settings, CPU).networks
    networks = blank_copies(open_networks(case, settings, roles))
    step = Step(
        settings=settings,
        objective=lambda device: objective_of(case, settings, device),
        networks=networks,
        sample=case.sample,
        dtype=compute_dtype(settings),
    )
    demand = Demand(
        settings=settings,
        weights=count_weights(roles, networks),
        num_ranks=dist.get_world_size(),
        sample_tokens=(case.side // 2) ** 2,
        step_bytes=lambda size, kept, gradients: step.reckon(size, kept, gradients=gradients),
        batch_bytes=step.batch_bytes,
        is_host=True,
    )
    parts = demand.parts(settings.num_micro_batches, settings.kept_activations)
    stays = rank_parts(settings, demand.weights, num_ranks=demand.num_ranks, num_micro_batches=1)
    opening = demand.opening(stays["weights"])
    return {"reckoned": sum(parts.values()), "reckoned_start": sum(opening.values()), "parts": parts}


if __name__ == "__main__":
    initialize_ranks()
    file, *cases = sys.argv[1:]
    results = []
    measure.PIECE_SIZE = adamw.PIECE_SIZE = adamw8bit.PIECE_SIZE = reckoning.PIECE_SIZE = PIECE_SIZE
    for text in cases:
        case = Case(**json.loads(text))
        settings = StageTraining(network="pixart", **case.settings)
        gc.collect()
        results.append(reckon(case, settings) | count(case, settings))
        dist.barrier()
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(results))
    dist.destroy_process_group()
