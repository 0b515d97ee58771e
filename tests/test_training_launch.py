"""Stages on several launchers: tasks of Slurm and hosts over a remote shell, each a real process on this machine."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import kill_tree, process_tree
from training_run import REPOSITORY, arguments, finish, make_run, metrics, train
from warm_python import WarmProcess

from errors import ProgramFault, UserError
from pipelines.command import parse_command
from training.config import stage_training
from training.launch import node
from training.launch.hosts import run_hosts
from training.launch.placement import Host, is_slurm_task, on_hosts, read_hostfile
from training.launch.preflight import require_even_batches

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
# As sshd does it: a session of its own, stdin and stdout of the connection, only the command as text.
SHELL_SCRIPT = '#!/bin/sh\n[ "$1" = gone ] && { echo "no route to $1" >&2; exit 255; }\nexec setsid --wait sh -c "$2"\n'


def settings(**changed: object) -> dict[str, object]:
    return {"starts_from": "scratch", "num_steps": 6, "log_every": 1, "checkpoint_every": 100} | changed


def wait_for(condition: Callable[[], bool], *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def numbers(run: Path) -> list[list[float]]:
    return [[line["step"], line["loss"], line["gradient_norm"], line["update_norm"]] for line in metrics(run, 2)]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """Metrics of two ranks that one launcher has started."""
    run = make_run(tmp_path_factory.mktemp("ordinary"))
    finish(start_head(run))
    return numbers(run)


# -- the hostfile -----------------------------------------------------------------------------------------------------


def test_hosts_share_the_ranks_in_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nme@node-1 slots=8\n\nnode-2\tslots=4  # the old one\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("me@node-1", 8), Host("node-2", 4)]
    first, second = on_hosts(hosts)
    assert (first.first_rank, first.num_ranks, second.first_rank, second.num_ranks) == (0, 8, 8, 4)
    assert (first.has_first, second.has_first) == (True, False)
    assert {placement.world_size for placement in (first, second)} == {12}
    assert first.master_address == second.master_address == "node-1"
    assert first.master_port == second.master_port


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\nb 8\n", "hosts, line 2: 'b 8' is not `host slots=8`"),
        ("a slots=0\n", "line 1: 'a slots=0' is not"),
        ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x slots=1' is not"),
        ("a slots=1\na slots=2\n", "line 2: host a comes twice"),
        ("# nothing\n", "names no host"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_hostfile_is_refused_by_line(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(path)


# -- Slurm ------------------------------------------------------------------------------------------------------------


def test_a_batch_script_is_no_task() -> None:
    assert not is_slurm_task({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert not is_slurm_task({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"})
    assert is_slurm_task({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"})


def start_tasks(run: Path, folder: Path, **changed: object) -> list[WarmProcess]:
    """Start two tasks as `srun --ntasks=2` would."""
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$*" = "show hostnames here[1]" ] && echo {socket.gethostname()}\n')
    scontrol.chmod(0o755)
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "here[1]",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    return [
        WarmProcess(
            "training",
            arguments(run, 2, **settings(**changed)),
            changed=step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    ]


@pytest.mark.slow
def test_tasks_of_slurm_are_the_ranks_of_one_run(ordinary: list[list[float]], tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first, second = [finish(task) for task in start_tasks(run, tmp_path)]
    assert numbers(run) == ordinary
    assert (
        "2 ranks x 1 micro-batches x 4, keeping 'all' activations; chosen to fit" in first
        and "stage2: 6 steps" in first
    )
    assert second == ""
    assert (run / "summary.json").is_file()


@pytest.mark.slow
def test_preempted_tasks_save_and_end_well(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    tasks = start_tasks(run, tmp_path, num_steps=100_000)
    wait_for(lambda: (run / "training" / "stage2" / "metrics.jsonl").is_file())
    for task in tasks:
        task.terminate()
    assert "the same command continues" in finish(tasks[0])
    finish(tasks[1])
    assert (run / "training" / "stage2" / "latest").is_file()

    # A task that dies ends the other one; the launcher of rank 0 says so.
    tasks = start_tasks(run, tmp_path, num_steps=100_000)
    before = len(metrics(run, 2))
    wait_for(lambda: len(metrics(run, 2)) > before)
    tasks[1].kill()
    assert "lost contact with another rank" in finish(tasks[0], status=2, timeout_seconds=60)
    finish(tasks[1], status=-signal.SIGKILL)


@pytest.mark.slow
def test_what_the_first_task_refuses_ends_all_and_is_said_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first, second = start_tasks(run, tmp_path, global_batch_size=7)
    assert "global_batch_size 7 is not a multiple of 2" in finish(first, status=2, timeout_seconds=60)
    assert finish(second, status=2, timeout_seconds=60) == ""

    first, second = start_tasks(run, tmp_path, learning_rat=1)
    assert "learning_rat is not a known key" in finish(first, status=2, timeout_seconds=60)
    assert finish(second, status=2, timeout_seconds=60) == ""

    folder = run / "training" / "stage2"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first, second = start_tasks(run, tmp_path)
        assert "is being trained by another process" in finish(first, status=2, timeout_seconds=60)
        assert finish(second, status=2, timeout_seconds=60) == ""


# -- hosts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> str:
    """A remote shell without a network."""
    script = tmp_path / "shell"
    script.write_text(SHELL_SCRIPT)
    script.chmod(0o755)
    return str(script)


def write_hosts(folder: Path, *names: str) -> str:
    path = folder / "hosts"
    path.write_text("".join(f"{name} slots=1\n" for name in names))
    return str(path)


def start_head(run: Path, **changed: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *arguments(run, 2, **settings(**changed))],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(run: Path) -> list[int]:
    """All that train `run`, whoever their parents are."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in command and b"-m" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.faults
def test_the_head_dies_stops_and_continues(ordinary: list[list[float]], shell: str, tmp_path: Path) -> None:
    run, hosts = make_run(tmp_path), write_hosts(tmp_path, "127.0.0.1", "localhost")
    endless = {"hostfile": hosts, "remote_shell": shell, "num_steps": 100_000, "checkpoint_every": 2}
    killed = start_head(run, **endless)
    wait_for(lambda: (run / "training" / "stage2" / "latest").is_file())
    assert len(processes_of(run)) == 5, "the head, two launchers and two ranks"
    killed.kill()
    finish(killed, status=-signal.SIGKILL)
    wait_for(lambda: processes_of(run) == [], seconds=20)

    stopped = start_head(run, **endless)
    before = len(metrics(run, 2))
    wait_for(lambda: len(metrics(run, 2)) > before)
    stopped.terminate()
    assert "the same command continues" in finish(stopped)
    assert processes_of(run) == []
    found = numbers(run)
    assert all(ours == theirs for ours, theirs in zip(found, ordinary, strict=False)) and len(found) > 1

    # A node that dies in the middle, with all that runs there.
    head = start_head(run, **endless)
    before = len(metrics(run, 2))
    wait_for(lambda: len(metrics(run, 2)) > before)
    nodes = [pid for pid, command in process_tree(head.pid).items() if "-m training.launch.node" in command]
    kill_tree(nodes[1])
    said = finish(head, status=2, timeout_seconds=60)
    assert "the connection was lost or its launcher was killed. The same command continues" in said
    assert "Traceback" not in said
    assert processes_of(run) == []


@pytest.mark.slow
def test_a_host_that_cannot_take_part_is_named(shell: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    common = settings(remote_shell=shell, hostfile=write_hosts(tmp_path, "127.0.0.1", "gone"))
    said = train(run, 2, status=2, **common)
    assert "no route to gone" in said and "host gone: cannot be reached" in said
    wait_for(lambda: processes_of(run) == [], seconds=20)
    # A folder that is not there: the remote shell looks into another root, as a host without the shared storage has.
    Path(shell).write_text(f'#!/bin/sh\nexec sh -c "$(echo "$2" | sed "s:cd {REPOSITORY}:cd /not/here:")"\n')
    said = train(run, 2, status=2, **common)
    assert f"host 127.0.0.1: has no folder {REPOSITORY}" in said
    assert "cannot be started" in train(run, 2, status=2, **common | {"remote_shell": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("error", "said", "is_printed"),
    [
        (KeyError("a_name"), "host gpu7: KeyError: 'a_name'; its traceback is above", True),
        (ProgramFault("rank 3 ended with status 1; its traceback is above"), "host gpu7: rank 3 ended", False),
    ],
    ids=["launcher", "rank"],
)
def test_a_fault_of_the_program_on_a_host_is_no_lost_connection(
    error: Exception, said: str, is_printed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def fail(command: object) -> None:
        raise error

    order = json.dumps({"environment": {}, "placement": {}}).encode()
    replaced = {"_read_line": lambda: order, "_follow_head": lambda: None, "open_stage": fail}
    for name, function in (replaced | {"parse_command": lambda *_, has_stages: None}).items():
        monkeypatch.setattr(node, name, function)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    status = node.main()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    reported, printed = capfd.readouterr()
    assert status == 1 and ("Traceback (most recent call last)" in printed) == is_printed
    (tmp_path / "reported").write_text(reported)
    (tmp_path / "shell").write_text(f"#!/bin/sh\ncat {tmp_path}/reported\nexit 1\n")
    (tmp_path / "shell").chmod(0o755)
    with pytest.raises(ProgramFault, match=re.escape(said)):
        run_hosts([], hosts=[Host("gpu7", 1)], remote_shell=str(tmp_path / "shell"))


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[str]:
    """A real sshd on a high port, with keys of its own; gives the command that reaches it."""
    if not Path(SSHD).is_file() or shutil.which("ssh") is None:
        pytest.skip("sshd (openssh-server) and ssh are not installed")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it as root
    with (tmp_path / "sshd.log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log)
    wait_for(lambda: is_open(port) or server.poll() is not None, seconds=10)
    assert server.poll() is None, (tmp_path / "sshd.log").read_text()
    options = [f"-p{port}", f"-i{tmp_path}/user", "-F/dev/null", "-oBatchMode=yes", "-oStrictHostKeyChecking=no"]
    yield shlex.join(["ssh", *options, "-oLogLevel=ERROR", f"-oUserKnownHostsFile={tmp_path}/known"])
    server.terminate()
    server.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_hosts_over_ssh_are_the_ranks_of_one_run(ordinary: list[list[float]], ssh: str, tmp_path: Path) -> None:
    run, hosts = make_run(tmp_path), write_hosts(tmp_path, "127.0.0.1", "localhost")
    said = finish(start_head(run, hostfile=hosts, remote_shell=ssh))
    assert numbers(run) == ordinary
    assert "stage2: 6 steps" in said

    head = start_head(run, hostfile=hosts, remote_shell=ssh, num_steps=100_000)
    wait_for(lambda: len(metrics(run, 2)) > len(ordinary))
    head.kill()
    finish(head, status=-signal.SIGKILL)
    wait_for(lambda: processes_of(run) == [], seconds=20)

    closed = [part for part in shlex.split(ssh) if not part.startswith("-p")]
    refused = settings(hostfile=hosts, remote_shell=shlex.join([*closed, "-p1"]), num_steps=9)
    said = finish(start_head(run, **refused), status=2)
    assert "cannot be reached" in said and "Connection refused" in said


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_batch_script_of_the_page_trains() -> None:
    (script,) = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs" / "TRAINING.md").read_text(), re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = script.replace("\\\n", "").partition("-m training")[2].replace("recipes/", f"{REPOSITORY}/recipes/")
    words = shlex.split(options)
    command = parse_command("training", "", argv=words, has_stages=True)
    assert command.stage == "stage2"
    require_even_batches(stage_training(command.recipe, command.stage_name), 4 * 8)
