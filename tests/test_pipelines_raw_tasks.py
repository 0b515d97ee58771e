"""Many small reads: in order whether in threads or not, and in threads from where something is waited for."""

import resource
import threading
import time

import pytest

from pipelines.raw.tasks import NUM_AHEAD, cut_into_tasks, map_ahead, map_tasks


@pytest.mark.parametrize("first_slow", [0, 3, None])
def test_tasks_go_to_threads_behind_the_first_one_that_waits(first_slow: int | None) -> None:
    places: list[bool] = []

    def work(task) -> list[int]:
        places.append(threading.current_thread() is threading.main_thread())
        if first_slow is not None and task[0] >= first_slow:
            for _ in task:
                time.sleep(0.001)
        return [10 * item for item in task]

    tasks = cut_into_tasks(range(9), 1)
    assert [item for found in map_tasks(work, tasks) for item in found] == [10 * item for item in range(9)]
    num_here = 9 if first_slow is None else first_slow + 1
    assert sorted(places, reverse=True) == [True] * num_here + [False] * (9 - num_here)


def test_where_the_system_does_not_count_waits_there_are_threads(monkeypatch) -> None:
    monkeypatch.delattr(resource, "RUSAGE_THREAD")
    places = list(map_tasks(lambda task: threading.current_thread() is threading.main_thread(), [[1], [2], [3]]))
    assert places == [True, False, False]
    assert list(map_tasks(sum, [])) == []


def test_what_is_read_ahead_comes_in_order_and_bounded() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.01 if item % 7 == 0 else 0)
        return 10 * item

    found = map_ahead(work, range(10 * NUM_AHEAD))
    assert next(found) == 0 and max(started) <= NUM_AHEAD
    assert list(found) == [10 * item for item in range(1, 10 * NUM_AHEAD)]
    assert list(map_ahead(work, [])) == []


def test_a_fault_ahead_is_raised_in_its_turn_and_ends_the_rest() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == 5:
            raise ValueError("five")
        return item

    seen: list[int] = []
    with pytest.raises(ValueError, match="five"):
        for item in map_ahead(work, range(10 * NUM_AHEAD)):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4] and len(started) < 3 * NUM_AHEAD
