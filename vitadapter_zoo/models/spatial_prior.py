"""The spatial prior module of the ViT-Adapter (arXiv:2205.08534, section 3.3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_zoo.models.vit import channels_last
from vitadapter_zoo.ops.conv3x3 import conv3x3

STEM_WIDTH = 64


class Convolutions(nn.Sequential):
    """3x3 convolution + BatchNorm + ReLU for each step of ``widths``, then the layers ``more``."""

    def __init__(
        self, *widths: int, strides: tuple[int, ...], more: tuple[nn.Module, ...] = ()
    ) -> None:
        layers: list[nn.Module] = []
        for narrow, wide, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [
                nn.Conv2d(narrow, wide, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, *more)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, widths[0], H, W]`` to ``[N, widths[-1], ...]``."""
        convolution = None
        rectified = False
        layers = list(self)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.Conv2d):
                convolution = layer
            elif isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and convolution is not None:
                rectified = isinstance(following, nn.ReLU)
                x = convolve_and_normalise(x, convolution, layer, relu=rectified)
            elif not rectified:
                x = layer(x)
            else:
                rectified = False
        return x


def convolve_and_normalise(
    x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm, *, relu: bool
) -> Tensor:
    """Compute ``norm(convolution(x))`` and, with ``relu``, ReLU of the result.

    In evaluation mode the norm's scale and shift are folded into the convolution. The maps at
    stride 2 are the largest in the network, so one pass over them less is worth it.
    """
    if norm.training:
        result = norm(convolution(x))
        return F.relu(result, inplace=True) if relu else result
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * (variance + norm.eps).rsqrt()
    weight = convolution.weight * scale[:, None, None, None]
    bias = norm.bias - mean * scale
    if convolution.stride == (1, 1):
        return conv3x3(x, weight, bias, relu=relu)
    result = F.conv2d(x, weight, bias, convolution.stride, convolution.padding)
    return F.relu(result, inplace=True) if relu else result


class SpatialPrior(nn.Module):
    """A small convolutional pyramid at strides 4, 8, 16 and 32 (section 3.3)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.stem = Convolutions(
            3, width, width, width, strides=(2, 1, 1), more=(nn.MaxPool2d(3, stride=2, padding=1),)
        )
        self.conv2 = Convolutions(width, 2 * width, strides=(2,))
        self.conv3 = Convolutions(2 * width, 4 * width, strides=(2,))
        self.conv4 = Convolutions(4 * width, 4 * width, strides=(2,))
        self.fc1 = nn.Conv2d(width, dim, 1)
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute four maps at strides 4, 8, 16 and 32 from images ``[N, 3, H, W]``.

        The first is ``[N, width, H / 4, W / 4]``: the caller applies ``fc1`` to it. The others are
        ``[N, dim, H / s, W / s]``.
        """
        c1 = self.stem(channels_last(image))
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return [c1, self.fc2(c2), self.fc3(c3), self.fc4(c4)]
