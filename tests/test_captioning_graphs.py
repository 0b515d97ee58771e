"""Which graphs of a step are captured, replayed and forgotten; torch's bookkeeping of memory pools is played."""

import weakref
from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from captioning.engines.graphs import StepGraphs


class Graph:
    """A graph as torch has it: replaying it runs no Python."""

    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


class Pools:
    """A pool may be shared while a graph of it lives; torch asserts that one without is never taken again."""

    def __init__(self) -> None:
        self.num_handles = 0
        self.graphs: dict[int, list[weakref.ref[Any]]] = {}

    def handle(self) -> int:
        self.num_handles += 1
        return self.num_handles

    @contextmanager
    def capture(self, graph: Graph, *, pool: int, capture_error_mode: str) -> Any:
        assert all(graph() is not None for graph in self.graphs.get(pool, [])), "use_count > 0"
        self.graphs.setdefault(pool, []).append(weakref.ref(graph))
        yield


@pytest.fixture
def pools(monkeypatch) -> Pools:
    pools = Pools()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", pools.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", pools.handle)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return pools


def test_a_step_is_captured_once_for_each_key_and_in_a_new_pool_after_forgetting(pools) -> None:
    graphs, runs = StepGraphs(), Counter()

    def step(num_rows: int) -> None:
        runs[num_rows] += 1

    for setting in (1.0, 1.1):
        for num_rows in (8, 4, 8, 8):
            graphs.run(step, num_rows, setting=setting)
    # Each key ran once and was captured once.
    assert runs == {8: 4, 4: 4} and len(pools.graphs) == 1 and len(pools.graphs[1]) == 4
    graphs.forget()
    assert all(graph() is None for graph in pools.graphs[1])
    graphs.run(step, 8, setting=1.0)
    graphs.run(step, 8, setting=1.0)
    assert runs == {8: 6, 4: 4} and sorted(pools.graphs) == [1, 2]


def test_graphs_hold_no_one_who_holds_them(pools) -> None:
    """A decoder of the canary gives its memory back when it is let go, not when Python looks for cycles."""

    class Decoder:
        def __init__(self) -> None:
            self.graphs = StepGraphs()

        def step(self, num_rows: int) -> None:
            pass

    decoder = Decoder()
    decoder.graphs.run(decoder.step, 4, setting=1.0)
    alive = weakref.ref(decoder)
    del decoder
    assert alive() is None
