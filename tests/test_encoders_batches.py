import pytest
import torch

from encoders.batches import Batches
from encoders.text import text_batches
from errors import LoneItemError

# Small enough to be written down, too large for any machine: what an allocator says to it is the real thing.
IMPOSSIBLE_BYTES = 1 << 50


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: its allocator cannot be asked for too much")
    sizes = []

    def encode(items):
        sizes.append(len(items))
        if len(items) > 3:
            torch.empty(IMPOSSIBLE_BYTES, dtype=torch.uint8, device=device)
        return [item * 10 for item in items]

    batches = Batches(8)
    assert list(batches.run(list(range(9)), encode)) == [item * 10 for item in range(9)]
    assert batches.size == 2
    assert sizes == [8, 4, 2, 2, 2, 2, 1]


def test_batches_hold_as_many_texts_as_their_tokens_allow():
    widths = []

    def encode(items):
        widths.append([len(item) for item in items])
        return list(items)

    items = ["x" * length for length in (50, 30, 30, 20, 10, 10, 10, 10, 5)]
    assert list(text_batches(60).run(items, encode)) == items
    assert widths == [[50], [30, 30], [20, 10, 10], [10, 10, 5]]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def encode(items):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(Batches(4).run([1, 2, 3, 4], encode))


def test_one_item_that_does_not_fit_is_an_error():
    def encode(items):
        torch.empty(IMPOSSIBLE_BYTES, dtype=torch.uint8)

    with pytest.raises(LoneItemError, match="DefaultCPUAllocator: can't allocate memory"):
        list(Batches(2).run([1, 2], encode))
