"""The two nets of PGU (Hoang et al., WACV 2024, section 4): `pixel_values [B, C, 32, 32] -> logits`, plain torch.

Written from the published architectures, with one factor on every width: `AllCNN` is the all-convolutional net of
Springenberg et al. (ICLR workshop 2015), `SmallVGG` has three convolutions and two linear layers.
"""

from typing import Any

from torch import Tensor, nn


class AllCNN(nn.Module):
    """Eight convolutions, each with a batch norm, the third and the sixth of stride 2; mean over positions; linear."""

    def __init__(self, width: float = 1.0, channels: int = 3, classes: int = 10):
        super().__init__()
        narrow, wide = int(96 * width), int(192 * width)
        plan = [
            (narrow, 3, 1),
            (narrow, 3, 1),
            (wide, 3, 2),
            (wide, 3, 1),
            (wide, 3, 1),
            (wide, 3, 2),
            (wide, 3, 1),
            (wide, 1, 1),
        ]
        blocks, before = [], channels
        for after, kernel, stride in plan:
            conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU()))
            before = after
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(wide, classes)

    def forward(self, pixel_values: Tensor, **ignored: Any) -> Tensor:
        return self.classifier(self.features(pixel_values).mean((2, 3)))


class SmallVGG(nn.Module):
    """Three 3 x 3 convolutions, each pooled by 2 and batch-normed, and two linear layers of 8192 and 512 inputs."""

    def __init__(self, width: float = 1.0, channels: int = 3, classes: int = 10, dropout: float = 0.5, size: int = 32):
        super().__init__()
        first, second, third = int(128 * width), int(256 * width), int(512 * width)
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(first),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(second),
            nn.Conv2d(second, third, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(third),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(third * (size // 8) ** 2, third),
            nn.ReLU(),
            nn.BatchNorm1d(third),
            nn.Linear(third, classes),
        )

    def forward(self, pixel_values: Tensor, **ignored: Any) -> Tensor:
        return self.classifier(self.features(pixel_values))


NETS: dict[str, type[nn.Module]] = {"allcnn": AllCNN, "smallvgg": SmallVGG}
