"""Every kind of folder that a run can have: what lies there, how each file is checked, which command makes it.

Who adds a file to a folder adds it here; a test makes a whole run and finds every file of it described.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pipelines.as_typed import ANY, typed_command
from pipelines.run_memory import memory_damage
from pipelines.store.checkpoints import OURS
from pipelines.store.deepspeed_files import CONVERSIONS, STATE
from pipelines.store.manifest import MANIFEST_NAME, MARKER_FOLDER, TABLES_MANIFEST_NAME
from pipelines.store.verify.file_checks import (
    copy_damage,
    database_damage,
    headers_damage,
    json_damage,
    lines_damage,
    log_damage,
    page_damage,
    picture_damage,
    table_damage,
    text_damage,
    weights_damage,
)

ANEW = "`rm {path}`, then `{command}`"
COPY = "`rm {path}`: it is a copy, and the next command that needs it makes it anew"
RESTORE = "restore it from a copy, or `rm -r {folder}`; `{command}` then goes on from the newest whole checkpoint"


# The stage of a folder, by its place, and one that its place does not tell.
OF_STAGE = (("stage", "{stage}"),)
ANY_STAGE = (("stage", ANY),)


@dataclass(frozen=True)
class Door:
    """A command and its flags, in whose values groups of a folder's place are filled in."""

    name: str
    flags: tuple[tuple[str, str], ...] = ()

    def command(self, run: Path, groups: Mapping[str, str]) -> str:
        """Return it as it is typed, with its run."""
        return typed_command(self.name, {name: text.format_map(groups) for name, text in self.flags} | {"run": run})


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """Files that lie in a folder beside its shards.

    Attributes:
        pattern: of their paths below the folder.
        check: returns what is wrong with one; None where they are by design not looked into.
        mend: what to do about a damaged one, with {path}, {folder}, {command}, and flags such as {shards}.
        made_by: what makes it, where that is not what makes its folder.
        is_required: a finished folder without it is damaged.
        is_log: what is wrong with it is only worth a note.
    """

    pattern: str
    check: Callable[[Path], str | None] | None
    mend: str = ANEW
    made_by: Door | None = None
    is_required: bool = False
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class FolderKind:
    """A folder that a room writes.

    Attributes:
        place: regular expression of its path below the run; its groups go into `door`.
        door: makes what is in it, and goes on with it.
        files: what lies there beside shards, markers and manifest.
        signs: patterns, one of which a folder of this kind has; others of its name are the user's.
        has_shards: whether markers say which files there are, and their hashes.
        has_manifest: whether a finished one has a manifest.
        stranger: pattern of files that a glob over the folder would take for its own.
    """

    place: str
    door: Door
    files: tuple[FileKind, ...] = ()
    signs: tuple[str, ...] = (MANIFEST_NAME, TABLES_MANIFEST_NAME, f"{MARKER_FOLDER}/*", ".parts/*")
    has_shards: bool = True
    has_manifest: bool = True
    stranger: str | None = None

    def file_kind(self, name: str) -> FileKind | None:
        """Return what a file below the folder is, beside its shards; None for one that no room writes."""
        return next((kind for kind in (*self.files, *EVERYWHERE) if fnmatchcase(name, kind.pattern)), None)


# Locks hold nothing; parts are work that has not ended, which the next command checks by their reports.
EVERYWHERE = tuple(FileKind(pattern=pattern, check=None) for pattern in (".lock", ".parts/*", ".*.tmp", "*/.*.tmp"))
RUN = FolderKind(
    place=r"\.",
    door=Door("report"),
    files=(
        FileKind(  # of runs that were begun before run.json had them
            pattern="shards.json", check=json_damage, mend="`rm {path}`, and give {shards} with the next command again"
        ),
        FileKind(
            pattern="run.json",
            check=memory_damage,
            mend="`rm {path}`, and give {recipe} and {shards} with the next command again",
        ),
        FileKind(
            pattern="summary.json", check=json_damage, mend="`rm {path}`: each command writes its figures as it ends"
        ),
        FileKind(pattern="summary-damaged-*.json", check=None),  # put aside, for people to look at
        FileKind(pattern="index.html", check=page_damage),
        FileKind(pattern="buckets-*-rejects.csv", check=text_damage, made_by=Door("buckets", ANY_STAGE)),
        FileKind(pattern=".headers/*.headers", check=headers_damage, mend=COPY),
        FileKind(pattern=".texts/*.sqlite", check=database_damage, mend=COPY),
        FileKind(pattern=".tables/*.sqlite", check=database_damage, mend=COPY),
        FileKind(pattern=".summary.lock", check=None),
        FileKind(pattern=".run.lock", check=None),
    ),
    signs=("*",),
    has_shards=False,
    has_manifest=False,
)
RAW = FolderKind(
    place=r"raw",
    door=Door("world"),
    files=(
        FileKind(pattern="truth.parquet", check=table_damage, is_required=True),
        FileKind(pattern="prompts.jsonl", check=lines_damage, is_required=True),
    ),
)
CAPTIONS = FolderKind(
    place=r"captions(@[a-z][a-z0-9_]*)?",
    door=Door("caption"),
    files=(FileKind(pattern=".earlier/*", check=None),),
    stranger="*.parquet",
)
REPORT_FILES = (
    FileKind(pattern="report.html", check=page_damage, is_required=True),
    FileKind(pattern="table1.md", check=text_damage, is_required=True),
    FileKind(pattern="nouns.parquet", check=table_damage, is_required=True),
    FileKind(pattern="nouns.csv", check=text_damage, is_required=True),
    FileKind(pattern=".merge/*", check=None),
)
STATS = FolderKind(place=r"stats", door=Door("stats"), files=REPORT_FILES)
STATS_SAMPLE = FolderKind(place=r"stats-sample", door=Door("stats", (("sample", ANY),)), files=REPORT_FILES)
COUNTS = FolderKind(place=r"stats(-sample)?/counts", door=Door("stats"), stranger="*.parquet")
FEATURES = FolderKind(
    place=r"features/[^/]+",
    door=Door("features", ANY_STAGE),
    files=(
        FileKind(pattern="null.safetensors", check=weights_damage),
        FileKind(pattern=".captions.json", check=json_damage, mend=COPY),
        FileKind(pattern=".earlier/*", check=None),
        FileKind(pattern="preview-*.png", check=picture_damage, mend="`rm {path}`: it is only for people to look at"),
    ),
    stranger="*.tar",
)
COLUMNS = FolderKind(  # passes over images that were killed, and are dealt out by the next command
    place=r"columns",
    door=Door("columns"),
    files=(FileKind(pattern=".passes/*", check=None),),
    signs=(".passes/*", ".lock"),
    has_shards=False,
    has_manifest=False,
)
CLAIMS = FolderKind(place=r"columns/claims(@[a-z][a-z0-9_]*)?", door=Door("claims"), stranger="*.parquet")
SCORE = FolderKind(
    place=r"columns/[a-z][a-z0-9_]*(@[a-z][a-z0-9_]*)?",
    door=Door("columns"),
    files=(FileKind(pattern=".scratch/*", check=None),),  # of a score of the whole run that was killed
    stranger="*.parquet",
)
CHOICES = FolderKind(
    place=r"choices/(?P<stage>[^/]+)",
    door=Door("choose", OF_STAGE),
    stranger="*.parquet",
)
CHOOSE = FolderKind(
    place=r"choose",
    door=Door("choose"),
    files=(FileKind(pattern="*.html", check=page_damage, mend="`rm {path}`: it is only for people to look at"),),
    signs=("*.html",),
    has_shards=False,
    has_manifest=False,
)
CACHE = FolderKind(
    place=r"training/cache",
    door=Door("train", ANY_STAGE),
    files=(
        FileKind(pattern="*.partial", check=None),
        FileKind(pattern="*/*", check=copy_damage, mend=COPY),
    ),
    signs=("*/*",),
    has_shards=False,
    has_manifest=False,
)
CHECKPOINT = FolderKind(
    place=rf"training/(?P<stage>[^/]+)/{OURS.pattern}",
    door=Door("train", OF_STAGE),
    files=(
        FileKind(pattern="*.json", check=json_damage, mend=RESTORE),
        FileKind(pattern="*.safetensors", check=weights_damage, mend=RESTORE),
        FileKind(pattern="deepspeed/*.pt", check=weights_damage, mend=RESTORE),
        *(  # made of deepspeed/ for another number of ranks or another layout
            FileKind(pattern=f"{name}/*.pt", check=weights_damage, mend=f"`rm -r {{folder}}/{name}`: it is made anew")
            for name in CONVERSIONS
        ),
        *(FileKind(pattern=f"{name}/*", check=None) for name in (STATE, *CONVERSIONS)),
    ),
    signs=("*",),
    has_shards=False,
    has_manifest=False,
)
TRAINING = FolderKind(
    place=r"training/(?P<stage>[^/]+)",
    door=Door("train", OF_STAGE),
    files=(
        FileKind(pattern="latest", check=None),  # looked into with the checkpoints that it may name
        FileKind(pattern="metrics.jsonl", check=log_damage, is_log=True),
        FileKind(pattern="survey.json", check=json_damage, mend=COPY),
        FileKind(pattern="memory.json", check=json_damage, mend=COPY),
        FileKind(
            pattern="non-finite-step-*.json", check=json_damage, mend="`rm {path}`: it tells people what happened"
        ),
        FileKind(pattern="tensorboard/*", check=None),
        FileKind(pattern="wandb.json", check=json_damage, mend="`rm {path}`: a new run of W&B begins"),
        FileKind(pattern="wandb/*", check=None),
        FileKind(
            pattern="previews/step-*/*.png", check=picture_damage, mend="`rm {path}`: it is only for people to look at"
        ),
        FileKind(pattern="previews/index.html", check=page_damage, mend=COPY),
        FileKind(pattern="previews/prompts.safetensors", check=weights_damage, mend=COPY),
        FileKind(pattern="previews/.step-*.tmp/*", check=None),
        FileKind(
            pattern="averages/step-*.safetensors",
            check=weights_damage,
            mend="`rm {path}`: other averages are made of the rest",
        ),
        FileKind(pattern=".step-*.tmp/*", check=None),
    ),
    signs=("latest", "step-*/*", "metrics.jsonl", "survey.json"),
    has_shards=False,
    has_manifest=False,
)
APP = FolderKind(
    place=r"samples/(?P<stage>.+)-app",
    door=Door("app", OF_STAGE),
    files=(
        FileKind(pattern="control/given/*", check=None),
        FileKind(pattern="*.png", check=picture_damage, mend="`rm {path}`"),
    ),
    signs=("*.png",),
    has_shards=False,
    has_manifest=False,
)
SAMPLE_FILES = (
    FileKind(pattern="grid.png", check=picture_damage, is_required=True),
    FileKind(pattern="control/*.png", check=picture_damage),
    FileKind(pattern="*.png", check=picture_damage),
)
SAMPLES = FolderKind(
    place=r"samples/(?P<stage>[^/]+)",
    door=Door("sample", OF_STAGE),
    files=SAMPLE_FILES,
    signs=(MANIFEST_NAME, f"{MARKER_FOLDER}/*", ".parts/*", "*.png"),
    stranger="*.png",
)
PROMPT_SAMPLES = FolderKind(
    place=r"samples/(?P<stage>.+)-prompt",
    door=Door("sample", (*OF_STAGE, ("prompt", ANY))),
    files=SAMPLE_FILES,
    signs=SAMPLES.signs,
    stranger="*.png",
)
SCORED_SAMPLES = FolderKind(
    place=r"evaluation/samples/[^/]+",
    door=Door("eval", ANY_STAGE),
    files=SAMPLE_FILES,
    signs=SAMPLES.signs,
    stranger="*.png",
)
SEEN = FolderKind(
    place=r"evaluation/cache/[^/]+",
    door=Door("eval", ANY_STAGE),
    files=(FileKind(pattern="statistics.safetensors", check=weights_damage, mend=COPY),),
    stranger="*.parquet",
)
LISTS = FolderKind(
    place=r"evaluation/cache/lists",
    door=Door("eval", ANY_STAGE),
    files=(FileKind(pattern="*.jsonl", check=lines_damage, mend=COPY),),
    signs=("*.jsonl",),
    has_shards=False,
    has_manifest=False,
)
PROMPTS = FolderKind(
    place=r"evaluation/prompts",
    door=Door("eval", ANY_STAGE),
    files=(FileKind(pattern="*.jsonl", check=lines_damage, mend=COPY),),
    signs=("*.jsonl",),
    has_shards=False,
    has_manifest=False,
)
CURVE = FolderKind(place=r"evaluation/(?P<stage>.+)-curve", door=Door("eval", (*OF_STAGE, ("task", "curve"))))
WIN_RATES = Door("eval", (*OF_STAGE, ("task", "winrates")))
PREFERENCE = FolderKind(
    place=r"evaluation/(?P<stage>.+)-preference",
    door=Door("eval", (*OF_STAGE, ("task", "preference"))),
    files=(
        FileKind(pattern="preference.html", check=page_damage, is_required=True),
        FileKind(pattern="preference-key.json", check=json_damage, mend="restore it from a copy: votes are read by it"),
        FileKind(
            pattern="win-rates.json",
            check=json_damage,
            mend="`{command}`",
            made_by=WIN_RATES,
        ),
        FileKind(
            pattern="win-rates.md",
            check=text_damage,
            mend="`{command}`",
            made_by=WIN_RATES,
        ),
        FileKind(pattern="*.csv", check=None),  # votes, which people put here
    ),
    signs=("preference*",),
    has_shards=False,
    has_manifest=False,
)
SCORES = FolderKind(place=r"evaluation/(?P<stage>[^/]+)", door=Door("eval", OF_STAGE))
# Its entries are made under different settings, captions under others than samples, so no manifest sums them up.
JUDGE = FolderKind(
    place=r"judge",
    door=Door("judge"),
    files=(FileKind(pattern="questions.jsonl", check=lines_damage),),
    has_manifest=False,
)

WITH_IMAGES = (SAMPLES, PROMPT_SAMPLES, SCORED_SAMPLES)

# The first whose place a folder's path is, and of which it has a sign.
KINDS = (
    *(
        RUN,
        RAW,
        CAPTIONS,
        STATS,
        STATS_SAMPLE,
        COUNTS,
        FEATURES,
        COLUMNS,
        CLAIMS,
        SCORE,
        CHOICES,
        CHOOSE,
        CACHE,
        CHECKPOINT,
        TRAINING,
        APP,
    ),
    *(PROMPT_SAMPLES, SAMPLES, SCORED_SAMPLES, LISTS, SEEN, PROMPTS, CURVE, PREFERENCE, SCORES, JUDGE),
)


def match_place(kind: FolderKind, name: str) -> dict[str, str] | None:
    """Return the groups of a kind's place in a path below the run; None where it is no such place."""
    found = re.fullmatch(kind.place, name)
    return None if found is None else found.groupdict()
