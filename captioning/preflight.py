"""Whether what captions are made with is there: found out before any work starts, and without loading a model."""

import importlib.util

from captioning.architectures import read_architecture, require_fit
from captioning.config import CaptioningConfig
from encoders.weights import ModelSource, require_model, resolve_model
from errors import DISTRIBUTION, UserError
from pipelines.engine.preflight import require_packages

CLIP_TYPE = "clip"  # of a config.json of transformers


def require_models(
    config: CaptioningConfig, model: ModelSource, *, api_key: str, is_plan: bool, table: str = "captioning"
) -> None:
    """Look for the models, or the server, of `config`.

    `model` is where that of its engine is, and `table` of the recipe names both.

    For a plan a server that is away is not waited for.

    Raises:
        UserError: a model is not there or is none that its engine takes, or the server cannot be used.
        ModuleNotFoundError: a package is not installed.
    """
    if config.is_given:
        pass
    elif config.engine == "openai":
        # The client is of no use to the other engines.
        from captioning.engines.openai_engine import chat_server
        from encoders.chat_server import require_server

        patience_seconds = 0.0 if is_plan else config.server.patience_seconds
        server = config.server.model_copy(update={"patience_seconds": patience_seconds})
        require_server(chat_server(config.model_copy(update={"server": server}), api_key))
    elif config.engine == "vllm":
        _require_vllm(table)
        require_model(model, key=f"{table}.model")
    else:
        require_packages("torch", "transformers", "jinja2")
        require_model(model, key=f"{table}.model")
        architecture = read_architecture(model)
        if config.engine == "transformers" and architecture is not None:
            require_fit(architecture, config.model, table=table)
    if config.clip_model is not None:
        require_packages("torch", "transformers")
        clip = resolve_model(config.clip_model)
        require_model(clip, key="captioning.clip_model")
        found = read_architecture(clip)
        if found is not None and found.model_type != CLIP_TYPE:
            raise UserError(f"captioning.clip_model = {config.clip_model!r} is a {found.name}, not a CLIP")


def _require_vllm(table: str) -> None:
    if importlib.util.find_spec("vllm") is None:
        # It is in no lock of ours: it brings torchvision, and pins its own torch.
        raise UserError(
            f'{table}.engine = "vllm" needs vLLM, which is not installed here: install the extra `vllm`, '
            f"pip install '{DISTRIBUTION}[captioning,vllm]', into the environment of every node; or serve the model "
            f'where vLLM is, and set {table}.engine = "openai" and captioning.server.base_url'
        )
