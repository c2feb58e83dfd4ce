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
    # One by one they stay in a CPU's cache; to a GPU each step is a launch.
    at_once = 1 if images.device.type == "cpu" else max(1, len(images))
    for n in range(0, len(images), at_once):
        part = out[n : n + at_once]
        part.copy_(images[n : n + at_once].permute(0, 3, 1, 2))  # by itself: torch subtracts bytes from floats slowly
        part.sub_(mean).mul_(factor)
    return out
