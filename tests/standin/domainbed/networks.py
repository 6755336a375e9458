"""Small convolutional networks, built without any download."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

WIDTHS = (24, 48, 64)


class Featurizer(nn.Module):
    """Images (batch, channels, height, width) to features (batch, ``n_outputs``).

    Images of 224×224 are first averaged down to 56×56: a stand-in for the pretrained ResNet of the real library.
    """

    n_outputs = WIDTHS[-1]

    def __init__(self, input_shape: tuple[int, int, int], hparams: dict[str, Any]) -> None:
        super().__init__()
        channels, height = input_shape[0], input_shape[1]
        layers: list[nn.Module] = [nn.AvgPool2d(4)] if height >= 128 else []
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        return self.layers(x)


def Classifier(in_features: int, out_features: int, is_nonlinear: bool = False) -> nn.Module:  # noqa: N802
    """Return a linear layer, or three of them with ReLUs between."""
    if not is_nonlinear:
        return nn.Linear(in_features, out_features)
    sizes = (in_features, in_features // 2, in_features // 4)
    steps = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*steps, nn.Linear(sizes[-1], out_features))
