"""Keys of a stage that are of one process, objective, network, average or optimizer: others may not have them."""

from collections.abc import Mapping

from errors import UserError

DDPM_TIMES = ("ddpm_logit_std", "ddpm_logit_mean", "ddpm_importance_weights")
PROCESS_KEYS = {
    "ddpm": ("min_snr_gamma", *DDPM_TIMES),
    "flow": ("flow_shift", "flow_logit_mean", "flow_logit_std", "flow_prediction"),
}
OBJECTIVE_KEYS = {
    "denoise": (),
    "prior_preservation": ("prior_weight",),
    "realign": (),
    "consistency": ("consistency",),
    "distribution_matching": ("matching",),
    "reconstruct": ("reconstruction",),
}
NETWORK_KEYS = {
    "dit": ("preview_classes",),
    "pixart": ("preview_prompts", "kv_compressed_blocks"),
    "vae": ("codec", "preview_crops"),
}
EMA_KEYS = {"exponential": ("ema_decay",), "power": ("ema_lengths", "ema_snapshot_every")}
# Of the loss that a process has of its own, and of the times that it is taken at.
LOSS_KEYS = ("min_snr_gamma", *DDPM_TIMES, "flow_logit_mean", "flow_logit_std")
# Of networks that see noise, a condition or both, as a codec does not.
NOT_OF_CODECS = (
    *("process", "timestep_sampling", "timestep_shift", "interpolation_scale", "caption_dropout"),
    *(key for keys in PROCESS_KEYS.values() for key in keys),
    *("departs_in", "former_latents", "lora", "preview_guidance_scale", "preview_num_steps"),
)
OTHER_LOSSES = ("consistency", "distribution_matching")
OPTIMIZER_KEYS = {"adamw": (), "adamw8bit": (), "muon": ("muon_learning_rate",)}
OWNERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "process": PROCESS_KEYS,
    "objective": OBJECTIVE_KEYS,
    "network": NETWORK_KEYS,
    "ema": EMA_KEYS,
    "optimizer": OPTIMIZER_KEYS,
}


def keys_of_others(chosen: Mapping[str, str]) -> set[str]:
    """Return the keys that are of another process, objective, network, average or optimizer than the `chosen` ones."""
    others = {
        key
        for owner, choice in chosen.items()
        for other, keys in OWNERS[owner].items()
        if other != choice
        for key in keys
    }
    return others | set(LOSS_KEYS if chosen["objective"] in OTHER_LOSSES else ())


def require_own_keys(table: Mapping[str, object], chosen: Mapping[str, str], *, key: str) -> None:
    """Refuse keys of a stage's own `table` that are of another process, objective, network and so on than its own.

    `chosen` has those. Nor may it have keys of a process' own loss where its objective minimises another.

    Raises:
        UserError: names the `key` of the stage with the one that is wrong, its value, and both owners.
    """
    for owner, choice in chosen.items():
        for other, keys in OWNERS[owner].items():
            for name in table.keys() & set(keys) if other != choice else ():
                raise UserError(f"{key}.{name} = {table[name]!r} is for {owner} {other}, but the stage's is {choice!r}")
    for name in sorted(table.keys() & set(NOT_OF_CODECS)) if chosen["network"] == "vae" else ():
        raise UserError(f"{key}.{name} = {table[name]!r} is for networks dit and pixart, but the stage's is 'vae'")
    if chosen["network"] == "vae" and "codec" in table and table.get("starts_from", "scratch") != "scratch":
        raise UserError(
            f"{key}.codec is for a codec from scratch, but {key}.starts_from = {table['starts_from']!r}, whose shape "
            "it has: leave one of them out"
        )
    objective = chosen["objective"]
    for name in sorted(table.keys() & set(LOSS_KEYS)) if objective in OTHER_LOSSES else ():
        raise UserError(
            f"{key}.{name} = {table[name]!r} is for the loss of process {chosen['process']}, but objective "
            f"{objective!r} has one of its own: leave it out"
        )


def require_density(table: Mapping[str, object], *, logit_std: float | None, key: str) -> None:
    """Refuse what a stage's own `table` says of a density of timesteps that it has not.

    Raises:
        UserError: names the `key` of the stage with the one that is wrong.
    """
    for name in DDPM_TIMES:
        if name in table and logit_std is None and table[name] is not None:
            raise UserError(f"{key}.{name} = {table[name]!r} is for a stage with ddpm_logit_std, and this one has none")
