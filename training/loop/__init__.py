"""The loop over steps: model under DeepSpeed, average, metrics, health."""
