"""Keys of a stage that are of its process: the times that it trains at, and what their losses weigh."""

from typing import Any, Literal

import pydantic

from pipelines.recipe import Decides, TableConfig


class ProcessKeys(TableConfig):
    """Those of `[training.<stage>]` that are of times and losses; see `training.key_owners` for whose they are."""

    timestep_sampling: Decides[Literal["independent", "stratified"]] = pydantic.Field(
        default="independent",
        description="Draws for timesteps: independent for each sample; or stratified, spread evenly over each global "
        "batch, with less noise in its mean loss",
    )
    flow_shift: Decides[float] = pydantic.Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Of flow, in training and drawing: sigma becomes s sigma / (1 + (s - 1) sigma); more than 1 means "
        "noisier times, as large images want (SD3 at 1024 pixels: 3)",
    )
    flow_logit_mean: Decides[float] = pydantic.Field(
        default=0.0, allow_inf_nan=False, description="Of flow: mean of the logit of sigma at the times trained at"
    )
    flow_logit_std: Decides[float] = pydantic.Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Of flow: deviation of that logit"
    )
    flow_prediction: Decides[Literal["velocity", "noise"]] = pydantic.Field(
        default="velocity",
        description="Of flow: what the network says: its velocity or, as weights of ddpm do, the noise, of which a "
        "velocity is reckoned; with 'noise' these go on as flow from what they draw, and their files stay ddpm's",
    )
    ddpm_logit_std: Decides[float | None] = pydantic.Field(
        default=None,
        gt=0,
        description="Of ddpm: deviation of the logit of t / 1000 at the timesteps trained at; null = all are as likely",
    )
    ddpm_logit_mean: Decides[float] = pydantic.Field(
        default=0.0, description="Of ddpm with ddpm_logit_std: mean of that logit; more than 0 means noisier times"
    )
    ddpm_importance_weights: Decides[bool] = pydantic.Field(
        default=False,
        description="Of ddpm with ddpm_logit_std: weigh losses so that the objective stays that of uniform times, of "
        "which a tenth then are; else the likelier times count more",
    )
    min_snr_gamma: Decides[float | None] = pydantic.Field(
        default=None,
        gt=0,
        description="Of ddpm: cap of the loss weight by signal-to-noise ratio (min-SNR); null = none",
    )

    @property
    def ddpm_times_density(self) -> dict[str, Any] | None:
        """How likely ddpm's timesteps are, as its spec has it."""
        if self.ddpm_logit_std is None:
            return None
        return {
            "logit_mean": self.ddpm_logit_mean,
            "logit_std": self.ddpm_logit_std,
            "is_weighted": self.ddpm_importance_weights,
        }
