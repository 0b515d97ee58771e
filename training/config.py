"""`[model]` and `[training]`: the network's shape and how each stage trains it (paper section 3.1, A.5 and Table 4)."""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic

from errors import UserError
from pipelines.recipe import DECIDES, Decides, Recipe
from pixart.processes.specs import ddpm_spec, flow_spec, noise_flow_spec
from training.codec_keys import CODEC, CodecKeys, require_reconstruction
from training.consistency import ConsistencySettings, require_distillable
from training.control_keys import ControlKeys
from training.key_owners import DDPM_TIMES, OTHER_LOSSES, OWNERS, keys_of_others, require_density, require_own_keys
from training.lora import LoraSettings
from training.matching import MatchingSettings, require_matchable
from training.mixture import DatasetConfig, require_roles
from training.optimizer_keys import OptimizerKeys
from training.preview_keys import PreviewKeys
from training.process_keys import ProcessKeys

SCRATCH = "scratch"
ObjectiveName = Literal[
    "denoise", "prior_preservation", "realign", "consistency", "distribution_matching", "reconstruct"
]
KeepActivations = Literal["all", "products", "inputs"]
Value = TypeVar("Value")
STEERS = "steers what comes"
# The type of a setting that a resume may change, unlike one that `Decides`, but that changes what comes: it is said.
Steers = Annotated[Value, STEERS]


class StageTraining(CodecKeys, ControlKeys, PreviewKeys, ProcessKeys, OptimizerKeys):
    """Every setting of one stage: `[training]` with `[training.<stage>]` laid over it."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "init_from": "starts_from",
        "checkpoint_activations": "keep_activations (true: 'inputs', false: 'all')",
    }

    network: Decides[Literal["dit", "pixart", "vae"]] = pydantic.Field(
        description="What is trained: dit reads class labels, pixart reads text, vae (AutoencoderKL) crops of images. "
        "In a recipe from before it had to be said, a stage that named no start took the one before: "
        "starts_from = 'stage1' in stage 2"
    )
    objective: Decides[ObjectiveName] = pydantic.Field(
        default="denoise",
        description="What is minimised: the process' loss (denoise); a subject's images and, with prior_weight, those "
        "that the model drew before, or networks.teacher's answer to them (prior_preservation); for another VAE also "
        "how far tokens are from those of networks.teacher, which sees former_latents (realign); that few steps "
        "are enough: the answers to two neighbouring times on the way of networks.teacher are one (consistency, LCM); "
        "or that images of one or two steps are as likely as networks.teacher's (distribution_matching, DMD); of a vae "
        "how far what it decodes is from the image (reconstruct)",
    )
    prior_weight: Decides[float] = pydantic.Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Of prior_preservation: weight of the mean loss of datasets with role 'prior' against the others'",
    )
    process: Decides[Literal["ddpm", "flow"]] = pydantic.Field(
        default="ddpm",
        description="What noise does and the network predicts: ddpm (noise and learned variance, the paper's) or flow "
        "(rectified flow: velocity, or see flow_prediction). Weights that predict something else begin their output "
        "layer anew",
    )
    trains: Decides[Literal["all", "lora", "control"] | Annotated[list[str], pydantic.Field(min_length=1)]] = (
        pydantic.Field(
            default="all",
            description="Weights that train: 'all', 'lora' (adapters beside them, see lora), 'control' (a branch that "
            "an image leads, see control_copies), or shell patterns of their names, as blocks.*.cross_attention.*",
        )
    )
    lora: Decides[LoraSettings] = pydantic.Field(
        default=LoraSettings(), description="The adapters that train where trains = 'lora'"
    )
    consistency: Decides[ConsistencySettings] = pydantic.Field(
        default=ConsistencySettings(), description="What objective = 'consistency' distils a teacher to"
    )
    matching: Decides[MatchingSettings] = pydantic.Field(
        default=MatchingSettings(), description="What objective = 'distribution_matching' brings a student to"
    )
    networks: dict[str, str] = pydantic.Field(
        default={},
        description="Weights of networks that the objective needs and does not train, such as a teacher, by its names "
        "for them; each as starts_from names weights",
    )
    features: str | None = pydantic.Field(
        default=None, description="Named table of [features] that says what is read; null = the one of the same name"
    )
    starts_from: str | None = pydantic.Field(
        default=None,
        description="Weights to start from: a stage of this recipe (its EMA weights), {run}/training/<stage>, a "
        "checkpoint, a diffusers folder or hub id, an original .pth or .pt, or 'scratch'; null = scratch. Resuming is "
        "automatic",
    )
    departs_in: list[Literal["text_encoder", "max_tokens", "cleaning", "vae", "positions"]] = pydantic.Field(
        default=[],
        description="What features and recipe have otherwise, on purpose, than the weights it starts from were trained "
        "with, or than they are taken to be where you know better; all else that differs is refused",
    )
    former_latents: Decides[str | None] = pydantic.Field(
        default=None,
        description="With departs_in = ['vae'], a folder of latents that the weights' own VAE made of pictures which "
        "the stage reads, as runs/weak/features/latent-256: both outer layers are fitted to them; null = not",
    )
    datasets: list[DatasetConfig] = pydantic.Field(
        default=[DatasetConfig()],
        min_length=1,
        description="What is read, mixed by weight; by default the features of this run that `features` names",
    )
    timestep_shift: Decides[Literal[0, 1] | None] = pydantic.Field(
        default=None,
        description="Of a DiT in diffusers' layout that starts_from names: 0 for official weights that were converted, "
        "such as facebook/DiT-XL-2-256; null = what its config says, else 1 as in diffusers",
    )
    num_steps: Steers[int] = pydantic.Field(default=1000, ge=1, description="Optimizer steps of the stage")
    global_batch_size: Decides[int] = pydantic.Field(
        default=64, ge=1, le=2**20, description="Samples of one step, over all ranks and micro-batches"
    )
    gradient_accumulation_steps: Steers[Literal["auto"] | Annotated[int, pydantic.Field(ge=1)]] = pydantic.Field(
        default="auto",
        description="Micro-batches whose gradients make one step; auto = as few as fit, chosen once and kept",
    )
    num_processes: int = pydantic.Field(
        default=0,
        ge=0,
        description="Ranks on this machine; 0 = one per GPU, without a GPU two on two cores. "
        "Tasks of Slurm are a rank each, and slots of training.hostfile, whatever stands here",
    )
    hostfile: str | None = pydantic.Field(
        default=None, min_length=1, description="File of lines `host slots=8`: train on these hosts; null = here alone"
    )
    remote_shell: str = pydantic.Field(
        default="ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3",
        min_length=1,
        description="Command that runs a command line on a host of training.hostfile; ends when the host is gone",
    )
    threads_per_process: int = pydantic.Field(
        default=0, ge=0, description="OMP_NUM_THREADS of a rank; 0 = the machine's cores divided by the ranks"
    )
    zero_stage: Decides[Literal[0, 1, 2, 3]] = pydantic.Field(
        default=0, description="What DeepSpeed shards: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights"
    )
    dtype: Decides[Literal["bf16", "fp32"]] = pydantic.Field(
        default="bf16", description="Compute precision; master weights, optimizer and EMA are fp32 either way"
    )
    products: Steers[Literal["dtype", "fp8"]] = pydantic.Field(
        default="dtype",
        description="What blocks multiply matrices of image tokens in: as dtype says, or in 8-bit floats, scaled anew "
        "in each product; weights stay as they are. fp8 needs bf16 and Ada or Hopper; a CPU emulates it, slowly",
    )
    keep_activations: Literal["auto"] | KeepActivations = pydantic.Field(
        default="auto",
        description="What blocks keep for the backward pass: 'all'; 'products' of matrices and attention alone, which "
        "takes little time and 0.6 of the memory; 'inputs' of blocks, which takes a third more time and least memory; "
        "auto = as much as leaves room for micro-batches of a good size",
    )
    compile: Steers[Literal["auto"] | bool] = pydantic.Field(
        default="auto",
        description="Compile each block with torch.compile: faster steps after a slow start; not ZeRO 3. "
        "'auto' = with CUDA and a C++ compiler",
    )
    offload: Steers[Literal["nothing", "average", "optimizer"]] = pydantic.Field(
        default="nothing",
        description="What a GPU leaves in the machine's memory: the average (EMA); or the optimizer with masters and "
        "average, which then steps on the CPU, for one rank in bf16 under ZeRO 0",
    )
    device_gigabytes: float | None = pydantic.Field(
        default=None,
        gt=0,
        description="GB of a card: a rank takes no more, and a plan without a GPU is for it; null = what is free",
    )
    caption_dropout: Decides[float] = pydantic.Field(
        default=0.1, ge=0, le=1, description="Part of the captions (of a DiT: labels) replaced by the null one"
    )
    interpolation_scale: Decides[float | None] = pydantic.Field(
        default=None,
        gt=0,
        description="Position scale: base resolution relative to the one positions were learnt at; null = that of the "
        "weights it starts from, times the ratio of the resolutions (from scratch 1)",
    )
    kv_compressed_blocks: Decides[list[Annotated[int, pydantic.Field(ge=0)]] | None] = pydantic.Field(
        default=None,
        description="Of a PixArt: numbers of the blocks whose image tokens attend to one key and value of 2 x 2 tokens "
        "(PixArt-Sigma: 14 to 27 of 28); blocks that did not yet begin with averages. null = as the start has it",
    )
    seed: Decides[int] = pydantic.Field(
        default=0, ge=0, lt=2**63, description="Decides data order, noise and fresh weights"
    )
    shards_per_block: Decides[int] = pydantic.Field(
        default=16, ge=1, description="Shards among whose samples are shuffled; more mix better, keep more files open"
    )
    validation_shards: Decides[list[str]] = pydantic.Field(
        default=[], description="Shell patterns of shard names that are kept out of training, for the validation loss"
    )
    validate_every: int = pydantic.Field(default=1000, ge=1, description="Steps between validations")
    num_validation_samples: Steers[int] = pydantic.Field(
        default=2048, ge=1, description="Samples of a validation at most, rounded down to whole global batches"
    )
    wandb_project: str | None = pydantic.Field(
        default=None,
        min_length=1,
        description="Project of Weights & Biases that gets metrics and previews, too; its own variables, such as "
        "WANDB_MODE=offline, count. null = none",
    )
    prefetch_batches: int = pydantic.Field(default=2, ge=1, description="Micro-batches a rank reads ahead")
    check_payloads: bool = pydantic.Field(
        default=False, description="Compare the CRC-32 of every payload read with the index; reading is then slower"
    )
    cache_dir: str = pydantic.Field(
        default="{run}/training/cache",
        description="Folder for copies of remote features, one for all ranks of a host; best on a local disk",
    )
    cache_gigabytes: float = pydantic.Field(
        default=100.0, gt=0, allow_inf_nan=False, description="Most disk space that copies of remote features may take"
    )
    log_every: int = pydantic.Field(default=10, ge=1, description="Steps between lines of metrics.jsonl")
    checkpoint_every: int = pydantic.Field(default=1000, ge=1, description="Steps between checkpoints")
    keep_checkpoints: int = pydantic.Field(default=2, ge=1, description="Newest checkpoints that are kept")
    max_skipped_steps: int = pydantic.Field(
        default=10, ge=1, description="Updates in a row that may be skipped for non-finite gradients before giving up"
    )
    device_peak_teraflops: float | None = pydantic.Field(
        default=None,
        gt=0,
        description="Dense bf16 peak of a device, of which MFU is a share; null = its data sheet's, where we know it",
    )
    dollars_per_device_hour: float = pydantic.Field(
        default=1.6, ge=0, description="Price of a device hour; 1.6 = the paper's 26,000 USD for 675 A100 days"
    )
    watts_per_device: float = pydantic.Field(
        default=400.0, ge=0, description="Power of a device, for the CO2 estimate; 400 = TDP of an A100 SXM"
    )
    co2_kilograms_per_kilowatt_hour: float = pydantic.Field(
        default=0.48, ge=0, description="Carbon intensity of the electricity; 0.48 = world average of 2023 (Ember)"
    )

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what `TableConfig` says, less keys that say nothing of this stage: all of a recipe may share them."""
        others = keys_of_others(self.owners) | (set() if self.has_adapters else {"lora"})
        others |= set() if self.ddpm_times_density else set(DDPM_TIMES)
        others |= set() if self.has_control else ControlKeys.model_fields.keys()
        others |= set() if self.network == CODEC else CodecKeys.model_fields.keys()
        return {name: value for name, value in super().fingerprint_fields().items() if name not in others}

    @classmethod
    def fingerprint_defaults(cls, decides: str = DECIDES) -> dict[str, Any]:
        """Return what `TableConfig` says; a scale of positions, which is settled before it counts, is 1 as it was."""
        return super().fingerprint_defaults(decides) | {"interpolation_scale": 1.0}

    @property
    def owners(self) -> dict[str, str]:
        """What the stage has of each kind that owns keys."""
        return {owner: getattr(self, owner) for owner in OWNERS}

    @property
    def position_scale(self) -> float:
        """The scale of positions, once it is settled what the recipe leaves to the weights."""
        assert self.interpolation_scale is not None, "open_stage settles it"
        return self.interpolation_scale

    @property
    def has_adapters(self) -> bool:
        """Whether what trains are adapters."""
        return self.trains == "lora"

    @property
    def has_control(self) -> bool:
        """Whether what trains is a control branch."""
        return self.trains == "control"

    @property
    def keeps_averages(self) -> bool:
        """Whether averages are kept on the way: of whole networks that draw, which alone are made into others."""
        return self.ema == "power" and self.network != CODEC and not self.keeps_base

    @property
    def keeps_base(self) -> bool:
        """Whether what trains stands beside the network's own weights, which a checkpoint then does not hold."""
        return self.has_adapters or self.has_control

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a rank in a step; one as long as nobody has chosen."""
        return 1 if self.gradient_accumulation_steps == "auto" else self.gradient_accumulation_steps

    @property
    def kept_activations(self) -> KeepActivations:
        """What blocks keep; all as long as nobody has chosen."""
        return "all" if self.keep_activations == "auto" else self.keep_activations

    @property
    def steering(self) -> dict[str, Any]:
        """The settings of `Steers` by name; `trainer.json` keeps them, so that a resume can say what has changed."""
        return {name: getattr(self, name) for name in self.noted_fields(STEERS)}

    @property
    def process_spec(self) -> dict[str, Any]:
        """The process as it stands in `trainer.json`."""
        student = None
        if self.objective == "consistency":
            student = self.consistency.student(self.process)
        elif self.objective == "distribution_matching":
            student = self.matching.student
        if self.process == "flow" and self.flow_prediction == "noise":
            return noise_flow_spec(
                shift=self.flow_shift, logit_mean=self.flow_logit_mean, logit_std=self.flow_logit_std
            )
        if self.process == "flow":
            return flow_spec(
                shift=self.flow_shift,
                logit_mean=self.flow_logit_mean,
                logit_std=self.flow_logit_std,
                student=student,
            )
        if self.objective in OTHER_LOSSES:  # with times of their own
            return ddpm_spec(student=student)
        return ddpm_spec(min_snr_gamma=self.min_snr_gamma, times_density=self.ddpm_times_density)

    @property
    def critic_learning_rate(self) -> float:
        """The peak rate of the critic that trains beside the network, where one does."""
        own = self.reconstruction.discriminator_learning_rate or self.learning_rate
        return own if self.network == CODEC else self.matching.critic_learning_rate

    @property
    def is_told_guidance(self) -> bool:
        """Whether the network that trains is told the guidance that its output is to have."""
        return self.objective == "consistency" and self.consistency.has_range


def stage_training(recipe: Recipe, stage: str) -> StageTraining:
    """Return the settings of `stage`.

    Raises:
        UserError: there is no such stage, or a key of `[training]` or of any stage is unknown or wrong, or one of the
            stage's own table is of another process or network; names it.
    """
    if stage in StageTraining.model_fields:
        raise UserError(f"{recipe.path}: no stage can be called {stage}, which is a key of [training]: rename it")
    settings = recipe.named("training", stage, model=StageTraining)
    key = f"{recipe.path}: training.{stage}"
    require_own_keys(recipe.tables["training"][stage], settings.owners, key=key)
    require_density(recipe.tables["training"][stage], logit_std=settings.ddpm_logit_std, key=key)
    if settings.objective == "consistency":
        require_distillable(
            settings.consistency,
            network=settings.network,
            process=settings.process_spec,
            trains=settings.trains,
            key=key,
        )
    if settings.objective == "distribution_matching":
        require_matchable(
            settings.matching,
            network=settings.network,
            process=settings.process,
            trains=settings.trains,
            optimizer=settings.optimizer,
            key=key,
        )
    require_reconstruction(
        settings.reconstruction,
        network=settings.network,
        objective=settings.objective,
        trains=settings.trains,
        optimizer=settings.optimizer,
        products=settings.products,
        networks=settings.networks,
        typed=recipe.tables["training"][stage].get("reconstruction", {}),
        key=key,
    )
    require_roles(settings.datasets, settings.objective, key=key)
    if settings.network == "dit":  # what [training] says is for the stages that can do it
        settings = settings.model_copy(update={"kv_compressed_blocks": None})
    if settings.former_latents is not None and "vae" not in settings.departs_in:
        raise UserError(
            f"{recipe.path}: training.{stage}.former_latents = {settings.former_latents!r} is for another VAE than the "
            "weights were trained with: say departs_in = ['vae'], or leave it out"
        )
    return settings


def stage_names(recipe: Recipe) -> list[str]:
    """Return the stages of a recipe, in order."""
    return recipe.names("training", keys=StageTraining.model_fields)


def random_stream(stage: str) -> int:
    """Return the number that tells the random numbers of a stage from those of others with the same seed.

    It is N of `stageN` and `stageN-<phase>`, and a hash of any other name.
    """
    paper = re.fullmatch(r"stage(\d{1,3})(-.+)?", stage)
    return int(paper[1]) if paper else int.from_bytes(hashlib.sha256(stage.encode()).digest()[:8]) >> 1
