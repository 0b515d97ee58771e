"""Files of weights as people have them: what opens, and what is said of what does not."""

import argparse
import collections
import contextlib
import datetime
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from errors import MissingFileError, StorageError, UserError
from pixart.tensor_files import read_weight_file
from pixart.weight_files import find_weight_files, read_json

STEM = "diffusion_pytorch_model"
PLAIN = {
    "output": Path("runs/a"),
    "begun": datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
    "lasted": datetime.timedelta(hours=3),
    "losses": collections.defaultdict(list, train=[0.1]),
    "names": np.array(["a", "b"]),
}
WEIGHTS = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.float16)}


class Program:
    """A pickle that writes a file when it is opened as pickles are."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"x")


def write_index(folder: Path, name: str, *pieces: str) -> None:
    (folder / name).write_text(json.dumps({"weight_map": dict(enumerate(pieces))}))


@pytest.mark.parametrize(
    "names",
    [
        [f"{STEM}.safetensors"],
        [f"{STEM}.bin"],
        [f"{STEM}.fp16.safetensors"],
        [f"{STEM}.fp16.bin"],
        # full weights before those of a variant, safetensors before pickles
        [f"{STEM}.safetensors", f"{STEM}.bin", f"{STEM}.fp16.safetensors"],
        [f"{STEM}.bin", f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"],
    ],
)
def test_the_first_of_these_files_is_taken(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, *names, "config.json", f"{STEM}-00001-of-00002.safetensors")
    assert find_weight_files(tmp_path) == [tmp_path / names[0]]


@pytest.mark.parametrize(
    ("index", "piece"),
    [
        (f"{STEM}.safetensors.index.json", f"{STEM}-0000{{}}-of-00002.safetensors"),
        (f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-0000{{}}-of-00002.safetensors"),
        (f"{STEM}.safetensors.fp16.index.json", f"{STEM}-0000{{}}-of-00002.fp16.safetensors"),
        (f"{STEM}.bin.index.json", f"{STEM}-0000{{}}-of-00002.bin"),
    ],
)
def test_all_pieces_of_an_index_are_found_or_named(tmp_path: Path, index: str, piece: str) -> None:
    pieces = [piece.format(1), piece.format(2)]
    touch(tmp_path, *pieces)
    with pytest.raises(MissingFileError, match=r"holds no .*, but .*-00001-of-00002.* without the index"):
        find_weight_files(tmp_path)
    write_index(tmp_path, index, *pieces, pieces[0])
    assert find_weight_files(tmp_path) == [tmp_path / name for name in pieces]
    (tmp_path / pieces[1]).unlink()
    with pytest.raises(MissingFileError, match=r"lacks 1 of the 2 files that .*index.*json names: .*00002-of-00002"):
        find_weight_files(tmp_path)


def test_a_folder_without_weights_says_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=rf"holds no {STEM}\.safetensors or \.bin$"):
        find_weight_files(tmp_path)
    touch(tmp_path, "PixArt.pth")
    with pytest.raises(MissingFileError, match=r"but PixArt\.pth: if that is an original file, name it and not the"):
        find_weight_files(tmp_path)
    touch(tmp_path, f"{STEM}.fp16.safetensors", f"{STEM}.bf16.bin")
    with pytest.raises(UserError, match="holds weights as bf16 and as fp16: keep the files of one of them"):
        find_weight_files(tmp_path)
    with pytest.raises(MissingFileError, match="there is no such folder"):
        find_weight_files(tmp_path / "nowhere")
    (tmp_path / f"{STEM}.bin.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(UserError, match=r"index\.json has no weight_map"):
        find_weight_files(tmp_path)
    for name in ("../x.safetensors", "/tmp/x.safetensors", "parts/x.safetensors", "..\\\\x.bin"):
        write_index(tmp_path, f"{STEM}.bin.index.json", name)
        with pytest.raises(UserError, match=r"index\.json names '.*', which is no name of a file beside it"):
            find_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "part", "said"),
    [
        (WEIGHTS, None, "its weights"),
        ({"state_dict": WEIGHTS, "epoch": 3}, "state_dict", "its trained weights (state_dict)"),
        ({"state_dict": {}, "state_dict_ema": WEIGHTS}, "state_dict_ema", "its average weights (state_dict_ema)"),
        ({"model": {"a": 0}, "ema": WEIGHTS, "args": argparse.Namespace(lr=1)}, "ema", "its average weights (ema)"),
        ({"model": WEIGHTS, "ema": None, "rng": np.zeros(2), "loss": np.float64(1)}, "model", "its trained weights"),
        ({"module": {f"module._orig_mod.{key}": value for key, value in WEIGHTS.items()}}, "module", "its trained"),
        ({"state_dict": {key: value.numpy() for key, value in WEIGHTS.items()}}, "state_dict", "its trained weights"),
        ({**WEIGHTS, "epoch": 3, "loss": 0.1, "name": "x"}, None, "its weights"),
        ({"model": {"state_dict": WEIGHTS, "epoch": 3}}, "model.state_dict", "its trained weights (model.state_dict)"),
        ({"state_dict": {"ema": WEIGHTS, "model": {}}}, "state_dict.ema", "its average weights (state_dict.ema)"),
        ({"model": WEIGHTS, "args": argparse.Namespace(**PLAIN)}, "model", "its trained weights"),
    ],
    ids=["plain", "state_dict", "ema", "namespace", "model", "prefixes", "arrays", "epoch", "nested", "deep", "args"],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_training_code_saves_opens(tmp_path: Path, content, part, said: str, is_zip: bool) -> None:
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=is_zip)
    stored = read_weight_file(tmp_path / "model.pth")
    assert stored.part == part and stored.describe().startswith(said)
    assert stored.tensors.keys() == WEIGHTS.keys()
    for key, value in WEIGHTS.items():
        assert stored.tensors[key].dtype == value.dtype and torch.equal(stored.tensors[key], value)


def test_a_file_is_known_by_its_bytes_and_not_by_its_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.pth")
    torch.save(WEIGHTS, tmp_path / "model.safetensors")
    for name in ("model.pth", "model.safetensors"):
        assert torch.equal(read_weight_file(tmp_path / name).tensors["a"], WEIGHTS["a"])


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/a.txt", "no weights")


def endless() -> dict:
    content: dict = {}
    content["model"] = content
    return content


FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "is empty: it was not written or fetched to its end"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is a pointer of git-lfs, not the file itself: run `git lfs pull` where it was cloned",
    ),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "is a web page that was saved under this name"),
    "text": (lambda path: path.write_text("no zip, no pickle"), "is not a checkpoint of torch: it begins neither as"),
    "zip": (write_zip, "is a zip archive, but none that torch.save wrote: unpack it first"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "not a checkpoint of torch, but a pickle of"),
    "script": (lambda path: torch.jit.script(torch.nn.ReLU()).save(path), "is a program of TorchScript: save the"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "holds no weights by name, but a Tensor"),
    "none": (lambda path: torch.save({"state_dict": None}, path), "holds no weights: state_dict is None"),
    "nothing": (lambda path: torch.save({}, path), "holds no weights: it is an empty dict"),
    "other": (lambda path: torch.save({"words": ["a"]}, path), "is no file of weights: 'words' in it is a list"),
    "texts": (lambda path: torch.save({"a": np.array(["b", "c"])}, path), "'a' in it is a ndarray"),
    "number": (lambda path: torch.save({"epoch": 3}, path), "is no file of weights: 'epoch' in it is an int"),
    "objects": (
        lambda path: torch.save({"a": np.array([None])}, path),
        "holds more than weights, namely numpy.dtypes.ObjectDType; to open that could run any program",
    ),
    "itself": (lambda path: torch.save(endless(), path), "is no file of weights: 'model' in it is a dict"),
    "module": (
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
        "holds more than weights, namely torch.nn.modules.linear.Linear; to open that could run any program",
    ),
    "program": (lambda path: torch.save({"state_dict": Program(path.parent / "trace")}, path), "system; to open that"),
    "old program": (
        lambda path: torch.save(Program(path.parent / "trace"), path, _use_new_zipfile_serialization=False),
        "holds more than weights, namely ",
    ),
    "bare program": (lambda path: path.write_bytes(pickle.dumps(Program(path.parent / "trace"))), "a pickle of some"),
    "folder": (lambda path: path.mkdir(), "is a folder, where a file is meant"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_no_file_of_weights_is_said_in_one_line_of_ours(tmp_path: Path, kind: str) -> None:
    write, message = FAULTS[kind]
    write(tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        read_weight_file(tmp_path / "x.pth", key="some.key")
    said = str(caught.value)
    assert said.startswith(f"some.key {tmp_path / 'x.pth'} ") and message in said
    assert "weights_only" not in said and "\n" not in said
    assert not (tmp_path / "trace").exists(), "the pickle's program was run"


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_short_says_so(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[:-150])
    with pytest.raises(
        UserError, match=r"x\.pth is not a checkpoint of torch any more: it has been cut short, fetch it"
    ):
        read_weight_file(path)
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read, it may have been cut short"):
        read_weight_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("is_zip", [True, False])
def test_damage_anywhere_is_said_in_one_line(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "x.pth"
    content = {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1e-4, steps=70_000), "rng": np.zeros(2)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for length in range(64, len(whole), 37 if is_zip else 5):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.pth is not a checkpoint of torch any more: it has been cut short"):
            read_weight_file(path)
    for place in range(64, len(whole), 61 if is_zip else 11):
        path.write_bytes(whole[:place] + b"\xf8" + whole[place + 1 :])
        with contextlib.suppress(UserError):  # a byte of a number is damaged without a trace
            assert read_weight_file(path).tensors.keys() == WEIGHTS.keys()


def test_a_zip_of_several_disks_is_damaged(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 7  # of the locator, the number of disks
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth is a zip archive that is damaged \(zipfiles that span multiple disks"):
        read_weight_file(tmp_path / "x.pth")


def test_a_file_that_may_not_be_read_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(StorageError, match=r"x\.pth: you may not read or write this .*; change its rights or owner"):
        read_weight_file(tmp_path / "x.pth")


def test_settings_that_are_none_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(MissingFileError, match=r"config\.json does not exist"):
        read_json(path)
    for content, message in (("", "is empty"), ('{"a": ', "is no JSON or has been cut short"), ("[1]", "holds a list")):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"config\.json {message}"):
            read_json(path)
