"""Passes of a network captured in CUDA graphs: a pass is one launch, whatever the number of kernels in it.

A graph reads and writes memory that stays where it is. So latents, times and what images are conditioned on are copied
to where they were when it was captured, and what it gives is copied away before the next pass. Without CUDA the same is
done with the network itself in the place of graphs.
"""

# B images, C latent channels, h x w latent size

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pixart.drawing.guidance import GuidedNetwork
from pixart.drawing.passes import Pass

# Batches of so many shapes keep their graphs; each holds the memory that a pass takes.
MAX_SHAPES = 4
# Places of latents (B * h * w) of the largest passes that are captured: two images of 512px. Launches of longer ones
# are hidden behind kernels, and one of 1024px took 37 ms captured and 32 as it is (H200, docs/BENCHMARKS.md).
MAX_PLACES = 2**13
# Before the capture, for what is compiled, tuned or loaded when it is first asked for.
NUM_WARM_UPS = 2


def pays_to_capture(num_images: int, height: int, width: int) -> bool:
    """Whether passes of so many latents [height, width] are short enough for their launches to count."""
    return num_images * height * width <= MAX_PLACES


class PassGraphs:
    """The captured passes of one model, by the shapes of a batch.

    Attributes:
        failure: why passes are not captured, where that has failed: they are computed as they would be without this.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self._captured: OrderedDict[Any, _CapturedPasses] = OrderedDict()

    def capture(self, network: GuidedNetwork, noise: Tensor) -> Callable[[Tensor, Tensor, int], Tensor]:
        """Return what gives the passes of `network` for latents like `noise` [B, C, h, w].

        It is good until this is called again: batches of one shape share their memory. Long passes are not captured.
        """
        num_images, _, height, width = noise.shape
        if self.failure is not None or not pays_to_capture(num_images, height, width):
            return network
        key = (noise.shape, noise.dtype, tuple(network.passes), network.scale, _shapes(network.conditions))
        if key in self._captured:
            self._captured.move_to_end(key)
            self._captured[key].take(network)
        else:
            self._captured[key] = _CapturedPasses(network, noise, on_failure=self._fail)
            if len(self._captured) > MAX_SHAPES:
                self._captured.popitem(last=False)
        return self._captured[key]

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._captured.clear()


class _CapturedPasses:
    """The passes of batches of one shape; the first network of that shape lends its memory."""

    def __init__(self, network: GuidedNetwork, noise: Tensor, *, on_failure: Callable[[str], None]) -> None:
        self._network = network
        self._latents = torch.empty_like(noise)
        self._time: Tensor | None = None
        self._passes: dict[Pass, Callable[[], Tensor]] = {}
        self._on_failure = on_failure
        # One for all passes: only one runs at a time, and what it gives is copied away before the next.
        self._pool = torch.cuda.graph_pool_handle() if noise.is_cuda else None

    @torch.inference_mode()
    def take(self, network: GuidedNetwork) -> None:
        """Condition on what another network of the same shapes is conditioned on."""
        for kept, new in zip(_tensors(self._network.conditions), _tensors(network.conditions), strict=True):
            kept.copy_(new)

    def __call__(self, latents: Tensor, timestep: Tensor, number: int) -> Tensor:
        """Give what the network gives, see `GuidedNetwork`."""
        if self._time is None:
            self._time = torch.empty_like(timestep)
        self._latents.copy_(latents)
        self._time.copy_(timestep)
        item = self._network.passes[number]
        if item not in self._passes:
            self._passes[item] = self._capture(number)
        return self._passes[item]().clone()

    def _capture(self, number: int) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            assert self._time is not None
            return self._network(self._latents, self._time, number)

        if not self._latents.is_cuda:
            return compute
        try:
            return _capture_in_graph(compute, self._latents.device, pool=self._pool)
        except RuntimeError as error:  # what cannot be captured, or finds no memory for it, is computed all the same
            # The end of a capture fails after what ended it early.
            self._on_failure(str(error.__context__ or error).splitlines()[0])
            return compute


def _capture_in_graph(compute: Callable[[], Tensor], device: torch.device, *, pool: Any) -> Callable[[], Tensor]:
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(NUM_WARM_UPS):
            compute()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads write files meanwhile, and what they ask of CUDA is none of this. Of a capture that fails torch's
    # graph leaves its stream the current one.
    with torch.cuda.stream(current), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = compute()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts, in their order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors([tree[key] for key in sorted(tree)])
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _tensors(part)


def _shapes(tree: Any) -> Any:
    """Return what has to be the same to share memory: shapes and types of tensors, and all that is no tensor."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype
    if isinstance(tree, dict):
        return tuple((key, _shapes(tree[key])) for key in sorted(tree))
    if isinstance(tree, tuple | list):
        return tuple(_shapes(part) for part in tree)
    return tree
