"""Consistency distillation of a teacher of process flow to few steps: in discrete steps of its own way, at any time.

What the literature has for flow, and why this was chosen:

- Continuous-time consistency (sCM, Lu & Song 2024; SANA-Sprint and rCM, 2025) asks for the derivative of the student's
  answer along the teacher's way. Forward derivatives do not go through fused attention, and of a toy teacher finite
  differences of no size give them in bf16 (docs/LOG.md). SANA-Sprint first teaches its teacher to be told sigma, and is
  not reproduced (Sana, issues 300 and 318). sCM collapsed on another text-to-image transformer until times were made
  discrete (rcm, issue 10), and finite differences did worse than plain steps of consistency (rcm, issue 30). rCM's
  authors have added such steps, and call them the more stable at times (rcm, issue 24: `cm_type=dcm`). In the toy world
  both learnt.
- MeanFlow (2025), Align Your Flow (2025) and transition models (TiM, 2025) need that derivative and, as shortcut models
  do (Frans et al. 2024), a second time, for which no exported layout has an embedding.

So the target is as LCM's: the average's estimate a guided step of the teacher nearer to the latents. Otherwise than
LCM, and as in rCM's discrete steps, times are drawn anywhere, not at N places: a student of flow is drawn at any sigma.
Estimates need no scalings: at sigma 0 the one of flow, x - sigma * velocity, is what is seen. Nor does anything grow
with the noise: LCM's error of the noise is multiplied by 157 at the last timestep, that of a velocity by 1.
"""

# B batch

from dataclasses import dataclass

import torch
from torch import Tensor

from pixart.processes.flow import Flow
from training.data.batch import Batch
from training.objectives.consistency import Consistency

# A draw times this has a fraction that the whole parts say nothing of, and 33 random bits left.
GUIDANCE_PLACES = 2**20


@dataclass(frozen=True, kw_only=True)
class FlowConsistency(Consistency):
    """The distance of a student's estimate from that of its average, a step of the teacher nearer to the latents."""

    process: Flow

    def draws(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return times fp32 [B], those a step of the teacher before them, and the guidance scales fp32 [B].

        Times are uniform before the shift, and so is a step, 1/N of the way. The last digits of a sample's uniform
        number choose its guidance.
        """
        draws = batch.timestep_draws
        ends = 1 - draws, (1 - draws - 1 / self.student["num_teacher_steps"]).clamp(min=0)
        times, earlier = (self.process.num_times * self.process.shifted(end) for end in ends)
        return times.float(), earlier.float(), self.guidance_at((draws * GUIDANCE_PLACES).frac())

    def scalings(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return 0 and 1, [B] each: an estimate is what the network says of the clean latents."""
        ones = torch.ones_like(times, dtype=torch.float32)
        return 0 * ones, ones
