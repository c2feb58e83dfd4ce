"""From bytes to what the network sees: the one normalisation of all loaders."""

import torch
from torch import Tensor

# Of ImageNet's red, green and blue, from 0 to 1, as torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    """uint8 [images, height, width, 3] as float32 [images, 3, height, width], on the same device."""
    mean = torch.tensor([255 * m for m in MEAN], device=images.device)[:, None, None]
    factor = torch.tensor([1 / (255 * s) for s in STD], device=images.device)[:, None, None]
    out = torch.empty(len(images), 3, *images.shape[1:3], device=images.device)
    out.copy_(images.permute(0, 3, 1, 2))  # by itself: torch subtracts bytes and floats from each other slowly
    return out.sub_(mean).mul_(factor)
