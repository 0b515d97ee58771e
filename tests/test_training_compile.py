"""`training.compile`: blocks compiled once for all, the same numbers, the same names; here on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray_nodes import free_port

from errors import UserError
from training.config import StageTraining
from training.loop.compilation import is_compiled, require_compilable

SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from pixart.model import PixArt, PixArtConfig
from training.config import StageTraining
from training.loop.zero import ZeroModel, initialize_ranks
initialize_ranks()

def losses(is_compiled, kept):
    torch.manual_seed(0)
    network = PixArt(PixArtConfig(num_layers=3, num_heads=2, head_dim=8, caption_channels=8, sample_size=4))
    settings = StageTraining(
        network="pixart", global_batch_size=4, dtype="fp32", zero_stage=2,
        compile=is_compiled, learning_rate=1e-3, keep_activations=kept,
    )
    names = list(network.state_dict())
    model = ZeroModel(network, settings)
    found = []
    for num_tokens, side in ((5, 4), (7, 4), (9, 4), (4, 8), (11, 6), (6, 4)):
        torch.manual_seed(100 * num_tokens + torch.distributed.get_rank())
        mask = torch.ones(2, num_tokens, dtype=torch.bool)
        mask[1, 3:] = False
        output = model.engine(torch.randn(2, 4, side, side), torch.rand(2), torch.randn(2, num_tokens, 8), mask)
        loss = output.square().mean() + (output - 1).square().mean()
        model.backward(loss, is_last=True)
        model.update(1e-3, is_ruined=torch.tensor(False))
        found.append(float(loss))
    assert list(model.engine.module.state_dict()) == names
    return found

results = [losses(False, "all"), losses(True, "products")]
print(json.dumps({"losses": results, "graphs": counters["stats"]["unique_graphs"],
                  "breaks": sum(counters["graph_break"].values())}))
torch.distributed.destroy_process_group()
"""


def test_zero_3_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compilable(StageTraining(network="pixart", compile=True, zero_stage=2))
    with pytest.raises(UserError, match=r"training\.compile = true does not go with training\.zero_stage = 3"):
        require_compilable(StageTraining(network="pixart", compile=True, zero_stage=3))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and neither of \['no-such-compiler', 'clang\+\+'\]"):
        require_compilable(StageTraining(network="pixart", compile=True))


def test_by_default_blocks_are_compiled_on_a_gpu_that_has_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_compiled(StageTraining(network="pixart"))
    assert is_compiled(StageTraining(network="pixart", compile=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [is_compiled(StageTraining(network="pixart", zero_stage=stage)) for stage in (0, 1, 2, 3)] == [
        True,
        True,
        True,
        False,
    ]
    assert not is_compiled(StageTraining(network="pixart", compile=False))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert not is_compiled(StageTraining(network="pixart"))
    require_compilable(StageTraining(network="pixart"))


@pytest.mark.slow
def test_compiled_blocks_give_the_losses_of_eager_ones(tmp_path: Path) -> None:
    port = free_port()
    ranks = [start_rank(rank, port=port, cache=tmp_path) for rank in range(2)]
    for rank in ranks:
        output, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
        result = json.loads(output.splitlines()[-1])
        eager, compiled = result["losses"]
        assert compiled == pytest.approx(eager, rel=1e-4)
        assert result["breaks"] == 0
        # Lengths of the text are free from the second on, sizes of the image from theirs.
        assert 0 < result["graphs"] <= 3


def start_rank(rank: int, *, port: int, cache: Path) -> subprocess.Popen:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | place | meeting | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, text=True, **pipes)
