"""Population mean and variance per channel, from batches of any size, merged exactly."""

import torch
from torch import Tensor


class Moments:
    """(count, mean, M2) of each channel, float64; M2 is the sum of squared differences from the mean.

    Never the mean of batch variances, which misses how the batches differ, and never E[x^2] - E[x]^2, which cancels.
    """

    def __init__(self, num_channels: int, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(3, num_channels, dtype=torch.float64, device=device)
        """Rows count, mean and M2, so that the moments of many layers and workers are sent as one tensor."""

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """The moments with these values, shape [3, channels]."""
        moments = cls(values.shape[1], values.device)
        moments.values.copy_(values)
        return moments

    @property
    def count(self) -> int:
        """Values per channel."""
        return int(self.values[0, 0])

    @property
    def mean(self) -> Tensor:
        """Per channel, float64."""
        return self.values[1]

    @property
    def variance(self) -> Tensor:
        """Population variance M2 / count per channel, float64: what BatchNorm normalises by. Zero without values."""
        return self.values[2] / self.values[0].clamp(min=1)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in activations of shape [batch, channels, ...], any float type. An empty batch changes nothing."""
        if x.numel() == 0:
            return
        columns = x.detach().double().movedim(1, 0).flatten(1)
        mean = columns.mean(1)
        m2 = (columns - mean[:, None]).square_().sum(1)
        self._merge(torch.stack([torch.full_like(mean, columns.shape[1]), mean, m2]))

    def merge(self, other: "Moments") -> None:
        """Take in another's values (Chan, Golub, LeVeque 1979); `other` stays as it is."""
        self._merge(other.values)

    def _merge(self, other: Tensor) -> None:
        n_a, mean_a, m2_a = self.values.unbind()
        n_b, mean_b, m2_b = other.unbind()
        n = n_a + n_b
        share = n_b / n.clamp(min=1)
        delta = mean_b - mean_a
        self.values = torch.stack([n, mean_a + delta * share, m2_a + m2_b + delta.square() * n_a * share])
