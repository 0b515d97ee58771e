"""`atelier init --shards SHARDS --run RUN`: a short recipe for the data at hand, by a look at it."""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atelier import keys
from errors import UserError
from pipelines.as_typed import typed_command, typed_flag, typed_path
from pipelines.command import run_command, run_folder
from pipelines.engine.progress import get_logger
from pipelines.overrides import Setting, apply_setting
from pipelines.raw.images import SampleReject, image_size
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import describe_shards, open_shard
from pipelines.recipe import DataConfig, Recipe, load_recipe
from pipelines.run_memory import MEMORY_NAME, SHARDS_KEY, Chosen, read_memory, remember, require_shards
from pipelines.store.files import atomic_write_bytes

MAX_SHARDS, MAX_SAMPLES_OF_SHARD = 8, 32  # looked into; headers of that many images tell sizes well enough
HEADER_BYTES = 64 * 1024
# Base resolutions of the released weights, and a small one for models of one's own.
RESOLUTIONS = {
    1024: "PixArt-alpha/PixArt-XL-2-1024-MS",
    512: "PixArt-alpha/PixArt-XL-2-512x512",
    256: "PixArt-alpha/PixArt-XL-2-256x256",
}
SMALLEST = 64
# The released weights were trained on the features of this T5.
VLM, T5, VAE = "llava-hf/llava-1.5-7b-hf", "DeepFloyd/t5-v1_1-xxl", "stabilityai/sd-vae-ft-ema"
STAGE = "finetune"
PASSES, MIN_STEPS, MAX_STEPS = 20, 200, 20_000
BATCHES = (64, 32, 16, 8, 4, 2, 1)

log = get_logger("init")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a look at shards has told.

    Attributes:
        kinds: endings of the shards' names, or folder.
        num_shards, num_samples: of all.
        sizes: width and height in pixels of some images.
        num_seen, num_with_text: samples that were looked at for a text, and those that have one.
    """

    kinds: tuple[str, ...]
    num_shards: int
    num_samples: int
    sizes: list[tuple[int, int]]
    num_seen: int
    num_with_text: int

    @property
    def has_texts(self) -> bool:
        """Whether most samples bring a text of their own."""
        return 2 * self.num_with_text > self.num_seen

    @property
    def short_side(self) -> int:
        """The median of the shorter sides, in pixels."""
        return int(statistics.median(min(size) for size in self.sizes))

    @property
    def is_varied(self) -> bool:
        """Whether a square crop would cut away much of many images."""
        return sum(max(size) > 1.2 * min(size) for size in self.sizes) > 0.2 * len(self.sizes)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A key of the recipe, its value, and why."""

    table: str
    key: str
    value: Any
    why: str


def look_at(paths: Sequence[str], run: Path, data: DataConfig) -> Data:
    """Look at the headers of all shards and at some samples of some, which `data` says how to read.

    Raises:
        UserError: no image can be read; or as `describe_shards` does.
    """
    described = describe_shards(paths, data.reading, run=run)
    sizes, num_seen, num_with_text, reasons = [], 0, 0, set[str]()
    step = max(1, len(described) // MAX_SHARDS)
    for shard in described[::step][:MAX_SHARDS]:
        with open_shard(shard.source.path, data.reading, run=run, identity=shard.source.identity) as raw:
            samples = [sample for sample in raw.samples if sample.reject is None]
            for sample in samples[:: max(1, len(samples) // MAX_SAMPLES_OF_SHARD)][:MAX_SAMPLES_OF_SHARD]:
                num_seen += 1
                try:
                    num_with_text += bool(raw.alt_text(sample))
                    sizes.append(image_size(raw.image_start(sample, HEADER_BYTES), max_pixels=data.max_pixels))
                except SampleReject as reject:
                    reasons.add(reject.reason)
    if not sizes:
        why = f" ({', '.join(sorted(reasons))})" if reasons else ""
        looked = f"{_counted(num_seen, 'sample')} that {'was' if num_seen == 1 else 'were'} looked at"
        raise UserError(f"{SHARDS_KEY}: of {looked} no image could be read{why}")
    return Data(
        kinds=tuple(sorted({Path(path).suffix.lstrip(".") or "folder" for path in paths})),
        num_shards=len(described),
        num_samples=sum(shard.source.num_samples for shard in described),
        sizes=sizes,
        num_seen=num_seen,
        num_with_text=num_with_text,
    )


def gpu_gigabytes() -> list[int]:
    """Return the memory of each GPU of this machine in whole gigabytes, as its driver says; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return [round(int(line) / 1024) for line in said.stdout.split() if line.isdecimal()] if not said.returncode else []


def write_lines(data: Data, gpus: Sequence[int]) -> list[Line]:
    """Return the recipe for some data on a machine with such GPUs."""
    fitting = [side for side in RESOLUTIONS if side <= data.short_side]
    resolution = fitting[0] if fitting else SMALLEST * max(1, data.short_side // SMALLEST)
    weights = RESOLUTIONS[resolution] if fitting else RESOLUTIONS[256]
    batch = next(size for size in BATCHES if size <= max(1, data.num_samples // 4))
    steps = min(MAX_STEPS, max(MIN_STEPS, data.num_samples * PASSES // batch))
    share = f"{data.num_with_text} of {data.num_seen} samples that were looked at have a text"
    captions = (
        [Line(table="captioning", key="engine", value="given", why=f"{share}: no model is asked")]
        if data.has_texts
        else [Line(table="captioning", key="model", value=VLM, why=f"{share}: a model describes them; {_where(VLM)}")]
    )
    machine = f"{len(gpus)} of {max(gpus)} GB" if gpus else "none was found"
    worker = 1.0 if gpus else 0.0
    table = f"features.{STAGE}"
    return [
        Line(table="engine", key="gpus_per_worker", value=worker, why=f"GPUs: {machine}"),
        *captions,
        Line(table="features", key="text_model", value=T5, why=f"of all released PixArts; {_where(T5)}"),
        Line(
            table="features", key="text_cleaning", value="diffusers", why="as the texts of PixArt-alpha's weights were"
        ),
        Line(table="features", key="vae_model", value=VAE, why=f"of PixArt-alpha's; {_where(VAE)}"),
        Line(table=table, key="resolution", value=resolution, why=f"the median short side is {data.short_side} pixels"),
        Line(table=table, key="buckets", value=data.is_varied, why="whether images of many shapes are cut to a few"),
        Line(table="training", key="dtype", value="bf16" if gpus else "fp32", why="bf16 gains on a GPU alone"),
        Line(table=f"training.{STAGE}", key="network", value="pixart", why="reads text"),
        Line(
            table=f"training.{STAGE}",
            key="starts_from",
            value=weights,
            why="its shape comes with it; [model] is left out",
        ),
        Line(table=f"training.{STAGE}", key="global_batch_size", value=batch, why=f"of {data.num_samples:,} samples"),
        Line(
            table=f"training.{STAGE}",
            key="num_steps",
            value=steps,
            why=f"{batch * steps / data.num_samples:.0f} passes",
        ),
        Line(table=f"training.{STAGE}", key="warmup_steps", value=steps // 10, why="a tenth"),
        Line(table=f"training.{STAGE}", key="checkpoint_every", value=max(1, steps // 4), why="four of them"),
    ]


def _where(model_id: str) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    has = (Path(HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}").is_dir()
    return "in the local cache" if has else "will be fetched"


def typed_data(typed: Sequence[Setting], to: Path) -> DataConfig:
    """Return `[data]` as it was typed, before there is a recipe.

    Raises:
        UserError: a key of it is unknown or wrong.
    """
    tables: dict[str, Any] = {}
    of_data = [setting for setting in typed if setting.key.startswith("data.")]
    settings = {apply_setting(tables, setting, stage=None): setting for setting in of_data}
    return Recipe(to, tables, settings=settings).table("data", DataConfig)


def check_typed(text: str, typed: Sequence[Setting]) -> None:
    """Refuse typed settings that no room would take, laid over the text of the recipe without them.

    Raises:
        UserError: a table or key is unknown, or a value is wrong; names it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        recipe = load_recipe(path, typed, stage=STAGE)
    for table in keys.TABLES:
        if table.is_named:
            recipe.named(table.name, STAGE, model=table.model)
        elif table.name in recipe.tables:
            recipe.table(table.name, table.model)


def describe(lines: Sequence[Line], data: Data, typed: Sequence[Setting]) -> str:
    """Return the text of the recipe; typed settings take the place of its own lines."""
    tables: dict[str, Any] = {}
    places = {apply_setting(tables, setting, stage=STAGE) for setting in typed}
    # A table that is typed as a whole has in it what is typed of it.
    places = {place for place in places if not any(place[:length] in places for length in range(1, len(place)))}
    rows = [line for line in lines if not _is_within((*line.table.split("."), line.key), places)]
    for place in sorted(places):
        value = tables
        for part in place:
            value = value[part]
        table = ".".join(map(keys.written_key, place[:-1]))
        rows.append(Line(table=table, key=keys.written_key(place[-1]), value=value, why="as typed"))
    sides = sorted(max(size) / min(size) for size in data.sizes)
    text = (
        f"# {_counted(data.num_samples, 'sample')} in {_counted(data.num_shards, 'shard')} ({', '.join(data.kinds)}). "
        f"Images have a median short side of {data.short_side} pixels,\n# and are up to {sides[-1]:.1f} times as long "
        "as wide. "
        f"`{typed_command('recipe')}` lists every other key.\n"
    )
    order = sorted({row.table for row in rows}, key=[row.table for row in [*lines, *rows]].index)
    for table in order:
        text += f"\n[{table}]\n"
        for row in [row for row in rows if row.table == table]:
            text += f"{f'{row.key} = {keys.written(row.value)}':<44}  # {row.why}\n"
    return text


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _is_within(place: tuple[str, ...], places: Collection[tuple[str, ...]]) -> bool:
    return any(place[:length] in places for length in range(1, len(place) + 1))


def main() -> None:
    """Write the recipe, and remember it and the shards for the run."""
    parser = argparse.ArgumentParser(
        prog="atelier init", description="A recipe for the data at hand.", allow_abbrev=False
    )
    parser.add_argument("--shards", help="raw shards: a path, a glob, a {range} or a URL; else those the run remembers")
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--to", type=Path, help="file to write; RUN/recipe.toml unless typed")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="write this in its place"
    )
    options = parser.parse_args()
    run = run_folder(options.run)
    to = typed_path(options.to or run / "recipe.toml")
    if to.exists():
        raise UserError(f"{to} exists and is left as it is: move it away, or name another file with {typed_flag('to')}")
    if options.shards is None and not read_memory(run).shards:
        raise UserError(f"say which data, as {typed_flag('shards', 'photos/')}")
    if options.shards:
        paths = expand_shards(options.shards)
    else:
        paths = sorted(read_memory(run).shards.values())
        require_shards(paths, run / MEMORY_NAME)
    typed = [Setting(text=text) for text in options.settings]
    data = look_at(paths, run, typed_data(typed, to))
    lines = write_lines(data, gpu_gigabytes())
    check_typed(describe(lines, data, ()), typed)
    text = describe(lines, data, typed)
    to.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(to, text.encode())
    remember(run, Chosen(recipe=to, settings=(), note=None, replaces=True), keys={}, shards=paths)
    log.info(f"{to} is written, and remembered for {run} with the shards; read it, then go on with")
    log.info("; ".join(typed_command(step, {"run": run}) for step in ("caption", "features", "train")))


if __name__ == "__main__":
    sys.exit(run_command("init", main))
