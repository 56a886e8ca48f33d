"""VGG16's convolutions. Simonyan & Zisserman, ICLR 2015 (arXiv 1409.1556).

Parameter names are torchvision's (`features.N.weight`), so that its ImageNet checkpoint (vgg16-397923af.pth) loads.
"""

from __future__ import annotations

from torch import Tensor, nn

PLAN = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
WIDTHS = (64, 128, 256, 512, 512)


class VGG16Features(nn.Module):
    """Five activations of the convolutional part. x: (B, 3, H, W) normalised as for ImageNet, H and W >= 16 ->
    [(B, 64, H, W), (B, 128, H/2, W/2), (B, 256, H/4, W/4), (B, 512, H/8, W/8), (B, 512, H/16, W/16)]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in PLAN:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS:
                taps.append(x)
        return taps
