"""Losses of the generator (encoder, quantizer, decoder) and of the discriminator."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ConvNeXt_Small_Weights, convnext_small
from torchvision.transforms.functional import normalize

from eval.lpips.lpips import load_lpips


@contextmanager
def _weights_from(folder: str | None):
    """torchvision looks for its files in `folder`; `None`: in the torch hub cache, and downloads what is missing."""
    if folder is None:
        yield
        return
    cache = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as hub:
        (Path(hub) / "checkpoints").symlink_to(Path(folder).resolve(), target_is_directory=True)
        torch.hub.set_dir(hub)
        try:
            yield
        finally:
            torch.hub.set_dir(cache)


def _load(name: str, build, folder: str | None) -> nn.Module:
    """A frozen network in eval mode."""
    try:
        with _weights_from(folder):
            network = build()
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise RuntimeError(
            f"The {name} weights cannot be had ({error.__cause__ or error}). Put torchvision's file into "
            "$TORCH_HOME/hub/checkpoints or into the folder of --perceptual_weights, train without (--lpips_weight 0, "
            "--convnext_weight 0), or allow that: --perceptual_optional."
        ) from error
    return network.requires_grad_(False).eval()


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) of pixels nominally in [0, 1], with gradients; a scalar, the mean over the batch.

    Args:
        network: "vgg" or "alex".
        folder: where torchvision's checkpoint of that backbone is; `None`: the torch hub cache, or a download.

    Raises:
        RuntimeError: the backbone's weights are in neither place and cannot be downloaded.
    """

    def __init__(self, network: str = "vgg", folder: str | None = None) -> None:
        super().__init__()
        self.network = _load(f"{network} (LPIPS)", lambda: load_lpips(network), folder)

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return self.network(reconstruction, original, normalize=True).mean()


class ConvNextLoss(nn.Module):
    """Mean squared error between the ImageNet logits that ConvNeXt-S gives for two batches of pixels, nominally in
    [0, 1], at 224 px: the second part of TiTok's perceptual loss (github.com/bytedance/1d-tokenizer,
    modeling/modules/perceptual_loss.py), which VQRAE uses.

    Args and raises: as [`PerceptualLoss`].
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.network = _load("ConvNeXt-S", lambda: convnext_small(weights=ConvNeXt_Small_Weights.IMAGENET1K_V1), folder)

    def train(self, mode: bool = True):
        return super().train(False)

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(pixels, size=224, mode="bilinear", align_corners=False, antialias=True)
        return self.network(normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def forward(self, reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self._logits(original)
        return F.mse_loss(self._logits(reconstruction), target)


def gradient_loss(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between neighbouring pixels, down and across, of (B, 3, H, W). A step
    across the border of a patch counts by its height, where errors of the pixels beside it may be small."""
    errors = reconstruction - original
    return (errors.diff(dim=2).abs().mean() + errors.diff(dim=3).abs().mean()) / 2


class ReconstructionLoss(nn.Module):
    """Weighted sum of pixel and perceptual losses, and its terms by name (unweighted). A weight of 0 leaves a term out.

    Always in fp32, whatever autocast is on: the gradient at the pixels comes from small differences of features, and a
    quarter to two fifths of it would be bf16's rounding (`benchmarks/loss_precision.py`). TiTok does so too
    (modeling/modules/losses.py); RAE and LlamaGen run these networks under autocast.

    Args:
        l1_weight, l2_weight: mean absolute and mean squared error over all pixels.
        lpips_weight, lpips_network: see [`PerceptualLoss`].
        convnext_weight: see [`ConvNextLoss`].
        gradient_weight: see [`gradient_loss`].
        folder: of the weights of both.
    """

    def __init__(
        self,
        l1_weight: float,
        l2_weight: float,
        lpips_weight: float,
        lpips_network: str,
        convnext_weight: float = 0.0,
        folder: str | None = None,
        gradient_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights = {"l1": l1_weight, "l2": l2_weight, "gradient": gradient_weight}
        self.weights |= {"lpips": lpips_weight, "convnext": convnext_weight}
        self.lpips = PerceptualLoss(lpips_network, folder) if lpips_weight else None
        self.convnext = ConvNextLoss(folder) if convnext_weight else None

    def forward(
        self, reconstruction: torch.Tensor, original: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(B, 3, H, W) each -> the weighted sum and the terms."""
        losses = {"l1": F.l1_loss, "l2": F.mse_loss, "gradient": gradient_loss}
        losses |= {"lpips": self.lpips, "convnext": self.convnext}
        images = reconstruction.float(), original.float()
        with torch.autocast(reconstruction.device.type, enabled=False):
            terms = {name: losses[name](*images) for name, weight in self.weights.items() if weight}
        return sum(self.weights[name] * term for name, term in terms.items()), terms


# Adversarial losses, of logits of any shape (B, ...) ------------------------------------------------------------------


def generator_hinge(fake: torch.Tensor) -> torch.Tensor:
    """`-mean(fake)`: VQGAN, TiTok; RAE calls it vanilla."""
    return -fake.mean()


def generator_non_saturating(fake: torch.Tensor) -> torch.Tensor:
    """`softplus(-l)` of each image's mean logit `l`, averaged (SimVQ, taming/modules/losses/vqperceptual.py)."""
    return F.softplus(-fake.flatten(1).mean(1)).mean()


def discriminator_hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """VQGAN's, with its factor 1/2."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def discriminator_vanilla(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, VQGAN's, with its factor 1/2."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def discriminator_non_saturating(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each image's mean logit (SimVQ's, no factor)."""
    return F.softplus(-real.flatten(1).mean(1)).mean() + F.softplus(fake.flatten(1).mean(1)).mean()


GENERATOR_LOSSES = {"hinge": generator_hinge, "non_saturating": generator_non_saturating}
DISCRIMINATOR_LOSSES = {
    "hinge": discriminator_hinge,
    "vanilla": discriminator_vanilla,
    "non_saturating": discriminator_non_saturating,
}


def lecam(real: torch.Tensor, fake: torch.Tensor, real_average: torch.Tensor, fake_average: torch.Tensor):
    """LeCam regularization (Tseng et al. 2021) of mean logits against running averages of mean logits, as in TiTok."""
    return F.relu(real.mean() - fake_average).square() + F.relu(real_average - fake.mean()).square()


class WithGradient(torch.autograd.Function):
    """A number of which the gradient with respect to `pixels` is already known."""

    @staticmethod
    def forward(ctx, pixels: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_value: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * grad_value, None, None


def adaptive_weight(
    reconstruction: torch.Tensor, last_layer: torch.Tensor, direction: torch.Tensor, adversarial_direction: torch.Tensor
) -> torch.Tensor:
    """VQGAN's: the ratio of the lengths of two gradients at the last layer, at most 1e4 (epsilon 1e-6, as RAE has it).

    Args:
        reconstruction: (B, 3, H, W), in the graph of `last_layer`.
        last_layer: the weight of the decoder's last layer.
        direction, adversarial_direction: gradients of the two losses at `reconstruction`.
    """
    lengths = [
        torch.autograd.grad(reconstruction, last_layer, gradient, retain_graph=True)[0].norm()
        for gradient in (direction, adversarial_direction)
    ]
    return (lengths[0] / (lengths[1] + 1e-6)).clamp(0, 1e4)
