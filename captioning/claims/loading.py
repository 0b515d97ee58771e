"""Which asker a recipe names, loaded."""

from captioning.claims.asking import ClaimAsker
from captioning.config import CaptioningConfig


def load_asker(config: CaptioningConfig, *, api_key: str, num_threads: int) -> ClaimAsker:
    """Load the model of `config`, which is the table `[captioning]` with what its claims say laid over it.

    Raises:
        UserError: the model is not there, or its vocabulary has no yes or no; or the server cannot be used.
    """
    # Each brings libraries that the driver, or the other, never needs.
    if config.engine == "openai":
        from captioning.claims.server import ServerAsker

        return ServerAsker(config, api_key=api_key)
    if config.engine == "vllm":
        from captioning.claims.in_vllm import VllmAsker

        return VllmAsker(config)
    from captioning.claims.in_process import InProcessAsker

    return InProcessAsker(config, num_threads=num_threads)
