"""Batches on their way to the device: the reader's buffers are not filled again while they are copied from."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from training.config import StageTraining
from training.data.batch import Batch, PackedBatch
from training.data.transfer import Transfers
from training.loop import loop
from training.loop.clock import Clock
from training.objectives.objective import Losses

NUM_STEPS, NUM_MICRO_BATCHES = 3, 2
CPU = torch.device("cpu")


class LateCopies:
    """A lane whose copies are made at the last moment that is allowed; what was copied then is `copied`."""

    def __init__(self) -> None:
        self._queued: list[tuple[Tensor, Tensor]] = []

    def copying(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def hand_over(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            source = tensor.detach()  # of the same memory
            tensor.set_(torch.full_like(source, -1))
            self._queued.append((tensor, source))

    def finish(self) -> None:
        for tensor, source in self._queued:
            tensor.copy_(source)
        self._queued.clear()


def poisoned(batches: list[PackedBatch]) -> Iterator[PackedBatch]:
    """Give batches as a reader does that fills their memory again as soon as it is asked for the next."""
    for packed in batches:
        buffers = [packed.mean.detach(), packed.noise.detach(), packed.timestep_draws.detach()]
        yield packed
        for buffer in buffers:
            buffer.fill_(99)


def packed_batch(number: int) -> PackedBatch:
    return PackedBatch(
        step=0,
        bucket="16x16",
        keys=["a", "b"],
        shards=["s", "s"],
        mean=torch.full((2, 4, 2, 2), number, dtype=torch.float16),
        std=None,
        posterior_noise=None,
        noise=torch.full((2, 4, 2, 2), float(number)),
        timestep_draws=torch.full((2,), number, dtype=torch.float64),
        is_dropped=torch.zeros(2, dtype=torch.bool),
        is_prior=torch.zeros(2, dtype=torch.bool),
        size=torch.zeros(2, 3),
        text=None,
        labels=torch.tensor([1, 2]),
    )


def test_buffers_are_read_before_they_are_filled_again() -> None:
    seen: list[Batch] = []

    def loss(networks: Any, batch: Batch) -> Any:
        seen.append(batch)
        return Losses(total=torch.ones(2), times=torch.zeros(2), parts={})

    transfers = Transfers(CPU, lane=LateCopies())
    session: Any = SimpleNamespace(
        networks=SimpleNamespace(model=SimpleNamespace(backward=lambda loss, is_last: None)),
        progress=SimpleNamespace(clock=Clock()),
        job=SimpleNamespace(
            settings=StageTraining(network="pixart", gradient_accumulation_steps=NUM_MICRO_BATCHES),
        ),
        flops=SimpleNamespace(of_batch=lambda packed: 0),
        objective=SimpleNamespace(loss=loss),
        batches=poisoned([packed_batch(number) for number in range(NUM_STEPS * NUM_MICRO_BATCHES)]),
        transfers=transfers,
    )
    for _ in range(NUM_STEPS):
        loop._forward_backward(session)
    transfers.finish()
    for number, batch in enumerate(seen):
        for tensor in (batch.mean, batch.noise, batch.timestep_draws):
            assert torch.equal(tensor, torch.full_like(tensor, number))
    assert len(seen) == NUM_STEPS * NUM_MICRO_BATCHES


def test_all_tensors_of_a_batch_are_handed_over() -> None:
    batch = packed_batch(1).to(CPU)
    names = ("mean", "noise", "timestep_draws", "is_dropped", "is_prior", "size", "labels")
    named = [getattr(batch, name) for name in names]
    assert {id(tensor) for tensor in batch.device_tensors()} == {id(tensor) for tensor in named}


def test_a_gpu_gets_what_the_buffers_held() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    transfers, device = Transfers(torch.device("cuda")), torch.device("cuda")
    for number in range(50):
        packed = packed_batch(number)
        packed = PackedBatch(**(vars(packed) | {"noise": torch.full((1 << 22,), float(number)).pin_memory()}))
        batch = transfers.bring(packed)
        torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
        is_same = (batch.noise == number).all()
        transfers.finish()
        packed.noise.fill_(99)
        assert is_same
