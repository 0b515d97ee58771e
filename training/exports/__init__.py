"""What weights are exported as beside the bare network: a pipeline of diffusers, and the card of a model."""
