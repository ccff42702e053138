"""Discriminators: networks that tell images from reconstructions, (B, 3, H, W) in [0, 1] to logits."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.transforms.functional import normalize
from transformers import AutoModel


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) as VQGAN and SimVQ use it: a logit for each of many overlapping patches.

    Its batch norms always use the statistics of the batch at hand: it never runs in any other mode, and a batch that
    is not finite leaves no trace.

    Args:
        num_channels: channels of the first layer (64 in the references), doubled by each layer up to 8 times.
        num_layers: layers of stride 2.
    """

    rounds_fakes = False

    def __init__(self, num_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [num_channels * min(2**layer, 8) for layer in range(num_layers + 1)]
        layers = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[layer], track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """-> (B, 1, h, w)."""
        return self.layers(pixels * 2 - 1)


class DinoDiscriminator(nn.Module):
    """Heads on the features of a frozen self-supervised ViT (StyleGAN-T, VAR, RAE: src/disc/dinodisc.py).

    Images are resized to 224 px. A head of 1-d convolutions over the sequence of patches, with spectral norm and a norm
    over each image, sits on the last layer and on the layers at a quarter, half, three quarters and the end of the
    depth (RAE has the last one twice as well). The backbone is neither trained nor saved. To learn, it is shown
    reconstructions clamped and rounded to 8 bits.

    Args:
        name_or_path: the ViT, any that AutoModel loads with one token per patch (RAE: "facebook/dino-vits8").
        kernel_size: of the second convolution of a head (RAE: 9).
        token: of the hub.
    """

    rounds_fakes = True

    def __init__(self, name_or_path: str, kernel_size: int = 9, token: str | None = None) -> None:
        super().__init__()
        backbone = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, token=token)
        if hasattr(backbone, "pooler"):
            backbone.pooler = None
        self.backbone = backbone.requires_grad_(False).eval()
        width, depth = backbone.config.hidden_size, backbone.config.num_hidden_layers
        # indices into hidden_states, where 0 is the embedding
        self.levels = [depth, *(depth * quarter // 4 for quarter in (1, 2, 3, 4))]
        self.heads = nn.ModuleList([_DinoHead(width, kernel_size) for _ in self.levels])

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """-> (B, levels * patches)."""
        pixels = F.interpolate(pixels, size=(224, 224), mode="bilinear", align_corners=False)
        pixels = normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        patches = (224 // self.backbone.config.patch_size) ** 2
        kwargs = {} if self.backbone.config.image_size == 224 else {"interpolate_pos_encoding": True}
        if self.backbone.config.model_type.startswith("dino"):
            kwargs = {}  # these interpolate by themselves
        states = self.backbone(pixels, output_hidden_states=True, **kwargs).hidden_states
        logits = [head(states[level][:, -patches:].transpose(1, 2)) for head, level in zip(self.heads, self.levels)]
        return torch.cat([part.flatten(1) for part in logits], dim=1)


class _DinoHead(nn.Module):
    """(B, width, patches) -> (B, 1, patches)."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()

        def convolution(channels: int, size: int) -> nn.Module:
            return spectral_norm(nn.Conv1d(width, channels, size, padding=size // 2, padding_mode="circular"))

        def block(size: int) -> nn.Module:
            norm = nn.InstanceNorm1d(width, eps=1e-6, affine=True)
            return nn.Sequential(convolution(width, size), norm, nn.LeakyReLU(0.2))

        self.first, self.second, self.last = block(1), block(kernel_size), convolution(1, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.first(features)
        return self.last((self.second(features) + features) * 0.5**0.5)


def augment(pixels: torch.Tensor, cutout: float = 0.0) -> torch.Tensor:
    """Differentiable augmentation (Zhao et al. 2020, DiffAugment), drawn anew for each image: translation by up to an
    eighth, brightness, saturation and contrast, and one square made grey. As RAE's, with probability 1.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        cutout: side of the square as a share of the image's; 0 for none (RAE).
    """
    batch, _, height, width = pixels.shape
    uniform = torch.rand(7, batch, 1, 1, 1, device=pixels.device)

    rows, columns = torch.arange(height, device=pixels.device), torch.arange(width, device=pixels.device)

    def shifts(share: torch.Tensor, side: int) -> torch.Tensor:
        most = round(side * 0.125)
        return (share.view(-1, 1) * (2 * most + 1)).floor().long() - most

    # a border of one grey pixel serves all that comes from outside
    padded = F.pad(pixels, (1, 1, 1, 1), value=0.5)
    rows_from = (rows + shifts(uniform[0], height) + 1).clamp(0, height + 1)
    columns_from = (columns + shifts(uniform[1], width) + 1).clamp(0, width + 1)
    images = torch.arange(batch, device=pixels.device)
    pixels = padded.permute(0, 2, 3, 1)[images[:, None, None], rows_from[:, :, None], columns_from[:, None, :]]
    pixels = pixels.permute(0, 3, 1, 2)

    pixels = pixels + (uniform[2] - 0.5) * 0.5  # RAE: +-0.5 in [-1, 1]
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * (2 * uniform[3])
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * (uniform[4] + 0.5)

    if cutout:
        inside = []
        for share, side, places in ((uniform[5], height, rows), (uniform[6], width, columns)):
            length = round(side * cutout)
            start = (share.view(-1, 1) * (side + 1 - length % 2)).floor() - length // 2
            inside.append((places >= start) & (places < start + length))
        pixels = pixels.where(~(inside[0][:, None, :, None] & inside[1][:, None, None, :]), 0.5)
    return pixels
