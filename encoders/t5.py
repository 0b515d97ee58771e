"""The frozen text encoder of the paper: the encoder half of a T5 (arXiv 1910.10683)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from encoders.text import HiddenStatesEncoder, PackedTexts
from encoders.weights import ModelSource, load_pretrained

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HINT = " (save the model as one; the encoder of a T5ForConditionalGeneration alone has other key names)"


class T5Encoder(HiddenStatesEncoder):
    """The encoder half of a T5 and its tokenizer, see `TextEncoder`."""

    model_types: ClassVar[tuple[str, ...]] = ("t5", "mt5")
    width_key: ClassVar[str] = "d_model"
    # Kernels of attention read a bias in steps of eight values.
    length_step: ClassVar[int] = 8

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype, key: str) -> Any:
        """Load the weights of a T5's encoder; raises as `encoders.weights.load_pretrained` does."""
        from transformers import T5EncoderModel

        from encoders.t5_packed import PackedT5

        model = load_pretrained(T5EncoderModel, source, settings={"dtype": dtype}, key=key, hint=HINT)
        return PackedT5(model).eval().requires_grad_(False)

    @staticmethod
    def blank_weights(config: Mapping[str, Any]) -> Any:
        """Return a T5's encoder without values."""
        import torch
        from transformers import T5Config, T5EncoderModel

        from encoders.t5_packed import PackedT5

        with torch.device("meta"):
            return PackedT5(T5EncoderModel(T5Config.from_dict(dict(config)))).eval().requires_grad_(False)

    def compile_kernels(self) -> None:
        """Compile what lies between the matrix products."""
        self.model.compile_kernels()

    def hidden_states(self, texts: PackedTexts) -> Tensor:
        """Return the last hidden states [N, D] of packed texts."""
        return self.model(texts)
