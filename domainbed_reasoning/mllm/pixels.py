"""Convert images and DomainBed's image tensors to inputs of an MLLM's image processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The normalization of DomainBed's image-folder datasets.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Return a batch of images as RGB bytes.

    Our own datasets hand bytes on for an MLLM, which pass unchanged. Tensors of stock datasets are undone: three
    channels as ImageNet-normalized, one or two (the MNIST sets) as in [0, 1]; a missing channel is black, a single one
    grey.

    Args:
        x: ``(n, c, H, W)``, bytes or floats, c in 1, 2, 3.

    Returns:
        ``(n, 3, H, W)`` uint8.
    """
    if x.dtype == torch.uint8:
        return x
    x = x.float()
    if x.shape[1] == 3:
        mean = x.new_tensor(IMAGENET_MEAN)[:, None, None]
        std = x.new_tensor(IMAGENET_STD)[:, None, None]
        x = x * std + mean
    elif x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    else:
        x = torch.cat([x, x.new_zeros(x.shape[0], 3 - x.shape[1], *x.shape[2:])], dim=1)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def resize(images: torch.Tensor, edge: int) -> torch.Tensor:
    """Return ``images`` (uint8, ``(n, 3, H, W)``) at ``edge`` x ``edge`` pixels, bicubic with antialias."""
    if images.shape[-2:] == (edge, edge):
        return images
    scaled = torch.nn.functional.interpolate(
        images.float(), size=(edge, edge), mode="bicubic", antialias=True, align_corners=False
    )
    return scaled.clamp(0, 255).round().to(torch.uint8)


def from_picture(edge: int) -> Callable[[Any], torch.Tensor]:
    """Return the transform from a PIL picture to RGB bytes ``(3, edge, edge)``: squeezed to a square, bicubic."""
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    transform: Callable[[Any], torch.Tensor] = transforms.Compose(
        [transforms.Resize((edge, edge), bicubic), transforms.PILToTensor()]
    )
    return transform
