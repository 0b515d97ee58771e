"""What a folder of text features keeps beside its shards, damaged: said in a line, and had again."""

from pathlib import Path

import pytest
from feature_run import extract, write_run

import features.captions
import features.text
from errors import UserError
from features.captions import IDENTITIES_NAME


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damaged_identities_and_null_caption_are_made_anew_to_the_same_bytes(tmp_path, monkeypatch) -> None:
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    extract(run)
    text = run / "features" / "text"
    before = contents(text)
    warnings: list[str] = []
    for module in (features.captions, features.text):
        monkeypatch.setattr(module.log, "warning", warnings.append)
    identities, null = text / IDENTITIES_NAME, text / "null.safetensors"
    identities.write_bytes(b'{"laion_00000": [')
    null.write_bytes(null.read_bytes()[:-9])
    (text / "manifest.json").unlink()
    extract(run)
    assert contents(text) == before
    first, second = warnings
    assert first.startswith(f"{identities} is damaged (") and first.endswith("; the captions are read again")
    assert second.startswith(f"{null} is cut short") and second.endswith(
        "it is written anew, with the texts of one shard"
    )


def test_a_column_that_is_not_there_is_said_with_those_that_are(tmp_path) -> None:
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    message = (
        r"features\.stage2\.captions names 'captoin', but .* has no such captions \(did you mean caption\?\); those "
        r"there are: alt_text, caption\. `make caption RUN=.*` makes a pass of \[captioning\.passes\]"
    )
    with pytest.raises(UserError, match=message):
        extract(run, "features.stage2.captions=[{column='captoin'}]")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"laion_00000": "x"}'])
def test_identities_of_any_bytes_are_none(tmp_path, content: bytes) -> None:
    (tmp_path / IDENTITIES_NAME).write_bytes(content)
    assert features.captions._read_identities(tmp_path) == {}
    assert not (tmp_path / IDENTITIES_NAME).exists()
