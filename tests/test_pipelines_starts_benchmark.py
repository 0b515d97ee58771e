"""`make bench-starts`: what it runs, and that it tells when the two ways do not write the same bytes."""

from pathlib import Path

import pytest

from benchmarks import starts


def write(line: list[str], *, is_different: bool) -> None:
    folder = Path(line[line.index("--run") + 1]) / "captions"
    folder.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(b"other" if is_different and starts.ON_RAY in line else b"same")
    (folder / "manifest.json").write_text(folder.parent.name)


@pytest.mark.parametrize("is_different", [False, True])
def test_seconds_the_second_time_and_bytes_of_both_ways(tmp_path, monkeypatch, is_different: bool) -> None:
    lines: list[list[str]] = []
    seconds = iter([(9.0, 8.0), (4.0, 3.0), (10.0, 2.0)])

    def finish(line: list[str]) -> tuple[float, float]:
        lines.append(line)
        write(line, is_different=is_different)
        return next(seconds)

    monkeypatch.setattr(starts, "finish", finish)
    small = starts.Small(name="caption", room=("captioning",), outputs="captions", settings=("data.shards=x",))
    figures = starts.measure(small, tmp_path)
    assert [starts.ON_RAY in line for line in lines] == [False, False, True]
    assert len({line[line.index("--run") + 1] for line in lines}) == 3, "none finds another's work done"
    assert figures == {
        "caption": 4.0,
        "caption_cpu": 3.0,
        "caption_first": 9.0,
        "caption_ray": 10.0,
        "ratio_caption": 2.5,
        "identical_caption": not is_different,
    }
