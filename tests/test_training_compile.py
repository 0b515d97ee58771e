"""`training.compile`: blocks compiled once for all, the same numbers, the same names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from pixart.model import PixArt, PixArtConfig
from training.config import StageTraining
from training.zero import ZeroModel, initialize_ranks
initialize_ranks()

def losses(zero_stage, is_compiled):
    torch.manual_seed(0)
    network = PixArt(PixArtConfig(num_layers=3, num_heads=2, head_dim=8, caption_channels=8, sample_size=4))
    settings = StageTraining(
        global_batch_size=2, dtype="fp32", zero_stage=zero_stage, compile=is_compiled, learning_rate=1e-3
    )
    names = list(network.state_dict())
    model = ZeroModel(network, settings)
    found = []
    for num_tokens, side in ((5, 4), (7, 4), (9, 4), (4, 8), (11, 6), (6, 4)):
        torch.manual_seed(num_tokens)
        mask = torch.ones(2, num_tokens, dtype=torch.bool)
        mask[1, 3:] = False
        output = model.engine(torch.randn(2, 4, side, side), torch.rand(2), torch.randn(2, num_tokens, 8), mask)
        loss = output.square().mean() + (output - 1).square().mean()
        model.backward(loss, is_last=True)
        model.update(1e-3)
        found.append(float(loss))
    assert list(model.engine.module.state_dict()) == names
    return found

results = {stage: [losses(stage, False), losses(stage, True)] for stage in (2,)}
print(json.dumps({"losses": results, "graphs": counters["stats"]["unique_graphs"],
                  "breaks": sum(counters["graph_break"].values())}))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_compiled_blocks_give_the_losses_of_eager_ones(tmp_path: Path) -> None:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | rank | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for eager, compiled in result["losses"].values():
        assert compiled == pytest.approx(eager, rel=1e-4)
    assert result["breaks"] == 0
    # Per model: lengths of the text are free from the second on, sizes of the image from theirs.
    assert 0 < result["graphs"] <= 3
