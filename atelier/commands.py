"""What can be typed: each sub-command with its room and its flags, and what a flag means to the room.

`make` has a target for each sub-command and a variable for each flag: `--from-scratch` is FROM_SCRATCH. This file needs
nothing but Python, as `make` reads it before there is an environment.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of sub-commands.

    Attributes:
        meaning: one line for `--help`.
        value: what its value is called there; none for a switch.
        gives: `option` and `switch` are the room's own under the same name, a `word` stands in front of all options;
            `toml`, `text` and `on` lay the value, the text as it is, or true over a key of the recipe.
        key: that key; of `on` with the value, `table.key=true`.
    """

    meaning: str
    value: str = ""
    gives: Literal["option", "switch", "word", "toml", "text", "on"]
    key: str = ""

    @property
    def is_switch(self) -> bool:
        """Whether it stands alone, and its variable is on unless it is empty or 0."""
        return self.gives in ("switch", "on")


def _text(key: str, value: str, meaning: str) -> Flag:
    return Flag(gives="text", key=key, value=value, meaning=meaning)


def _toml(key: str, value: str, meaning: str) -> Flag:
    return Flag(gives="toml", key=key, value=value, meaning=meaning)


FLAGS = {
    "recipe": Flag(
        gives="option",
        value="FILE",
        meaning="TOML recipe, a file or the name of one that is shipped; a run remembers it",
    ),
    "run": Flag(gives="option", value="FOLDER", meaning="folder of the run; each room writes one sub-folder of it"),
    "stage": Flag(
        gives="option", value="NAME", meaning="a named table of the recipe, 2 is short for stage2; else its only one"
    ),
    "phase": Flag(gives="option", value="N", meaning="512 with --stage 3 is short for --stage stage3-512"),
    "set": Flag(
        gives="option",
        value="KEY=VALUE",
        meaning="lay a value over a key of the recipe, any number of times; a run remembers it",
    ),
    "plan": Flag(gives="switch", meaning="print what would be done, with sizes, and stop"),
    "shards": _text("data.shards", "PATHS", "raw shards: a path, a glob, a {range} or a URL; a run remembers them"),
    "retry": Flag(gives="on", key="captioning.retry_rejects=true", meaning="caption again what was rejected"),
    "passes": _text("captioning.only", "NAMES", "make these alone, with commas: caption, or passes of captions"),
    "sets": _text("dataset_stats.sets", "SETS", "sets of captions to compare: name=files#column,…"),
    "sample": _toml("dataset_stats.sample", "N", "estimate from so many captions of each set"),
    "gpus": _toml("training.num_processes", "N", "processes of this machine, one a GPU"),
    "hostfile": _text("training.hostfile", "FILE", "hosts to train on, one a line"),
    "remote-shell": _text("training.remote_shell", "COMMAND", "how to reach them, such as 'ssh -p 2222'"),
    "from-scratch": Flag(
        gives="on",
        key="training.{stage}.starts_from=scratch",
        meaning="start from fresh weights, whatever the recipe says",
    ),
    "prompt": _text("sampling.prompt", "TEXT", "what to draw"),
    "prompts": _text("sampling.prompts", "FILE", "a file of prompts"),
    "n": _toml("sampling.images_per_prompt", "N", "images of each prompt"),
    "steps": _toml("sampling.num_steps", "N", "steps of the solver"),
    "cfg": _toml("sampling.guidance_scale", "SCALE", "scale of classifier-free guidance"),
    "seed": _toml("sampling.seed", "N", "seed of the noise"),
    "size": _text("sampling.size", "WxH", "width x height in pixels"),
    "lora": _text("sampling.lora", "FILES", "adapters to add: files, folders or stages, with commas between them"),
    "weights": _text("sampling.lora_weights", "NUMBERS", "how much of each, with commas between them; 1 unless typed"),
    "control": _text("sampling.control", "IMAGE", "an image that leads what is drawn, through a control branch"),
    "photo": Flag(gives="on", key="sampling.control_is=photo", meaning="it is a photo, of which a map is drawn first"),
    "control-kind": _text(
        "sampling.control_kind", "KIND", "map of a photo: canny, hed or depth, where the branch says none"
    ),
    "strength": _toml("sampling.control_strength", "NUMBER", "how much it leads, 0 to 2; 1 unless typed"),
    "branch": _text("sampling.control_branch", "BRANCH", "a control branch for weights without: file, folder or stage"),
    "styles": _text("sampling.styles", "STYLES", "what {style} in the prompts stands for, with commas, or a .txt file"),
    "task": Flag(gives="word", value="TASK", meaning="score (unless typed), curve, questions, preference or winrates"),
    "reference": _text("evaluation.reference", "IMAGES", "images to compare with"),
    "clip": _text("evaluation.clip", "MODEL", "CLIP model, a folder or an id of the hub"),
    "inception": _text("evaluation.inception", "FILE", "weights of Inception"),
    "table": Flag(gives="word", value="TABLE", meaning="a table of the recipe, or several; all unless typed"),
    "port": _toml("app.port", "N", "port of this machine that the page is served at"),
    "from": Flag(gives="word", value="WEIGHTS", meaning="published weights: folder, file or id of the hub"),
    "to": Flag(gives="word", value="FOLDER", meaning="what to write"),
    "reparameterize": Flag(gives="switch", meaning="turn a class-conditional DiT into a PixArt"),
    "ema": Flag(
        gives="option", value="LENGTH", meaning="average of this relative length, of a stage with ema = 'power'"
    ),
    "pipeline": Flag(gives="switch", meaning="write a whole pipeline of diffusers, text encoder and VAE included"),
}
# Of one sub-command alone, in the place of the flag of that name.
SHARDS_TO_PACK = Flag(gives="word", value="PATHS", meaning="folders of images, Parquet, tables or tars")
SHARDS_TO_LOOK_AT = Flag(gives="option", value="PATHS", meaning=FLAGS["shards"].meaning)
RECIPE_TO_WRITE = Flag(gives="option", value="FILE", meaning="what to write; RUN/recipe.toml unless typed")
SAMPLES_PER_TAR = Flag(gives="option", value="N", meaning="samples of each tar")
ADAPTERS_TO_MERGE = Flag(gives="option", value="FILES", meaning=FLAGS["lora"].meaning)
WEIGHTS_TO_MERGE = Flag(gives="option", value="NUMBERS", meaning=FLAGS["weights"].meaning)
GUIDANCE_TO_FOLD = Flag(gives="option", value="SCALE", meaning="guidance to fold into weights distilled to few steps")
TABLE_TO_CHOOSE_FOR = Flag(
    gives="option",
    value="NAME",
    meaning="a table of [features], or the stage that reads it; all that choose unless typed",
)
PLAN_OF_CHOICE = Flag(
    gives="switch", meaning="write a page of what would be kept and lost, RUN/choose/NAME.html, and stop"
)
SEED_OF_SAMPLE = _toml("dataset_stats.seed", "N", "seed of the sample")


@dataclass(frozen=True, kw_only=True)
class Subcommand:
    """One door: the module that it runs, and what can be typed behind it.

    Attributes:
        module: run as `python -m` would.
        words: what the module is given in front of all else.
        flags: names in `FLAGS`.
        required: those that must be typed, with what to type, for example.
        defaults: of words that are not typed.
        changed: flags that mean something else here.
        passes_on: whether the module has further options of its own, which are typed behind its name as they are.
    """

    module: str
    summary: str
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    required: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, str], ...] = ()
    changed: tuple[tuple[str, Flag], ...] = ()
    passes_on: bool = False

    def flag(self, name: str) -> Flag:
        """Return one of its flags."""
        return dict(self.changed).get(name) or FLAGS[name]


_RUN = ("recipe", "run", "set", "plan")
_STAGE = (*_RUN, "stage", "phase")
_LED = ("control", "photo", "control-kind", "strength", "branch")
_SAMPLE = ("prompt", "prompts", "n", "steps", "cfg", "seed", "size", "lora", "weights", "styles", *_LED)
_DEFAULTS = (("run", "runs/default"),)

SUBCOMMANDS = {
    "caption": Subcommand(
        module="captioning",
        summary="Raw shards -> captions (SHARDS='/data/sa_{000000..000999}.tar')",
        flags=(*_RUN, "shards", "retry", "passes"),
        defaults=_DEFAULTS,
    ),
    "claims": Subcommand(
        module="captioning.claims",
        summary="Captions -> what they claim, asked back of the model: unsupported sentences are marked",
        flags=(*_RUN, "shards"),
        defaults=_DEFAULTS,
    ),
    "columns": Subcommand(
        module="curation",
        summary="Raw shards and captions -> columns about each sample, to choose by: sizes, scores, duplicates",
        flags=(*_RUN, "shards"),
        defaults=_DEFAULTS,
    ),
    "choose": Subcommand(
        module="curation.choose",
        summary="Columns -> which samples are trained on, or a page of what that would lose (PLAN=1 STAGE=2)",
        flags=(*_STAGE, "shards"),
        defaults=_DEFAULTS,
        changed=(("stage", TABLE_TO_CHOOSE_FOR), ("plan", PLAN_OF_CHOICE)),
    ),
    "stats": Subcommand(
        module="dataset_stats",
        summary="Captions -> noun statistics and report.html (SETS='name=files#column,…' SAMPLE=10000 SEED=0)",
        flags=(*_RUN, "shards", "sets", "sample", "seed"),
        defaults=_DEFAULTS,
        changed=(("seed", SEED_OF_SAMPLE),),
    ),
    "features": Subcommand(
        module="features",
        summary="Captions and images -> T5 and VAE features (STAGE=2)",
        flags=(*_STAGE, "shards"),
        defaults=_DEFAULTS,
    ),
    "buckets": Subcommand(
        module="features.buckets",
        summary="Images per aspect bucket, crop, upscaling and rejects, from headers alone (STAGE=3)",
        flags=(*_STAGE, "shards"),
        defaults=_DEFAULTS,
    ),
    "init": Subcommand(
        module="atelier.init",
        summary="A short recipe for the data at hand, RUN/recipe.toml, which the run remembers (SHARDS=photos/)",
        flags=("shards", "run", "to"),
        required=(("run", "runs/photos"),),
        changed=(("shards", SHARDS_TO_LOOK_AT), ("to", RECIPE_TO_WRITE)),
        passes_on=True,
    ),
    "recipe": Subcommand(
        module="atelier.keys",
        summary="Every key of a recipe: its default, its meaning, and which command reads it (TABLE=training)",
        flags=("table",),
        passes_on=True,
    ),
    "pack": Subcommand(
        module="pipelines.raw.pack",
        summary="Raw shards of any kind -> tars as img2dataset writes them (SHARDS=photos/ TO=shards/ N=1000)",
        flags=("shards", "to", "n"),
        required=(("shards", "photos/"), ("to", "shards/")),
        changed=(("shards", SHARDS_TO_PACK), ("n", SAMPLES_PER_TAR)),
        passes_on=True,
    ),
    "verify": Subcommand(
        module="pipelines.store.verify",
        summary="Read every file of a run to its end, say what is damaged and what to do about it",
        flags=("run",),
        defaults=(("run", "runs/default"),),
    ),
    "train": Subcommand(
        module="training",
        summary="Features -> checkpoints (STAGE=2 GPUS=8, or HOSTFILE=hosts)",
        flags=(*_STAGE, "shards", "gpus", "hostfile", "remote-shell", "from-scratch"),
        defaults=_DEFAULTS,
    ),
    "convert": Subcommand(
        module="training.convert",
        summary="Weights to diffusers (FROM=… TO=folder) or their own code (TO=x.pth); REPARAMETERIZE=1 makes a PixArt",
        flags=("from", "to", "reparameterize", "pipeline", "lora", "weights", "cfg", "ema"),
        required=(("from", "facebook/DiT-XL-2-256"), ("to", "dit")),
        changed=(("lora", ADAPTERS_TO_MERGE), ("weights", WEIGHTS_TO_MERGE), ("cfg", GUIDANCE_TO_FOLD)),
        passes_on=True,
    ),
    "sample": Subcommand(
        module="sampling",
        summary="Checkpoint and prompts -> images (STAGE=2 PROMPT='…')",
        flags=(*_STAGE, *_SAMPLE),
        defaults=_DEFAULTS,
    ),
    "eval": Subcommand(
        module="sampling.evaluation",
        summary="Scores, each with its inputs (STAGE=2 TASK=score|curve|questions|preference|winrates)",
        flags=("task", *_STAGE, *_SAMPLE[1:], "reference", "clip", "inception"),
        defaults=(("task", "score"), *_DEFAULTS),
    ),
    "app": Subcommand(
        module="sampling.app",
        summary="A local page to draw from a checkpoint (STAGE=2 PORT=7860)",
        flags=(*_STAGE, *_SAMPLE, "port"),
        defaults=_DEFAULTS,
    ),
    "world": Subcommand(
        module="toyworld",
        words=("world",),
        summary="Write the toy world's raw shards, their truth and the prompts",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "judge": Subcommand(
        module="toyworld",
        words=("judge",),
        summary="Score captions and samples against the toy world's truth",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "subject": Subcommand(
        module="toyworld",
        words=("subject",),
        summary="Write images of a subject that the toy world does not have, and prompts, for DreamBooth",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "detect": Subcommand(
        module="toyworld",
        words=("detect",),
        summary="Score how well that subject was learnt, and what was lost by it",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "edges": Subcommand(
        module="toyworld",
        words=("edges",),
        summary="Write images of the toy world, and edges of others with prompts of colours, for a control branch",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "follow": Subcommand(
        module="toyworld",
        words=("follow",),
        summary="Score how those edges are followed, and the prompts",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "spoil": Subcommand(
        module="toyworld",
        words=("spoil",),
        summary="Write images of the toy world with captions, some of them spoilt in known ways, to try a choice on",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "vote": Subcommand(
        module="toyworld",
        words=("vote",),
        summary="Fill the run's preference pages with the judge's votes",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "paper-page": Subcommand(
        module="toyworld",
        words=("paper-page",),
        summary="Write the page of the paper's claims, from what `make paper` has finished of its parts",
        flags=_RUN,
        defaults=(("run", "runs/paper"),),
    ),
    "report": Subcommand(
        module="toyworld",
        words=("report",),
        summary="Write the run's index.html",
        flags=_RUN,
        defaults=_DEFAULTS,
    ),
    "nltk-data": Subcommand(
        module="dataset_stats.tagging.nltk_data",
        summary="Fetch NLTK's tagger once, checksummed",
        passes_on=True,
    ),
}
