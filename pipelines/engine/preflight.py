"""What an engine's settings ask of the machines, looked at before any work and for a plan."""

import importlib.util

from pipelines.engine.cluster import choose_num_workers
from pipelines.engine.run import EngineConfig


def require_workers(engine: EngineConfig, *, num_pending: int, few_samples: int) -> None:
    """Refuse settings under which no worker could start on what is to be done.

    `num_pending` are the samples that wait; up to `few_samples` are done in the command's own process, and of those
    nothing is asked. For more Ray is started, or found, as the work itself does: only Ray knows the nodes.

    Raises:
        UserError: no node has what one worker needs, or there is no Ray at `RAY_ADDRESS`; names the key that helps.
    """
    if num_pending and not engine.is_in_process(num_pending, few_samples):
        choose_num_workers(engine.num_workers, engine.worker_resources)


def require_packages(*modules: str) -> None:
    """Find out before any work starts, and for a plan, that a package is not installed.

    Raises:
        ModuleNotFoundError: one is not, as its import would; a command says which extra brings it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
