"""The model under DeepSpeed: one way to update it and to get at its fp32 master weights, whatever ZeRO shards."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UserError
from pipelines.as_typed import typed_flag
from pixart.compilation import compile_blocks
from training.config import StageTraining
from training.launch.placement import is_slurm_task
from training.loop.compilation import is_compiled
from training.loop.memory import keep_activations
from training.loop.optimizers.choice import choose_rule
from training.loop.optimizers.rule import RATE_FACTOR, networks_of
from training.loop.partitions import find_partitions
from training.loop.products import choose_products
from training.loop.sizes import MAX_EXCHANGED, TAKEN_AT_ONCE
from training.stages.trainable import trainable_of

# Needed at save time so that `deepspeed.checkpoint.ds_to_universal` can convert the state for another world size.
UNIVERSAL_CHECKPOINT_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Update:
    """What an optimizer step did, as scalars on the device, which the host has not seen.

    Attributes:
        gradient_norm: of the whole gradient before clipping, float64.
        is_skipped: whether that was not finite, or the step was ruined otherwise; then nothing was changed.
    """

    gradient_norm: Tensor
    is_skipped: Tensor


def deepspeed_config(
    settings: StageTraining, num_ranks: int, *, num_trained: int, loads_universal: bool = False
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a stage of which so many weights train.

    `loads_universal` is for state of another number of ranks.
    """
    num_micro_batches = settings.num_micro_batches
    return {
        "train_batch_size": settings.global_batch_size,
        "train_micro_batch_size_per_gpu": settings.global_batch_size // (num_ranks * num_micro_batches),
        "gradient_accumulation_steps": num_micro_batches,
        # Else ZeRO 3 replaces torch's linear function for the whole process by one that writes into what selective
        # checkpointing has kept: wrong gradients, without a word.
        "zero_optimization": {
            "stage": settings.zero_stage,
            "memory_efficient_linear": False,
            # It takes that much, however few weights there are.
            "reduce_bucket_size": min(num_trained, MAX_EXCHANGED),
        },
        "checkpoint": {"load_universal": loads_universal},
        "bf16": {"enabled": settings.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32" if _sums_in_fp32(settings) else None},
        # Clipping is part of our own step; DeepSpeed's default is to clip at 1.
        "gradient_clipping": 0.0,
        # Its clock of samples per second waits for the device at each forward pass.
        "timers": {"throughput": {"enabled": False}},
    }


def _sums_in_fp32(settings: StageTraining) -> bool:
    """Whether micro-batches are summed in fp32; DeepSpeed cannot below ZeRO 2, see docs/TRAINING.md for the cost."""
    return settings.zero_stage >= 2 and settings.num_micro_batches > 1


def compute_dtype(settings: StageTraining) -> torch.dtype:
    """Return the precision that networks compute in."""
    return torch.bfloat16 if settings.dtype == "bf16" else torch.float32


class ZeroModel:
    """A model, its optimizer and DeepSpeed's engine around both; weights that ask for no gradient stay as they are.

    `masters` are the fp32 weights this rank updates: all that train without sharding, else its share, flattened.
    `frozen` are those that do not train, whole, fp32 on the CPU, by name; only rank 0 keeps them, for checkpoints that
    hold them.
    """

    def __init__(self, model: nn.Module, settings: StageTraining, *, loads_universal: bool = False) -> None:
        deepspeed = _import_deepspeed()
        self.settings = settings
        choose_products(model, settings, device=rank_device())
        keep_activations(model, settings.kept_activations)
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        starting_weights = {name: weight.detach() for name, weight in self._trained.items()}
        others = {name: weight for name, weight in model.named_parameters() if name not in self._trained}
        is_writer = dist.get_rank() == 0 and trainable_of(settings).keeps_frozen
        self.frozen = {name: weight.detach().to("cpu", copy=True) for name, weight in others.items() if is_writer}
        self.rule = choose_rule(settings)
        optimizer = self.rule.make(self._trained, settings)
        num_trained = sum(weight.numel() for weight in self._trained.values())
        config = deepspeed_config(
            settings, dist.get_world_size(), num_trained=num_trained, loads_universal=loads_universal
        )
        with _unmoved(optimizer):
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._partitions = find_partitions(
            self.engine,
            self.optimizer,
            zero_stage=settings.zero_stage,
            sums_in_fp32=_sums_in_fp32(settings),
            is_on_host=settings.offload == "optimizer",
        )
        self.masters = self._partitions.masters
        self.rule.place(self.optimizer, self._partitions.layouts(), device=self.device)
        if settings.dtype == "bf16":
            # DeepSpeed makes the masters of weights it has rounded.
            self.scatter_masters(starting_weights)
        if is_compiled(settings):
            compile_blocks(model)

    @property
    def dtype(self) -> torch.dtype:
        """Compute precision."""
        return compute_dtype(self.settings)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.engine.device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that steps `masters`, inside DeepSpeed's own where that has one."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def first_moments(self) -> Iterator[Tensor]:
        """Yield the optimizer's averages of gradients, shaped as `masters`; zeros before the first step."""
        weights = self._trained.values() if self.engine.optimizer is self.optimizer else self.masters
        return (self.rule.first_moment(self.optimizer, weight) for weight in weights)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has only its share of `masters`."""
        return self.settings.zero_stage > 0

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a micro-batch's mean loss to the step's mean; after the last one ranks share it."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss)
        self._partitions.add_micro_batch()

    @torch.no_grad()
    def update(self, learning_rate: float, *, is_ruined: Tensor) -> Update:
        """Clip the gradient, step the optimizer, forget the gradient; all without asking the host.

        A network and its critic are each clipped by the norm of their own gradient, as they know nothing of each other.
        A gradient that is not finite changes nothing, nor does any where `is_ruined`, a scalar on the device that is
        the same on all ranks, says so: neither masters and moments nor the weights the network computes with.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE_FACTOR, 1.0)
        gradients = self._partitions.gradients()
        networks = networks_of(self.optimizer.param_groups)
        norms = self._norms(gradients, networks).to(self.device)
        norm = norms.square().sum().sqrt()
        is_skipped = norm.isfinite().logical_not() | is_ruined
        clip, *others = ((norms + 1e-6) / self.settings.gradient_clip).clamp(min=1.0)
        for group, network in zip(gradients, networks, strict=True):
            if network:
                torch.ops.aten._foreach_mul_.Tensor(group, (clip / others[network - 1]).to(group[0]))
        # What torch's GradScaler gives a fused optimizer: it divides by the one and does nothing where the other is 1.
        place = self.masters[0].device
        vars(self.optimizer).update(grad_scale=clip.float().to(place), found_inf=is_skipped.float().to(place))
        self._partitions.step(gradients)
        self.engine.global_steps += 1
        return Update(norm, is_skipped)

    def _norms(self, gradients: list[list[Tensor]], networks: list[int]) -> Tensor:
        """Return the norm of each network over all ranks, float64 on the device, from groups of `networks`."""
        pairs = list(zip(gradients, networks, strict=True))
        pieces = [[each for group, of in pairs if of == network for each in group] for network in sorted(set(networks))]
        squares = torch.stack([_square(each) for each in pieces])
        if self.is_sharded:
            dist.all_reduce(squares)
        return squares.sqrt()

    def gather_masters(self) -> dict[str, Tensor]:
        """Return the whole fp32 weights that train, on the CPU; all ranks must call it, and only rank 0 gets them."""
        is_writer = dist.get_rank() == 0
        weights: dict[str, Tensor] = {}
        for name, weight in self.whole_masters():
            if is_writer:
                weights[name] = weight.detach().to("cpu", copy=True)
        return weights

    def whole_masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole fp32 weights that train, with their names, on every rank; all ranks must iterate."""
        from deepspeed.utils import safe_get_full_fp32_param

        for position, (name, parameter) in enumerate(self._trained.items()):
            weight = safe_get_full_fp32_param(parameter) if self.is_sharded else self.masters[position]
            assert weight is not None, f"DeepSpeed keeps no fp32 master of {name}"
            yield name, weight

    @contextlib.contextmanager
    def whole_frozen(self) -> Iterator[dict[str, Tensor]]:
        """Give the weights that do not train as the network computes with them, whole and on the device, by name.

        They are the network's own, to be read alone; all ranks must call it.
        """
        from deepspeed import zero

        others = {name: weight for name, weight in self.engine.module.named_parameters() if name not in self._trained}
        with zero.GatheredParameters(list(others.values()), enabled=self.settings.zero_stage == 3):
            yield {name: weight.detach() for name, weight in others.items()}

    @torch.no_grad()
    def scatter_masters(self, weights: dict[str, Tensor]) -> None:
        """Set the fp32 masters, and not the weights the model computes with, from whole weights by name."""
        for position, (name, parameter) in enumerate(self._trained.items()):
            if self.is_sharded:
                self._scatter(parameter, weights[name].to(self.device))
            else:
                self.masters[position].copy_(weights[name])

    def _scatter(self, parameter: nn.Parameter, weight: Tensor) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.settings.zero_stage < 3:
            safe_set_full_fp32_param(parameter, weight)
            return
        # Setting a full weight under ZeRO 3 fails where the ranks do not divide it: the last share is padded.
        share = safe_get_local_fp32_param(parameter).numel()
        padded = nn.functional.pad(weight.flatten(), (0, share * dist.get_world_size() - weight.numel()))
        safe_set_local_fp32_param(parameter, padded.narrow(0, share * dist.get_rank(), share))

    def save_state(self, folder: Path, tag: str) -> None:
        """Write the state of weights that train and of the optimizer to `folder/tag`; all ranks must call it."""
        self.engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state=dict(UNIVERSAL_CHECKPOINT_INFO),
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        if dist.get_rank() == 0:  # programs that DeepSpeed copies there, and nothing of a state
            for path in folder.glob("zero_to_*.py"):
                path.unlink()

    def load_state(self, folder: Path, tag: str) -> None:
        """Load what `save_state` wrote; a pickle of anything but tensors and DeepSpeed's records raises."""
        # DeepSpeed asks torch for an unrestricted load; the variable is torch's way to overrule that.
        former = os.environ.get(WEIGHTS_ONLY)
        is_whole = len(self._trained) == len(list(self.engine.module.parameters()))
        os.environ[WEIGHTS_ONLY] = "1"
        self.rule.prepare(self.optimizer)
        try:
            with torch.serialization.safe_globals(deepspeed_records()):
                path, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=is_whole)
        finally:
            os.environ[WEIGHTS_ONLY] = former or "0"
        if path is None:
            raise FileNotFoundError(f"{folder / tag} has no state that DeepSpeed finds")
        for master, state in self.optimizer.state.items():
            # Of other ranks, it has given all masters one and the same count of steps, and on the CPU.
            state["step"] = state["step"].to(master.device, copy=True)
        self.rule.prepare(self.optimizer)

    @contextlib.contextmanager
    def masters_as(self, values: list[Tensor]) -> Iterator[None]:
        """Exchange the masters with `values`, shard by shard, and exchange them back at the end.

        In between, what gathers or scatters masters works on `values`: so an average of the masters needs no
        knowledge of how ZeRO lays them out.
        """
        self._exchange(values)
        try:
            yield
        finally:
            self._exchange(values)

    def _exchange(self, values: list[Tensor]) -> None:
        for whole, other in zip(self.masters, values, strict=True):
            pairs = zip(*(each.detach().view(-1).split(TAKEN_AT_ONCE) for each in (whole, other)), strict=True)
            for master, value in pairs:
                kept = master.clone()
                master.copy_(value)
                value.copy_(kept)


def _square(gradients: list[Tensor]) -> Tensor:
    norms = torch.ops.aten._foreach_norm.Scalar(gradients, 2, torch.float32)
    return torch.stack(norms).double().square().sum()


@contextlib.contextmanager
def _unmoved(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, a step does nothing: DeepSpeed takes one without a gradient, which decays weights and makes moments."""
    vars(optimizer)["step"] = lambda: None
    try:
        yield
    finally:
        del vars(optimizer)["step"]


def deepspeed_records() -> list[Any]:
    """Return the classes, beside tensors, that DeepSpeed's state is made of."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, fragment_address]


def initialize_ranks() -> None:
    """Join the process group that the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...) describes: NCCL or gloo."""
    deepspeed = _import_deepspeed()
    device = None
    if has_cuda := torch.cuda.is_available():
        number = local_device(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count(), is_slurm=is_slurm_task())
        os.environ["LOCAL_RANK"] = str(number)
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if has_cuda else "gloo", device_id=device)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"cannot meet the other ranks at {where}: {str(error).splitlines()[0]}") from error
    deepspeed.init_distributed("nccl" if has_cuda else "gloo")


def rank_device() -> torch.device:
    """Return where this rank computes, once it has joined the others."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def local_device(local_rank: int, num_devices: int, *, is_slurm: bool) -> int:
    """Return the GPU of a rank; Slurm may show each task its own GPU alone.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    if local_rank < num_devices:
        return local_rank
    if is_slurm and num_devices == 1:
        return 0
    raise UserError(
        f"rank {local_rank} of this machine has no GPU, there are {num_devices}: lower {typed_flag('gpus')} "
        "(training.num_processes), the slots in training.hostfile, or the tasks per node"
    )


def _import_deepspeed() -> Any:
    """Import DeepSpeed, quiet, and without the shared-memory kernel it would compile for half a minute on a CPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # DeepSpeed's calls of collectives that torch has renamed; on every rank, at its first step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # That kernel serves tensor-parallel inference; gloo and NCCL do what training needs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
