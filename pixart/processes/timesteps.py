"""How likely the timesteps of process ddpm are in training, where they are not all alike."""

# T number of timesteps

import torch
from torch import Tensor

# Of losses that are weighed by importance: the part of the timesteps that is uniform, so that none weighs more than 10.
UNIFORM_PART = 0.1


def timestep_probabilities(num_times: int, *, logit_mean: float, logit_std: float, is_weighted: bool) -> Tensor:
    """Return the probability of each timestep, fp64 [T]: logit-normal over (t + u) / T (Esser et al. 2024, eq. 19).

    Where losses are weighed by importance, a tenth of it is uniform.
    """
    places = torch.arange(num_times + 1, dtype=torch.float64) / num_times
    cumulative = torch.special.ndtr((torch.logit(places) - logit_mean) / logit_std)
    probabilities = cumulative.diff()
    return (1 - UNIFORM_PART) * probabilities + UNIFORM_PART / num_times if is_weighted else probabilities
