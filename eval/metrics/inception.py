"""InceptionV3 as FID reads it (Heusel et al., 2017): the network of Szegedy et al. (2016) with TensorFlow's weights of 2015.

    picture (b,3,299,299) --stem--> (b,192,35,35) --three A, B, four C, D, two E--> (b,2048,8,8) --mean--> (b,2048), "pool3"

It differs from torchvision's `inception_v3` in no shape, and so in nothing that loading could notice: means at the border
are over pixels that are there, not over the padding's zeros, and the last block pools by the maximum where the paper, and
the block before it, take the mean. Every published FID is computed so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A block: branches that read the same input, side by side in the channels of the output. A branch: what is done one after
# the other. "64 1x7" is a convolution to 64 channels, its kernel 1 row and 7 columns, padded to keep the picture's size;
# "/2" steps by 2 and pads nothing, "/1" only pads nothing. "mean" and "max" pool 3x3. "|" forks: both read what came before.
STEM = "32 3x3/2, 32 3x3/1, 64 3x3, max/2, 80 1x1, 192 3x3/1, max/2"


def a(pooled: int) -> list[str]:
    return ["64 1x1", "48 1x1, 64 5x5", "64 1x1, 96 3x3, 96 3x3", f"mean, {pooled} 1x1"]


B = ["384 3x3/2", "64 1x1, 96 3x3, 96 3x3/2", "max/2"]


def c(inner: int) -> list[str]:
    return [
        "192 1x1",
        f"{inner} 1x1, {inner} 1x7, 192 7x1",
        f"{inner} 1x1, {inner} 7x1, {inner} 1x7, {inner} 7x1, 192 1x7",
        "mean, 192 1x1",
    ]


D = ["192 1x1, 320 3x3/2", "192 1x1, 192 1x7, 192 7x1, 192 3x3/2", "max/2"]


def e(pool: str) -> list[str]:
    return [
        "320 1x1",
        "384 1x1, 384 1x3 | 384 3x1",
        "448 1x1, 384 3x3, 384 1x3 | 384 3x1",
        f"{pool}, 192 1x1",
    ]


BLOCKS = [a(32), a(64), a(64), B, c(128), c(160), c(160), c(192), D, e("mean"), e("max")]
FEATURES = 2048


class InceptionV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, channels = chain(STEM, 3)
        self.blocks = nn.Sequential()
        for branches in BLOCKS:
            block, channels = side_by_side(branches, channels)
            self.blocks.append(block)

    def forward(self, picture: Tensor) -> Tensor:
        """picture (b,3,299,299), from -1 to 1 (a byte less 128, over 128) -> features (b,2048), none negative."""
        return self.blocks(self.stem(picture)).mean((2, 3))


def chain(text: str, channels: int) -> tuple[nn.Sequential, int]:
    """-> what `text` describes, for an input of so many channels, and the channels of its output."""
    steps = nn.Sequential()
    for words in text.split(", "):
        step, channels = one_step(words, channels)
        steps.append(step)
    return steps, channels


def side_by_side(texts: list[str], channels: int) -> tuple[nn.Module, int]:
    branches, widths = zip(*(chain(text, channels) for text in texts), strict=True)
    return SideBySide(branches), sum(widths)


def one_step(words: str, channels: int) -> tuple[nn.Module, int]:
    if " | " in words:
        return side_by_side(words.split(" | "), channels)
    what, _, stride = words.partition("/")
    if what == "mean":
        return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), channels
    if what == "max":
        return nn.MaxPool2d(3, 2 if stride else 1, padding=0 if stride else 1), channels
    width, rows, columns = map(int, what.replace("x", " ").split())
    return Convolution(channels, width, (rows, columns), int(stride or 1), padded=not stride), width


class SideBySide(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


class Convolution(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.norm = Norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Norm(nn.Module):
    """Batch norm by the statistics of a training long past. (nn.BatchNorm2d has a counter, which not every edition has.)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)
