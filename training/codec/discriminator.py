"""The discriminator of patches that trains beside a codec (PatchGAN, Isola et al. 2017; VQGAN, Esser et al. 2021)."""

# B images, H x W pixels, P x Q patches

from torch import Tensor, nn

NUM_GROUPS = 8
NUM_HALVINGS = 3
KERNEL = 4
INITIAL_DEVIATION = 0.02
SMALLEST_SIDE = 24  # of what leaves it a patch


class PatchDiscriminator(nn.Module):
    """Says of each patch, of 70 pixels a side, how real it looks.

    Norms are over an image's own groups of channels, where the published one has those over a batch: so what is said of
    an image depends on no other one, and losses on neither ranks nor micro-batches.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, KERNEL, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number in range(1, NUM_HALVINGS + 1):
            stride = 2 if number < NUM_HALVINGS else 1
            layers += [
                nn.Conv2d(channels, 2 * channels, KERNEL, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NUM_GROUPS, 2 * channels),
                nn.LeakyReLU(0.2),
            ]
            channels *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, KERNEL, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=INITIAL_DEVIATION)

    def forward(self, images: Tensor) -> Tensor:
        """Return fp32 [B, P, Q] of images [B, 3, H, W] in -1 to 1: more where they look real."""
        return self.layers(images).squeeze(1).float()
