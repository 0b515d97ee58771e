"""The frozen text encoder of the paper: the encoder half of a T5 (arXiv 1910.10683)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from encoders.text import HiddenStatesEncoder
from encoders.weights import ModelSource, load_pretrained

if TYPE_CHECKING:
    import torch

HINT = " (save the model as one; the encoder of a T5ForConditionalGeneration alone has other key names)"


def fuse_gelu(model: Any) -> Any:
    """Give a T5 encoder the tanh-approximated GELU as one kernel; transformers' "gelu_new" makes it of eight."""
    import torch

    for block in model.encoder.block:
        feed_forward = block.layer[-1].DenseReluDense
        if type(feed_forward.act).__name__ == "NewGELUActivation":
            feed_forward.act = torch.nn.GELU(approximate="tanh")
    return model


class T5Encoder(HiddenStatesEncoder):
    """The encoder half of a T5 and its tokenizer, see `TextEncoder`."""

    model_types: ClassVar[tuple[str, ...]] = ("t5", "mt5")
    width_key: ClassVar[str] = "d_model"

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype, key: str) -> Any:
        """Load the weights of a T5's encoder; raises as `encoders.weights.load_pretrained` does."""
        from transformers import T5EncoderModel

        return fuse_gelu(load_pretrained(T5EncoderModel, source, settings={"dtype": dtype}, key=key, hint=HINT))
