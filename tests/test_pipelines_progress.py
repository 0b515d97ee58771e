"""The one progress view: what it says, its rate after a resume, and how it looks on real terminals."""

import logging
import subprocess
import sys
import time

import pytest

from pipelines.engine import progress as progress_module
from pipelines.engine.progress import ProgressBar, describe_rejects, progress_bar
from tests.line_worker import command, make_sources, run
from tests.terminal import run_in_terminal, visible_lines

IN_PROCESS = {"in_process": True, "samples_per_slice": 8}


class Clock:
    """A clock that tests turn."""

    def __init__(self, monkeypatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.seconds)


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What the rooms log, as a log file gets it."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collector()
    logging.getLogger("atelier").addHandler(handler)
    monkeypatch.setattr(progress_module, "console", progress_module.Console(stderr=True, force_terminal=False))
    yield found
    logging.getLogger("atelier").removeHandler(handler)


def test_what_an_earlier_run_did_is_no_part_of_the_rate(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    progress = ProgressBar("captioning", 1000)
    progress.skip(800)
    clock.seconds += 10
    assert progress.line() == "800/1,000 samples · 0.0 samples/s · -:--:-- left"
    progress.advance(50, note="3/4 shards\n2 rejected")
    assert progress.line() == "850/1,000 samples · 5.0 samples/s · 0:00:30 left · 3/4 shards · 2 rejected"
    progress.under_way = 25
    assert progress.line().startswith("875/1,000 samples · 7.5 samples/s · 0:00:17 left")
    progress.under_way = 5000
    assert progress.line().startswith("1,000/1,000 samples · 20.0 samples/s · 0:00:00 left")


def test_rejects_are_shown_by_reason_largest_first() -> None:
    assert describe_rejects({}, num_read=10) == ""
    some = {"too_small": 1, "corrupt_image": 30, "no_image": 8, "cut_off": 2}
    assert describe_rejects(some, num_read=410) == "41 rejected (10.0%): corrupt_image 30, no_image 8, cut_off 2, …"


def test_a_log_file_gets_a_line_at_every_interval_even_if_nothing_moves(messages) -> None:
    with progress_bar("test", 100, log_interval_seconds=0.02) as progress:
        progress.advance(10)
        while len(messages) < 3:
            time.sleep(0.005)
    assert messages[0].startswith("10/100 samples · ") and messages[2].startswith("10/100 samples · ")
    num_messages = len(messages)
    time.sleep(0.05)
    assert len(messages) == num_messages, "the lines end with the work"


def test_a_resumed_run_reports_its_own_rate_and_all_shards(tmp_path, messages) -> None:
    sources = make_sources(4, 50)
    run(tmp_path / "a", sources[:3])
    run(tmp_path / "a", sources)
    first, second = messages
    assert first.startswith("147 samples in 0:00:0") and " · 3/3 shards · " in first
    assert second.startswith("47 samples in 0:00:0") and " · 4/4 shards · " in second
    for expected in ("samples/s", "device waits 25%", "peak memory ", " GB (s3)", "5 rejected (10.6%): tenth 5"):
        assert expected in second


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(tmp_path, columns: int) -> None:
    line = command(tmp_path / "a", engine=IN_PROCESS, count=12, num_samples=60, seconds_per_slice=0.02)
    status, written = run_in_terminal(line, columns=columns)
    lines = visible_lines(written)
    assert status == 0 and max(map(len, lines)) <= columns
    bars = [line for line in lines if "/654 " in line]
    # Two looks a second; each shows all of it on one line, nothing cut and nothing wrapped.
    assert len(bars) >= 3
    assert all("samples/s" in bar and bar.rstrip().endswith("left") for bar in bars)
    assert any("shards · device waits 25% · peak memory" in line for line in lines)
    assert any("rejected (10" in line and "tenth" in line for line in lines)
    # The view is gone at the end, and the summary stays.
    assert written.rstrip().endswith("\x1b[2K")
    assert any("654 samples in 0:00:0" in line for line in lines)


def test_samples_under_way_move_the_bar_inside_a_shard(tmp_path, monkeypatch) -> None:
    seen = []
    advance = ProgressBar.__setattr__

    def record(progress: ProgressBar, name: str, value: object) -> None:
        if name == "under_way":
            seen.append(value)
        advance(progress, name, value)

    monkeypatch.setattr(ProgressBar, "__setattr__", record)
    run(tmp_path / "a", make_sources(1, 20))
    assert 8 in seen and seen[-1] == 0


def test_libraries_say_nothing_when_they_are_imported() -> None:
    imports = (
        "import encoders.kl, encoders.t5; from diffusers import AutoencoderKL; from transformers import T5EncoderModel"
    )
    done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
