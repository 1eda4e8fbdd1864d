"""Our own networks: those that the pruning papers cut and torchvision does not have, most of them for CIFAR images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chip.shortcut import ChannelMap

# Shape letters: B images, C channels, H W pixels, K classes.

CIFAR_SIZE = 32
IMAGENET_SIZE = 224


@dataclass(frozen=True)
class OwnNet:
    """One of our networks: what makes it, the side of the images it is made for, and its number of classes."""

    make: Callable[..., nn.Module]
    size: int = CIFAR_SIZE
    classes: int = 10

    def build(self, num_classes: int | None) -> nn.Module:
        """The network with freshly drawn weights, with its own number of classes where none is given."""
        return self.make(num_classes=num_classes or self.classes)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The block's output, at the stride's resolution."""
        inner = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x_BCHW))


class CifarResNet(nn.Module):
    """A CIFAR ResNet: a 3x3 stem and three stages of 16, 32 and 64 channels, option-A shortcuts.

    The first block of every stage, stage 1 included, has a ChannelMap as its shortcut: each stage is then a channel
    group of its own, as the papers' lists need.

    Shapes: (B, 3, H, W) -> (B, K).
    Source (exact): He et al., Deep residual learning, CVPR 2016, section 4.2; depth = 6n + 2.
    """

    def __init__(self, depth: int, *, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _cifar_stage(16, 16, blocks=blocks, stride=1)
        self.layer2 = _cifar_stage(16, 32, blocks=blocks, stride=2)
        self.layer3 = _cifar_stage(32, 64, blocks=blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        _draw_weights(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The class scores."""
        x = F.relu(self.bn1(self.conv1(x_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class PreActivationBlock(nn.Module):
    """A bottleneck whose batch norms stand before its convolutions; the shortcut takes the sum as it is."""

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The sum of both paths, without an activation, at the stride's resolution."""
        inner = self.conv1(F.relu(self.bn1(x_BCHW)))
        inner = self.conv2(F.relu(self.bn2(inner)))
        return self.conv3(F.relu(self.bn3(inner))) + self.shortcut(x_BCHW)


class CifarPreResNet(nn.Module):
    """A CIFAR ResNet of pre-activation bottlenecks: three stages of 64, 128 and 256 channels, 1x1 shortcuts.

    The pruning papers print 1.71M parameters for depth 164: they count the 8,080 entries of the masks with which the
    authors of network slimming select channels. The network itself has 1,703,258.

    Shapes: (B, 3, H, W) -> (B, K).
    Source (exact): He et al., Identity mappings in deep residual networks, ECCV 2016; depth = 9n + 2. (code) Where a
    stage begins, the shortcut reads the sum itself, as in network slimming's PyTorch code, not the activation.
    """

    def __init__(self, depth: int, *, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 9
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _pre_activation_stage(16, 16, blocks=blocks, stride=1)
        self.layer2 = _pre_activation_stage(64, 32, blocks=blocks, stride=2)
        self.layer3 = _pre_activation_stage(128, 64, blocks=blocks, stride=2)
        self.bn = nn.BatchNorm2d(256)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(256, num_classes)
        _draw_weights(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The class scores."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x_BCHW))))
        return self.linear(torch.flatten(self.avgpool(F.relu(self.bn(x))), 1))


class CifarVgg(nn.Module):
    """VGG-16 with batch norm for 32x32 images, as the pruning papers cut it: 13 convolutions, a head of two linears.

    Shapes: (B, 3, H, W) -> (B, K).
    Source (code): the layer widths of CHIP's vgg_16_bn; its published counts come out.
    """

    _WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0 halves the resolution

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self._WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, num_classes)
        )
        _draw_weights(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The class scores."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x_BCHW)), 1))


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a convolution: 3x3 inside a dense block, 1x1 between two."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The new channels alone."""
        return self.conv1(F.relu(self.bn1(x_BCHW)))


class CifarDenseNet(nn.Module):
    """DenseNet without bottlenecks for 32x32 images: three dense blocks, each layer adds `growth` channels to the rest.

    Two forms with depth 40 and growth 12 go by the same name. The one that the pruning papers cut has a stem of 24
    channels (twice the growth): 1.06M parameters (1.04M without batch norms; 1.07M with network slimming's masks). The
    one in the paper's own tables has a stem of 16: 1,019,722 parameters, there rounded to 1.0M. Ours is the first.

    Shapes: (B, 3, H, W) -> (B, K).
    Source (exact): Huang et al., Densely connected convolutional networks, CVPR 2017; depth = 3n + 4. (code) The stem
    of 24, and no dropout: network slimming's PyTorch code, and HRank's.
    """

    def __init__(self, depth: int, *, num_classes: int, growth: int = 12, stem: int = 24) -> None:
        super().__init__()
        layers = (depth - 4) // 3
        widths = [stem + block * layers * growth for block in range(4)]
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.block1 = _dense_block(widths[0], growth=growth, layers=layers)
        self.transition1 = DenseLayer(widths[1], widths[1], kernel_size=1)
        self.block2 = _dense_block(widths[1], growth=growth, layers=layers)
        self.transition2 = DenseLayer(widths[2], widths[2], kernel_size=1)
        self.block3 = _dense_block(widths[2], growth=growth, layers=layers)
        self.bn = nn.BatchNorm2d(widths[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], num_classes)
        _draw_weights(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The class scores."""
        x = _grown(self.conv1(x_BCHW), self.block1)
        x = _grown(F.avg_pool2d(self.transition1(x), 2), self.block2)
        x = _grown(F.avg_pool2d(self.transition2(x), 2), self.block3)
        return self.linear(torch.flatten(self.avgpool(F.relu(self.bn(x))), 1))


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The block's output, at the stride's resolution."""
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x_BCHW))))))


class MobileNetV1(nn.Module):
    """MobileNet of width 1: a stem and thirteen separable blocks.

    stem_stride: 2 for ImageNet; 1 is the usual form for 32x32 images, whose last maps are then 2x2.

    Shapes: (B, 3, H, W) -> (B, K).
    Source (exact): Howard et al., MobileNets, 2017, table 1, with stride 1 in the last block, whose side does not
    change there. (code) stem_stride = 1: the MobileNet of kuangliu/pytorch-cifar.
    """

    _BLOCKS = (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    )  # fmt: skip  (width, stride)

    def __init__(self, *, num_classes: int, stem_stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        inputs = (32, *(width for width, _ in self._BLOCKS))
        self.blocks = nn.Sequential(
            *(
                SeparableBlock(before, width, stride=stride)
                for before, (width, stride) in zip(inputs, self._BLOCKS, strict=False)
            )
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs[-1], num_classes)
        _draw_weights(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The class scores."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x_BCHW))))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class CifarAlexNet(nn.Module):
    """AlexNet for 32x32 images: the five convolutions of the one-tower net, a single linear, no batch norm.

    Shapes: (B, 3, H, W) -> (B, K), H and W at least 32.
    Source (code): the CIFAR AlexNet of bearpaw/pytorch-classification, after Krizhevsky, One weird trick, 2014: pools
    of 2x2, the hidden linears left out; its published 2.47M parameters come out.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(256, num_classes)
        _draw_weights(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The class scores."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x_BCHW)), 1))


CIFAR_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56, "resnet110": 110}
OWN_NETS = {
    **{name: OwnNet(partial(CifarResNet, depth)) for name, depth in CIFAR_DEPTHS.items()},
    "resnet164": OwnNet(partial(CifarPreResNet, 164)),
    "vgg16_bn_cifar": OwnNet(CifarVgg),
    "densenet40": OwnNet(partial(CifarDenseNet, 40)),
    "mobilenet_v1_cifar": OwnNet(partial(MobileNetV1, stem_stride=1)),
    "alexnet_cifar": OwnNet(CifarAlexNet),
    "mobilenet_v1": OwnNet(partial(MobileNetV1, stem_stride=2), size=IMAGENET_SIZE, classes=1000),
}
CIFAR_NETS = tuple(name for name, net in OWN_NETS.items() if net.size == CIFAR_SIZE)


def _cifar_stage(in_channels: int, out_channels: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = CifarBlock(
        in_channels, out_channels, stride=stride, shortcut=ChannelMap(in_channels, out_channels, stride=stride)
    )
    rest = [CifarBlock(out_channels, out_channels, stride=1, shortcut=nn.Identity()) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _pre_activation_stage(in_channels: int, width: int, *, blocks: int, stride: int) -> nn.Sequential:
    rest = [PreActivationBlock(4 * width, width, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(PreActivationBlock(in_channels, width, stride=stride), *rest)


def _dense_block(in_channels: int, *, growth: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(DenseLayer(in_channels + growth * n, growth, kernel_size=3) for n in range(layers)))


def _grown(x_BCHW: Tensor, block: nn.Sequential) -> Tensor:
    """The block's input and, behind it, what each of its layers added."""
    for layer in block:
        x_BCHW = torch.cat([x_BCHW, layer(x_BCHW)], 1)
    return x_BCHW


def _draw_weights(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
