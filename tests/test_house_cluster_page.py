"""docs/CLUSTER.md: its scripts and files are those that bash, Ray and this house understand."""

import re
import shlex
import subprocess
import tomllib
from importlib.metadata import version

import pytest
import yaml

from pipelines.command import parse_command
from pipelines.engine.run import EngineConfig
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "CLUSTER.md").read_text()
SBATCH = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[0]
RAYJOB = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])


def options_of(command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def test_the_engine_table_is_one() -> None:
    (table,) = re.findall(r"^    (\[engine\]\n(?:    .*\n)+)", PAGE, re.MULTILINE)
    engine = EngineConfig.model_validate(tomllib.loads(table)["engine"])
    assert engine.worker_resources.memory_bytes == 24 * 10**9


def test_the_batch_script_is_bash() -> None:
    subprocess.run(["bash", "-n"], input=SBATCH, text=True, check=True)


@pytest.mark.parametrize("command", ["start", "job submit", "job logs", "job stop"])
def test_options_of_ray_exist(command: str) -> None:
    from ray.dashboard.modules.job import cli
    from ray.scripts import scripts

    commands = {"start": scripts.start, "submit": cli.submit, "logs": cli.logs, "stop": cli.stop}
    known = options_of(commands[command.split()[-1]])
    # What stands behind `--` is the command's own.
    uses = [use.split(" -- ")[0] for use in re.findall(rf"ray {command} (.*(?:\\\n.*)?)", PAGE)]
    uses += re.findall(r"^resources=\((.*)\)", SBATCH, re.MULTILINE) if command == "start" else []
    used = set(re.findall(r"(?<!\S)(--[a-z-]+)", " ".join(uses)))
    assert used and used <= known | {"--"}


def test_the_rayjob_runs_this_house_with_the_ray_of_the_lock() -> None:
    spec = RAYJOB["spec"]
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert re.search(rf"^ray(\[.*\])?=={spec['rayClusterSpec']['rayVersion']}$", lock, re.MULTILINE)
    assert spec["rayClusterSpec"]["rayVersion"] == version("ray")
    python, _, room, *arguments = shlex.split(spec["entrypoint"].replace("/app/", f"{REPOSITORY}/"))
    command = parse_command(room, "", argv=arguments)
    assert (python, room) == ("python", "captioning")
    assert command.recipe.tables["data"]["shards"] == "/shared/data/sam" and command.run.is_absolute()
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    # Every pod sees the folder that RUN and SHARDS lie in.
    for group in groups:
        pod = group["template"]["spec"]
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/shared"] in {volume["name"] for volume in pod["volumes"]}
