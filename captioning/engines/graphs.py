"""A step of decoding launched as one CUDA graph for each number of rows, instead of some hundred kernels."""

from collections.abc import Callable, Hashable

import torch


def padded_rows(num_rows: int, *, num_slots: int) -> int:
    """Return how many rows a step carries for `num_rows` in use: few numbers, so that few graphs are captured.

    What is beyond those in use reads no keys and shares the weights' way through memory: it costs next to nothing.
    """
    padded = 1 << max(2, (num_rows - 1).bit_length()) if num_rows <= 32 else -(-num_rows // 32) * 32
    return min(padded, num_slots)


class StepGraphs:
    """Runs a step whose inputs and outputs stay where they are; captured after its first run with a key."""

    def __init__(self, step: Callable[[int], None]) -> None:
        """Take the step, a function of the number of rows that neither allocates what it leaves nor reads the host."""
        self._step = step
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, num_rows: int, *, setting: Hashable) -> None:
        """Run the step; `setting` is what else of it is fixed at its capture."""
        key = (num_rows, setting)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        # It also loads and compiles the kernels, which must not happen in a capture.
        self._step(num_rows)
        graph = torch.cuda.CUDAGraph()
        # Other threads decode images and pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(num_rows)
        self._graphs[key] = graph

    def forget(self) -> None:
        """Drop all graphs, once the last of them has run: tensors they know are no more."""
        torch.cuda.synchronize()
        self._graphs.clear()
