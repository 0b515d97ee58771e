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

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[int], None], num_rows: int, *, setting: Hashable) -> None:
        """Run `step`, a function of the number of rows that neither allocates what it leaves nor reads the host.

        It is the same in every call, and not kept: whoever has it has these graphs, and a cycle would hold the memory
        of both until Python looks for cycles. `setting` is what else of it is fixed at its capture.
        """
        key = (num_rows, setting)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        # It also loads and compiles the kernels, which must not happen in a capture.
        step(num_rows)
        graph = torch.cuda.CUDAGraph()
        # Other threads decode images and pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step(num_rows)
        self._graphs[key] = graph

    def forget(self) -> None:
        """Drop all graphs, once the last of them has run: tensors they know are no more."""
        torch.cuda.synchronize()
        self._graphs.clear()
        # torch takes no pool again that has lost all its graphs, and cuBLAS's workspace may keep the former one there.
        self._pool = torch.cuda.graph_pool_handle()
