"""From noise to latents: solvers and guidance."""
