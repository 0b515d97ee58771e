"""Layers at both ends of a network for latents of another VAE, fitted to what both VAEs make of the same pictures.

A linear layer is found that turns patches of the new latents to those of the former ones and noise to noise of the same
size. In front of the former patch embedding, and turned round behind the output layer, it lets the blocks see and say
what they know.
"""

# n patches of both VAEs' latents, P patch size, C channels of the former latents, K of the new ones, D width

import dataclasses

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from errors import UserError
from pipelines.store.feature_store import load_index, read_payload
from pipelines.store.files import is_remote
from pixart.dit import DiT
from pixart.model import PixArt
from training.data.datasets import Dataset
from training.data.directories import FeatureDirectory, open_directory
from training.data.former import former_location
from training.stages.networks import blank_network
from training.stages.stage import TrainingJob

NUM_PICTURES = 2000  # at the most
UNSEEN_SCALE = 0.5  # of what the bridge does not see, to what it does, in tokens
COLUMNS = ("key", "bucket", "mean_offset", "channels", "height", "width", "reject")


def stage_bridge(job: TrainingJob) -> "Bridge":
    """Return the bridge from a stage's latents to those that `former_latents` names; raises as `read_pairs` does."""
    dataset = next(dataset for dataset in job.features.datasets if dataset.role == "instance")
    key = f"{job.command.recipe.path}: training.{job.command.stage_name}.former_latents"
    location = former_location(job.command, job.settings)
    return fit_bridge(*read_pairs(location, dataset, patch_size=job.model.patch_size, key=key))


def read_pairs(location: str, dataset: Dataset, *, patch_size: int, key: str) -> tuple[Tensor, Tensor]:
    """Return patches of the former latents at `location` and of a dataset's, fp32 [n, C*P*P] and [n, K*P*P].

    They are those of the first pictures that both have in a bucket of the same name, channel by channel, as the network
    sees them: shifted and scaled.

    Raises:
        MissingFileError: `location` has no finished features.
        UserError: it is behind a URL, or has no picture of the dataset's; names `key`.
    """
    if is_remote(location) or is_remote(dataset.leading.location):
        raise UserError(f"{key} = {location!r}: latents of both VAEs are read from folders, and one is behind a URL")
    former, new = open_directory(location), dataset.leading
    pairs: list[tuple[Tensor, Tensor]] = []
    for shard in dataset.shards:
        if shard in former.manifest.shards and len(pairs) < NUM_PICTURES:
            one, other = _latents(former, shard), _latents(new, shard)
            pairs += [(one[name], other[name]) for name in other if name in one and _fit(one[name], other[name])]
    if not pairs:
        raise UserError(
            f"{key} = {location!r} has none of the pictures of {new}, or not in the same buckets: it takes the latents "
            "that the VAE of the weights made of the same shards"
        )
    former_patches, new_patches = (
        torch.cat([_patches(latents, patch_size) for latents in side])
        for side in zip(*pairs[:NUM_PICTURES], strict=True)
    )
    return former_patches, new_patches


def _fit(one: Tensor, other: Tensor) -> bool:
    return one.shape[1:] == other.shape[1:]


def _latents(directory: FeatureDirectory, shard: str) -> dict[tuple[str, str], Tensor]:
    """Return the latents of a shard by key and bucket, as a network sees them, fp32 [C, h, w]."""
    vae = directory.fact("vae")
    with directory.open(shard, ".parquet") as file:
        table = load_index(file.path.parent, [shard], columns=COLUMNS)
    with directory.open(shard, ".tar") as file:
        tar = np.asarray(np.memmap(file.path, np.uint8, mode="r"))
    found = {}
    for row in table.filter(pc.field("reject").is_null()).slice(0, NUM_PICTURES).to_pylist():
        shape = (row["channels"], row["height"], row["width"])
        mean = torch.from_numpy(read_payload(tar, row["mean_offset"], dtype="float16", shape=shape).copy())
        found[row["key"], row["bucket"]] = (mean.float() - (vae["shift_factor"] or 0.0)) * vae["scaling_factor"]
    return found


def _patches(latents: Tensor, patch_size: int) -> Tensor:
    return F.unfold(latents[None], patch_size, stride=patch_size)[0].T


@dataclasses.dataclass(frozen=True)
class Bridge:
    """From patches x of the new latents to the former ones: `weight` @ x + `bias`, [C*P*P, K*P*P] and [C*P*P].

    `explains` is the share of the former latents' variance that it finds again.
    """

    weight: Tensor
    bias: Tensor
    explains: float


def fit_bridge(former: Tensor, new: Tensor) -> Bridge:
    """Fit patches `new` [n, K*P*P] to `former` [n, C*P*P] by a matrix of orthonormal rows, so that noise stays noise.

    It is the orthogonal Procrustes problem (Schönemann 1966): the polar factor of the covariance of both. With fewer
    new channels than former ones its columns are orthonormal.
    """
    means = former.mean(0), new.mean(0)
    centred = former - means[0], new - means[1]
    left, _, right = torch.linalg.svd((centred[0].T @ centred[1]).double(), full_matrices=False)
    weight = (left @ right).float()
    fitted = torch.linalg.lstsq(centred[1] @ weight.T, centred[0]).solution
    error = (centred[0] - centred[1] @ weight.T @ fitted).square().sum()
    return Bridge(weight, means[0] - weight @ means[1], float(1 - error / centred[0].square().sum()))


def bridged(network: DiT | PixArt, bridge: Bridge) -> DiT | PixArt:
    """Return the network for the new latents, with the bridge folded into its two outer layers.

    What the bridge does not see of new latents the patch embedding lays where the former one lays least, and the
    output layer says zero of it, and of the variance.
    """
    config, taps = network.config, network.config.patch_size**2
    channels = bridge.weight.shape[1] // taps
    num_outputs = channels * (config.out_channels // config.in_channels)
    embed = network.patch_embed.projection
    former = embed.weight.detach().flatten(1)  # [D, C*P*P]
    weight = former @ bridge.weight + _unseen(former, bridge.weight)
    # Rows of the output layer are pixels of a patch, and in each the channels.
    said = torch.cat([network.final.weight.detach(), network.final.bias.detach()[:, None]], dim=1)
    said = said.unflatten(0, (taps, -1))[:, : config.in_channels].transpose(0, 1).flatten(0, 1)  # [C*P*P, D + 1]
    output = said.new_zeros(taps, num_outputs, said.shape[1])
    output[:, :channels] = (bridge.weight.T @ said).unflatten(0, (channels, taps)).transpose(0, 1)
    output = output.flatten(0, 1)
    fresh = blank_network(dataclasses.replace(config, in_channels=channels, out_channels=num_outputs))
    outer = {
        "patch_embed.projection.weight": weight.unflatten(1, (channels, config.patch_size, config.patch_size)),
        "patch_embed.projection.bias": embed.bias.detach() + former @ bridge.bias,  # pyright: ignore[reportOptionalMemberAccess]
        "final.weight": output[:, :-1],
        "final.bias": output[:, -1],
    }
    fresh.load_state_dict(network.state_dict() | {name: each.contiguous() for name, each in outer.items()}, assign=True)
    return fresh


def _unseen(former: Tensor, bridge: Tensor) -> Tensor:
    """Embed what `bridge` [C*P*P, K*P*P] sees nothing of, in directions that `former` [D, C*P*P] uses least."""
    rest = torch.linalg.svd(bridge, full_matrices=True)[2][min(bridge.shape) :]  # [r, K*P*P]
    free = torch.linalg.svd(former, full_matrices=True)[0].flip(1)[:, : len(rest)]  # least used first
    return UNSEEN_SCALE * former.norm() / former.shape[1] ** 0.5 * free @ rest[: free.shape[1]]
