"""The kinds of networks that stages train and work with."""

from encoders.perceptual import PerceptualConfig, PerceptualModel
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from training.codec.autoencoder import Autoencoder, AutoencoderConfig

Transformer = DiT | PixArt
TransformerConfig = DiTConfig | PixArtConfig
# What a stage may train.
Trainee = Transformer | Autoencoder
TraineeConfig = TransformerConfig | AutoencoderConfig
# And what runs forward beside it.
Network = Trainee | PerceptualModel
NetworkConfig = TraineeConfig | PerceptualConfig
