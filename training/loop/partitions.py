"""Where each ZeRO stage keeps gradients and masters on this rank, and the optimizer's step over them.

DeepSpeed's own steps ask the host between norm, clipping and AdamW, and pass over the gradients ten times. Here the
host is asked for nothing, and a step is: norms, one copy to fp32, AdamW (which divides by the clip and is held back by
`found_inf`), one copy to the weights.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from training.loop.host import in_host_memory
from training.loop.layout import Layout, clear_gaps, flat_layout, shared_layout, whole_layout


class Partitions(Protocol):
    """What a rank updates."""

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 weights that this rank updates."""
        ...

    def layouts(self) -> list[Layout]:
        """Return where weights lie in the masters, as these are stepped together."""
        ...

    def add_micro_batch(self) -> None:
        """Take note that a backward pass of the step has ended."""
        ...

    def gradients(self) -> list[list[Tensor]]:
        """Return the step's mean gradient of what this rank updates, shared by the ranks, by the optimizer's groups."""
        ...

    def step(self, gradients: list[list[Tensor]]) -> None:
        """Step AdamW, set the weights that the network computes with to the masters, and forget the gradient."""
        ...


class PlainWeights:
    """ZeRO 0 in fp32: the weights are their own masters."""

    def __init__(self, adamw: Optimizer) -> None:
        self._adamw = adamw
        self._groups: list[list[nn.Parameter]] = [group["params"] for group in adamw.param_groups]

    @property
    def masters(self) -> list[Tensor]:
        """The weights themselves."""
        return [weight.data for group in self._groups for weight in group]

    def layouts(self) -> list[Layout]:
        """Return that all is whole."""
        weights = list(chain.from_iterable(self._groups))
        return [whole_layout(weights, weights)]

    def add_micro_batch(self) -> None:
        """Do nothing: autograd and DeepSpeed add."""

    def gradients(self) -> list[list[Tensor]]:
        """Return the gradient of each weight, zero where there is none."""
        gradients = [[_gradient(weight) for weight in group] for group in self._groups]
        for group, pieces in zip(self._groups, gradients, strict=True):
            for weight, piece in zip(group, pieces, strict=True):
                weight.grad = piece
        return gradients

    def step(self, gradients: list[list[Tensor]]) -> None:
        """Step AdamW."""
        self._adamw.step()
        self._adamw.zero_grad()


class WholeMasters:
    """ZeRO 0 in bf16: each rank keeps a master of each weight."""

    def __init__(self, engine: Any, adamw: Optimizer) -> None:
        self._adamw = adamw
        self._groups: list[list[nn.Parameter]] = engine.optimizer.fp16_groups
        self._weights = list(chain.from_iterable(self._groups))
        self._masters: list[Tensor] = list(chain.from_iterable(engine.optimizer.fp32_groups))

    @property
    def masters(self) -> list[Tensor]:
        """One for each weight."""
        return self._masters

    def layouts(self) -> list[Layout]:
        """Return that all is whole."""
        return [whole_layout(self._weights, self._masters)]

    def add_micro_batch(self) -> None:
        """Do nothing: autograd and DeepSpeed add."""

    def gradients(self) -> list[list[Tensor]]:
        """Return the gradient of each weight, zero where there is none."""
        return [[_gradient(weight) for weight in group] for group in self._groups]

    def step(self, gradients: list[list[Tensor]]) -> None:
        """Step AdamW."""
        for master, gradient in zip(self._masters, chain.from_iterable(gradients), strict=True):
            master.grad = gradient.to(master.dtype)
        for weight in self._weights:
            weight.grad = None
        self._adamw.step()
        for master in self._masters:
            master.grad = None
        torch.ops.aten._foreach_copy_.default([weight.data for weight in self._weights], self._masters)


class HostMasters:
    """ZeRO 0 in bf16, one rank: masters lie in the machine's memory, and gradients go there as they come.

    They are summed there in fp32, where there are several micro-batches.
    """

    def __init__(self, engine: Any, optimizer: Optimizer) -> None:
        engine.enable_backward_allreduce = False
        self._optimizer = optimizer
        self._weights: list[nn.Parameter] = list(chain.from_iterable(engine.optimizer.fp16_groups))
        self._masters: list[Tensor] = list(chain.from_iterable(engine.optimizer.fp32_groups))
        self._sizes = [len(group) for group in engine.optimizer.fp16_groups]
        for master in self._masters:
            master.data = in_host_memory(master.data)
        self._sums: dict[int, Tensor] = {}
        for position, weight in enumerate(self._weights):
            weight.register_post_accumulate_grad_hook(partial(self._take, position))

    @property
    def masters(self) -> list[Tensor]:
        """One for each weight."""
        return self._masters

    def layouts(self) -> list[Layout]:
        """Return that all is whole."""
        return [whole_layout(self._weights, self._masters)]

    def _take(self, position: int, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient, former = weight.grad.to("cpu"), self._sums.get(position)
        self._sums[position] = gradient if former is None else former.float().add_(gradient)
        weight.grad = None

    def add_micro_batch(self) -> None:
        """Do nothing: gradients have been taken."""

    def gradients(self) -> list[list[Tensor]]:
        """Return the gradient of each weight, zero where there is none."""
        masters = enumerate(self._masters)
        gradients = (self._sums[i] if i in self._sums else torch.zeros_like(master) for i, master in masters)
        return [list(islice(gradients, size)) for size in self._sizes]

    def step(self, gradients: list[list[Tensor]]) -> None:
        """Step the optimizer on the CPU."""
        for master, gradient in zip(self._masters, chain.from_iterable(gradients), strict=True):
            master.grad = gradient.to(master.dtype)
        self._sums.clear()
        gradients.clear()
        self._optimizer.step()
        for weight, master in zip(self._weights, self._masters, strict=True):
            master.grad = None
            weight.data.copy_(master)


class FlatPartitions:
    """ZeRO 1 and 2: a rank updates one stretch of all weights laid end to end."""

    def __init__(self, engine: Any, adamw: Optimizer) -> None:
        self._optimizer = engine.optimizer
        self._adamw = adamw

    @property
    def masters(self) -> list[Tensor]:
        """This rank's stretch of each group of weights."""
        return list(self._optimizer.single_partition_of_fp32_groups)

    def layouts(self) -> list[Layout]:
        """Return that of each group."""
        deepspeed = self._optimizer
        return [
            flat_layout(
                deepspeed.round_robin_bit16_groups[i],
                [meta.shape for meta in deepspeed.round_robin_bit16_meta[i]],
                begins=deepspeed.round_robin_bit16_offsets[i],
                master=master,
                rank=dist.get_rank(),
                num_ranks=dist.get_world_size(),
            )
            for i, master in enumerate(self.masters)
        ]

    def add_micro_batch(self) -> None:
        """Do nothing: DeepSpeed adds."""

    def gradients(self) -> list[list[Tensor]]:
        """Return the pieces of the gradient of this rank's stretches, in order."""
        return [list(self._optimizer.averaged_gradients[i]) for i in range(len(self.masters))]

    def _flat_gradient(self, group: int) -> Tensor:
        """Give this rank's gradient of a group in fp32, and keep it nowhere else."""
        pieces = self._optimizer.averaged_gradients[group]
        self._optimizer.averaged_gradients[group] = self._optimizer.all_grad_tensors[group] = None
        flat = getattr(pieces, "flat_partition", None)  # where DeepSpeed has summed micro-batches in fp32
        return _flatten(pieces, self.masters[group]) if flat is None else flat

    def step(self, gradients: list[list[Tensor]]) -> None:
        """Step AdamW."""
        gradients.clear()
        for i, master in enumerate(self.masters):
            master.grad = self._flat_gradient(i)
        self._optimizer.zero_grad(set_to_none=True)
        self._adamw.step()
        for master in self.masters:
            master.grad = None
        self._optimizer.update_lp_params()


class LonePartitions(FlatPartitions):
    """ZeRO 1 and 2 on one rank, which shares nothing: hooks of DeepSpeed would copy each gradient four times for it."""

    def __init__(self, engine: Any, adamw: Optimizer, *, sums_in_fp32: bool) -> None:
        super().__init__(engine, adamw)
        for hook in self._optimizer._grad_acc_hooks:
            hook.remove()
        engine.enable_backward_allreduce = False
        self._sums_in_fp32 = sums_in_fp32
        self._sums: list[Tensor] = []

    def _pieces(self, group: int) -> list[Tensor]:
        return [_gradient(weight) for weight in self._optimizer.round_robin_bit16_groups[group]]

    def add_micro_batch(self) -> None:
        """Add to the sums in fp32, where there are several micro-batches; else autograd's gradient is the step's."""
        if not self._sums_in_fp32:
            return
        if self._sums:
            for i, flat in enumerate(self._sums):
                pieces = self._pieces(i)
                torch.ops.aten._foreach_add_.List(_views(flat, pieces), pieces)
        else:
            self._sums = [_flatten(self._pieces(i), master) for i, master in enumerate(self.masters)]
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[list[Tensor]]:
        """Return the gradients of all weights, in order, or of whole groups."""
        return [[flat] for flat in self._sums] or [self._pieces(i) for i in range(len(self.masters))]

    def _flat_gradient(self, group: int) -> Tensor:
        return self._sums.pop(0) if self._sums else _flatten(self._pieces(group), self.masters[group])


class ScatteredShares:
    """ZeRO 3: a rank updates its share of each weight; DeepSpeed steps over groups of them."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        for layout in self.layouts():
            clear_gaps(layout)

    @property
    def masters(self) -> list[Tensor]:
        """This rank's shares, laid end to end by group."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def layouts(self) -> list[Layout]:
        """Return that of each of DeepSpeed's groups."""
        return [
            shared_layout(
                weights,
                [weight.ds_shape for weight in weights],
                master=master,
                rank=dist.get_rank(),
                num_ranks=dist.get_world_size(),
            )
            for weights, master in zip(self._optimizer.fp16_groups, self.masters, strict=True)
        ]

    def add_micro_batch(self) -> None:
        """Do nothing: autograd and DeepSpeed add."""

    def gradients(self) -> list[list[Tensor]]:
        """Return the gradients of this rank's shares, which DeepSpeed divides below the optimizer's groups."""
        gradients: list[list[Tensor]] = [[] for _ in self._optimizer.optimizer.param_groups]
        for i in range(len(self.masters)):
            gradients[self._optimizer.sub_group_to_group_id[i]].extend(self._optimizer.averaged_gradients[i])
        return gradients

    def step(self, gradients: list[list[Tensor]]) -> None:
        """Step AdamW, group by group, as DeepSpeed does once it has found a gradient sound."""
        optimizer = self._optimizer
        gradients.clear()
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer.zero_grad(set_to_none=True)
        timers: set[str] = set()
        for i in range(len(self.masters)):
            optimizer._prepare_sub_group(i, timers)
            optimizer._optimizer_step(i)
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
            optimizer._release_sub_group(i, timers)
        optimizer._post_step(timers)


def find_partitions(
    engine: Any, adamw: Optimizer, *, zero_stage: int, sums_in_fp32: bool, is_on_host: bool
) -> Partitions:
    """Return what this rank updates under DeepSpeed's engine, whose optimizer is `adamw`."""
    if is_on_host:
        return HostMasters(engine, adamw)
    is_alone = dist.get_world_size() == 1
    if zero_stage == 3:
        return ScatteredShares(engine)
    if zero_stage > 0:
        return LonePartitions(engine, adamw, sums_in_fp32=sums_in_fp32) if is_alone else FlatPartitions(engine, adamw)
    # It would copy all gradients to share them with nobody.
    engine.enable_backward_allreduce = not is_alone
    return PlainWeights(adamw) if engine.optimizer is adamw else WholeMasters(engine, adamw)


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _flatten(pieces: Sequence[Tensor], master: Tensor) -> Tensor:
    """Return pieces of a gradient end to end in the master's precision, zero behind them."""
    flat = torch.empty_like(master.detach())
    flat[sum(piece.numel() for piece in pieces) :].zero_()
    torch.ops.aten._foreach_copy_.default(_views(flat, pieces), list(pieces))
    return flat


def _views(flat: Tensor, pieces: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of `flat` that pieces laid end to end have, in their shapes."""
    sizes = [piece.numel() for piece in pieces]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view_as(piece) for part, piece in zip(parts, pieces, strict=True)]
