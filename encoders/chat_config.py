"""The recipe's table of a server with OpenAI's chat interface; it loads no client, so that configs may hold it."""

from pydantic import Field

from pipelines.recipe import Decides, TableConfig


class ChatServerConfig(TableConfig):
    """A chat server, the table `server` of the room that asks it, such as `[captioning.server]`."""

    base_url: str = Field(
        default="http://127.0.0.1:8000/v1", pattern="^https?://", description="Address of the interface, up to /v1"
    )
    api_key_variable: str = Field(
        default="OPENAI_API_KEY",
        pattern="^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key, if the server wants one",
    )
    num_requests: int = Field(default=32, ge=1, le=1024, description="Requests each worker keeps in flight")
    timeout_seconds: float = Field(default=120.0, gt=0, description="Longest wait for one answer")
    max_attempts: int = Field(
        default=4,
        ge=2,
        description="Failures (500, time-out) of one image before a healthy server rejects it",
    )
    max_backoff_seconds: float = Field(default=10.0, gt=0, description="Longest pause between two tries")
    patience_seconds: float = Field(
        default=600.0, ge=0, description="How long a server that is away is waited for before the command fails"
    )
    image_short_side_pixels: Decides[int] = Field(
        default=0, ge=0, description="Larger images are sent with this short side; 0 = as they are; 336 for LLaVA-1.5"
    )
    penalty_parameter: Decides[str] = Field(
        default="repetition_penalty",
        pattern="^(repetition_penalty|frequency_penalty)$",
        description="How the server is told of a repetition penalty p: as p (vLLM, SGLang, LMDeploy), or as p - 1",
    )
