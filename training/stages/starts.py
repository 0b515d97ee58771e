"""The weights a stage starts from (paper section 2.2 and 2.3), or goes on with."""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from errors import UserError
from pipelines.as_typed import ANY, typed_command
from pipelines.engine.progress import get_logger
from pipelines.store.checkpoints import CONTROL
from pipelines.store.files import sha256_file
from pixart.adapter_files import find_adapter_file, read_adapter
from pixart.adapters import at_positions, merge, require_fit
from pixart.branching import add_branch
from pixart.control_files import read_branch
from pixart.convert import infer_config, load_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.guidance_condition import fold_guidance, with_guidance_condition
from pixart.layers import PatchEmbed, TokenCompression, xavier_
from pixart.layouts import load_weights, original_layout
from pixart.model import PixArt, PixArtConfig
from pixart.processes.specs import USUAL_GUIDANCE, clamped_guidance, student_of
from pixart.reparameterize import reparameterize
from pixart.tensor_files import read_weight_file
from training.config import StageTraining
from training.data.former import channels_of
from training.loop.zero import compute_dtype
from training.objectives.objective import Average, Frozen, Role, Trained
from training.stages.branches import warn_of_others
from training.stages.critics import add_critic
from training.stages.frozen import require_alike, require_own_process
from training.stages.networks import blank_network
from training.stages.other_vae import bridged, stage_bridge
from training.stages.shared_weights import SharedWeights
from training.stages.stage import StartingPoint, TrainingJob
from training.stages.trainable import trainable_of

log = get_logger("training")


def log_once(line: str) -> None:
    """Log a line on one rank of many."""
    if os.environ.get("RANK", "0") == "0":
        log.info(line)


def objective_networks(job: TrainingJob, roles: Mapping[str, Role], trained: DiT | PixArt) -> dict[str, DiT | PixArt]:
    """Return the networks of an objective by name, with the weights they start with, fp32 on the CPU.

    Args:
        job: says which weights of `trained` train, and where those of frozen networks are.
        roles: of the objective.
        trained: the network that the stage trains.

    Raises:
        UserError: weights of a network are not named or do not fit, or are named and not needed; names the recipe key.
    """
    key = f"{job.command.recipe.path}: training.{job.command.stage_name}"
    wanted = {name for name, role in roles.items() if isinstance(role, Frozen)}
    for name in sorted(wanted - job.networks.keys()):
        raise UserError(f"{key}.networks names no weights for {name!r}, a network that the objective needs")
    for name in sorted(job.networks.keys() - wanted):
        has = f"has {', '.join(sorted(wanted))} alone" if wanted else "has none"
        raise UserError(f"{key}.networks names {name!r}, but of frozen networks the objective {has}")
    settings = job.settings
    trainable = trainable_of(settings)
    trainable.prepare(trained, seed=settings.seed, dtype=compute_dtype(settings), key=f"{key}.trains")
    if job.begins_output_anew and not trained.final.weight.requires_grad:
        raise UserError(f"{key}.trains leaves out final.*, the output layer, which begins anew at zero: add it")
    shared = SharedWeights(trained, is_partitioned=settings.zero_stage == 3)
    networks = {}
    for name, role in roles.items():
        match role:
            case Trained():
                networks[name] = trained
            case Frozen():
                networks[name] = shared.within(_frozen_network(job, name, trained))
            case Average():
                networks[name] = shared.average_of(trained)
    for role in roles.values():
        if isinstance(role, Trained) and role.critic is not None:
            add_critic(trained, networks[role.critic])
    return networks


def _frozen_network(job: TrainingJob, name: str, trained: DiT | PixArt) -> DiT | PixArt:
    start = job.networks[name]
    assert start.path is not None, "only a stage starts from nothing"
    key = f"{job.command.recipe.path}: training.{job.command.stage_name}.networks.{name} ({start.path})"
    require_own_process(start.process, job.settings, key=key)
    network = with_adapters(
        load_network(start.path, None, sample_size=trained.config.sample_size, key=key), start, key=key
    )
    former = job.features.former
    require_alike(
        network, trained, in_channels=trained.config.in_channels if former is None else channels_of(former), key=key
    )
    return network.float().requires_grad_(False)


def starting_network(job: TrainingJob, config: DiTConfig | PixArtConfig) -> DiT | PixArt:
    """Return the stage's network with the weights it starts from, fp32 on the CPU, the same on every rank.

    A DiT starts from a DiT, a PixArt from a PixArt or from a DiT that it re-parameterises; a stage that has begun, from
    its checkpoint.

    Weights that were trained to predict something else keep their blocks, and begin their output layer anew; those of
    a VAE with other channels, which `departs_in` must name, their patch embedding, too.

    Raises:
        UserError: the weights are of another kind, shape or resolution; names the recipe key.
    """
    torch.manual_seed(job.settings.seed)
    if job.resume is not None and not job.settings.keeps_base:
        return _saved_network(job.resume.weights, config)
    if job.start.path is None:
        return config.network()
    key = f"{job.command.recipe.path}: training.{job.command.stage_name}.starts_from ({job.start.path})"
    former = load_network(job.start.path, job.settings.timestep_shift, sample_size=config.sample_size, key=key)
    former = with_adapters(former.float(), job.start, key=key)
    if job.settings.keeps_base:
        _require_all_layers(former, config, job.settings, key=key)
    if former.config.in_channels != config.in_channels or job.settings.former_latents is not None:
        former = _with_other_latents(job, former, config, key=key)
    elif job.begins_output_anew or former.config.out_channels != config.out_channels:
        if not job.begins_output_anew and os.environ.get("RANK", "0") == "0":  # else it is said beside the process
            log.warning(f"{key} gives {former.config.out_channels} channels: the output layer begins anew")
        former = with_fresh_output(former, config.out_channels)
    if former.kind == "dit" and config.kind == "pixart":
        return reparameterize(former, config)
    if former.kind != config.kind:
        raise UserError(f"{key} is a PixArt, but training.{job.command.stage_name}.network is 'dit'")
    if isinstance(former, PixArt):
        former = with_compression(former, job.settings.kv_compressed_blocks, key=key)
        former = with_guidance(job, former, key=key)
    config = _inherit(config, former.config)
    # Only the positions change between resolutions, and they are computed.
    positions = {name: getattr(config, name) for name in config.position_fields}
    _require_same_config(config, dataclasses.replace(former.config, **positions), key=key)
    network = blank_network(config)
    network.load_state_dict(former.state_dict(), assign=True)
    if job.settings.has_control:
        assert isinstance(network, PixArt), "a branch of a DiT is refused where the stage is opened"
        _add_branch(job, network)
    return network


def _add_branch(job: TrainingJob, network: PixArt) -> None:
    """Put the control branch beside a network: copies of its blocks, or the branch that the recipe goes on from."""
    key = f"{job.command.recipe.path}: training.{job.command.stage_name}"
    num_copies, path = job.settings.control_copies, job.control
    if path is None:
        add_branch(network, num_copies, key=f"{key}.control_copies")
        return
    try:
        stored = read_branch(path, network.config)
    except UserError as error:
        raise UserError(f"{key}.control_starts_from: {error}") from None
    if stored.num_copies != num_copies:
        raise UserError(
            f"{key}.control_copies = {num_copies}, but the branch of control_starts_from ({path}) has "
            f"{stored.num_copies} copies"
        )
    if job.resume is None:
        assert job.start.path is not None and job.features.control is not None, "a stage of a branch has both"
        start, process, maps = job.start, job.settings.process_spec, job.features.control.fact(CONTROL)
        known, base = stored.belongs_to, job.start.path
        warn_of_others(path, known, base=base, adapters=start.adapters, process=process, maps=maps)
    stored.attach(network)
    network.float()


def with_compression(network: PixArt, blocks: Sequence[int] | None, *, key: str) -> PixArt:
    """Return the network with keys and values compressed in `blocks`, where it has them not yet by averages of tokens.

    None leaves it as it is.

    Raises:
        UserError: it has learnt to compress in others, or has fewer blocks; names `key`.
    """
    former = network.config.kv_compressed_blocks
    if blocks is None or tuple(blocks) == former:
        return network
    if left_out := sorted(set(former) - set(blocks)):
        raise UserError(
            f"{key} compresses keys and values in block {left_out[0]}, which kv_compressed_blocks = {list(blocks)} of "
            "the stage leaves out: it has learnt to read those alone"
        )
    try:
        config = dataclasses.replace(network.config, kv_compressed_blocks=tuple(blocks))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    weights = network.state_dict()
    for block in sorted(set(blocks) - set(former)):
        compression = TokenCompression(config.width)
        compression.average_()
        weights |= {f"blocks.{block}.attention.compression.{name}": w for name, w in compression.state_dict().items()}
    log_once(
        f"{key}: {len(blocks) - len(former)} blocks begin to compress keys and values, by the average of 2 x 2 tokens"
    )
    compressed = blank_network(config)
    assert isinstance(compressed, PixArt)
    compressed.load_state_dict(weights, assign=True)
    return compressed


def with_guidance(job: TrainingJob, network: PixArt, *, key: str) -> PixArt:
    """Return the network with a guidance condition, where the stage's is told its guidance, or without one.

    A new one begins at zero, and of one that goes the usual guidance stays inside.

    Raises:
        UserError: a new one would not train, or what trains beside weights would be put on such as are told their
            guidance; names `key`.
    """
    settings, stage = job.settings, f"training.{job.command.stage_name}"
    has_it = network.config.has_guidance_condition
    if has_it == settings.is_told_guidance:
        return network
    if not has_it:
        told = with_guidance_condition(network)
        for name, _ in told.guidance_embed.named_parameters(prefix="guidance_embed"):
            if not _is_named(name, settings.trains):
                raise UserError(f"{key}: {stage}.trains leaves out {name}, which begins at zero: add it")
        return told
    if settings.keeps_base:
        raise UserError(
            f"{key} is told its guidance, and {stage}.trains = {settings.trains!r} leaves weights as they are: fold "
            f"one guidance into them first, as `{typed_command('convert', {'from': ANY, 'to': ANY, 'cfg': ANY})}` does"
        )
    former, own = student_of(job.start.process), student_of(settings.process_spec)
    wanted = (None if own is None else clamped_guidance(own)) or USUAL_GUIDANCE
    scale = wanted if former is None else clamped_guidance(former, wanted) or wanted
    log_once(f"{key} is told its guidance, which this stage does not do: {scale:g} is folded into the weights")
    return fold_guidance(network, scale)


def _require_all_layers(
    former: DiT | PixArt, config: DiTConfig | PixArtConfig, settings: StageTraining, *, key: str
) -> None:
    """Refuse weights that a stage could not leave as they are, though it trains beside them, as layers begin anew."""
    trains = f"trains = {settings.trains!r}"
    if former.kind != config.kind or former.kind != "pixart":
        raise UserError(f"{key} is a class-conditional DiT, and {trains} makes no PixArt of it: name a PixArt")
    if former.config.out_channels != config.out_channels:
        raise UserError(
            f"{key} gives {former.config.out_channels} channels and the process needs {config.out_channels}: the "
            f"output layer would begin anew, which {trains} does not train"
        )
    has, compressed = former.config.kv_compressed_blocks, settings.kv_compressed_blocks
    if compressed is not None and tuple(compressed) != has:
        raise UserError(
            f"{key} compresses keys and values in blocks {list(has)} and kv_compressed_blocks is {list(compressed)}: "
            f"{trains} leaves that as it is"
        )


def with_adapters(
    network: DiT | PixArt, start: StartingPoint, *, key: str, leaves_out: Collection[Path] = ()
) -> DiT | PixArt:
    """Merge the adapters that weights come with into them, and give the network the shape that it then had.

    Of adapters with the content of one of the files `leaves_out` it has the shape alone.

    Raises:
        UserError: they do not fit the weights; names `key`.
    """
    if not start.adapters:
        return network
    if network.kind != "pixart":
        raise UserError(f"{key} is a class-conditional DiT, but {start.adapters[0]} is an adapter of a PixArt")
    network.float()  # in which small changes are not lost
    left_out = {sha256_file(file) for file in leaves_out}
    for path in (path for path in start.adapters if sha256_file(find_adapter_file(path)) not in left_out):
        adapter = read_adapter(path, network.config)
        require_fit(adapter, network)
        merge(network, [(adapter, 1.0)])
    return network if start.shape is None else at_positions(network, start.shape)


def _with_other_latents(
    job: TrainingJob, former: DiT | PixArt, config: DiTConfig | PixArtConfig, *, key: str
) -> DiT | PixArt:
    """Return the network for latents of other channels, where the stage says that they are of another VAE.

    Raises:
        UserError: it does not say so, or a layer that begins anew would not train; names the recipe key.
    """
    settings, stage = job.settings, f"training.{job.command.stage_name}"
    what = f"{key} has in_channels {former.config.in_channels}, but the features' latents have {config.in_channels}"
    if "vae" not in settings.departs_in:
        raise UserError(
            f"{what}: encode them with the VAE that the weights were trained with, or say {stage}.departs_in = "
            "['vae'], and the patch embedding and the output layer begin anew"
        )
    if settings.former_latents is None:
        network = with_fresh_input(former, config.in_channels)
        says = f"{what}: the patch embedding and the output layer begin anew"
    else:
        network, explained = _with_bridge(job, former, location=settings.former_latents)
        says = (
            f"{key}: the patch embedding and the output layer are fitted to the latents of the VAE of the features, in "
            f"whose patches {explained:.0%} of the former's variance is found again"
        )
    if settings.former_latents is None or job.begins_output_anew or network.config.out_channels != config.out_channels:
        network = with_fresh_output(network, config.out_channels)
    for name, _ in network.named_parameters():
        if name.startswith(("patch_embed.", "final.")) and not _is_named(name, settings.trains):
            raise UserError(f"{key}: {stage}.trains leaves out {name}, which begins anew for another VAE: add it")
    log_once(says)
    return network


def _with_bridge(job: TrainingJob, former: DiT | PixArt, *, location: str) -> tuple[DiT | PixArt, float]:
    """Return the network with outer layers fitted to both VAEs' latents, and the share of variance that they share."""
    bridge, taps = stage_bridge(job), former.config.patch_size**2
    if len(bridge.weight) != taps * former.config.in_channels:
        raise UserError(
            f"{job.command.recipe.path}: training.{job.command.stage_name}.former_latents = {location!r} has latents "
            f"of {len(bridge.weight) // taps} channels, but the weights were trained with {former.config.in_channels}"
        )
    return bridged(former, bridge), bridge.explains


def _is_named(name: str, trains: str | Sequence[str]) -> bool:
    return trains == "all" if isinstance(trains, str) else any(fnmatchcase(name, pattern) for pattern in trains)


def with_fresh_input(network: DiT | PixArt, in_channels: int) -> DiT | PixArt:
    """Return the network with a patch embedding of latents of so many channels, drawn as a new network's is."""
    config = dataclasses.replace(network.config, in_channels=in_channels)
    fresh = blank_network(config)
    embed = PatchEmbed(in_channels, config.width, patch_size=config.patch_size, base_size=1)
    xavier_(embed)
    weights = {f"patch_embed.{name}": weight for name, weight in embed.state_dict().items()}
    fresh.load_state_dict(network.state_dict() | weights, assign=True)
    return fresh


def with_fresh_output(network: DiT | PixArt, out_channels: int) -> DiT | PixArt:
    """Return the network with a last layer of so many channels that says zero, as a new network's does."""
    rows = network.config.patch_size**2 * out_channels
    fresh = blank_network(dataclasses.replace(network.config, out_channels=out_channels))
    output = {
        "final.weight": network.final.weight.new_zeros(rows, network.config.width),
        "final.bias": network.final.weight.new_zeros(rows),
    }
    fresh.load_state_dict(network.state_dict() | output, assign=True)
    return fresh


def _saved_network(folder: Path, config: DiTConfig | PixArtConfig) -> DiT | PixArt:
    """Return the network of a checkpoint to resume; its training state takes the place of these, the EMA's weights."""
    saved = load_network(folder, None, sample_size=config.sample_size, key=str(folder)).float()
    _require_same_config(_inherit(config, saved.config), saved.config, key=str(folder))
    return saved


def _inherit(config: DiTConfig | PixArtConfig, former: DiTConfig | PixArtConfig) -> DiTConfig | PixArtConfig:
    """Return the shape with what the weights of `former` were trained with and the recipe does not say."""
    return dataclasses.replace(config, **{name: getattr(former, name) for name in config.inherited_fields})


def load_network(
    path: Path, timestep_shift: int | None, *, sample_size: int, key: str, say: Callable[[str], None] = log_once
) -> DiT | PixArt:
    """Open a diffusers folder, or an original file of PixArt or DiT, which if it lacks positions is of `sample_size`.

    `say` is told which weights of the file are taken, where it holds several or keeps them in a part.

    Raises:
        UserError: it is neither, or its keys do not fit; names `key`.
    """
    if path.is_dir():
        return load_diffusers(path, timestep_shift=timestep_shift)
    stored = read_weight_file(path)
    if stored.part is not None:
        say(f"{path}: {stored.describe()} are taken")
    weights = stored.tensors
    try:
        side = None if "pos_embed" in weights else sample_size
        found = infer_config(weights, sample_size=side, num_heads=stored.num_heads)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return load_weights(found, weights, original_layout(found), where=key)


def _require_same_config(wanted: DiTConfig | PixArtConfig, found: DiTConfig | PixArtConfig, *, key: str) -> None:
    for name, value in dataclasses.asdict(wanted).items():
        other = getattr(found, name)
        if value != other:
            raise UserError(f"{key} has {name} {other}, but the recipe and the features give {value}")
