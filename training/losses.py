"""Losses of the reconstruction."""

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) of pixels nominally in [0, 1], with gradients; a scalar, the mean over the batch.

    Args:
        network: "vgg" or "alex".

    Raises:
        RuntimeError: the backbone's weights are not in the torch hub cache and cannot be downloaded.
    """

    def __init__(self, network: str = "vgg") -> None:
        super().__init__()
        try:
            # its network alone: the metric around it refuses pixels that overshoot
            self.network = LearnedPerceptualImagePatchSimilarity(net_type=network).net
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise RuntimeError(
                f"The {network} weights of LPIPS cannot be had ({error}). Put torchvision's checkpoint into "
                "$TORCH_HOME/hub/checkpoints, or train without: --lpips_weight 0."
            ) from error
        self.requires_grad_(False)

    def forward(self, reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return self.network(reconstruction, original, normalize=True).mean()


class ReconstructionLoss(nn.Module):
    """Weighted sum of pixel and perceptual losses, and its terms by name (unweighted). A weight of 0 leaves a term out.

    Args:
        l1_weight, l2_weight: mean absolute and mean squared error over all pixels.
        lpips_weight, lpips_network: see [`PerceptualLoss`].
    """

    def __init__(self, l1_weight: float, l2_weight: float, lpips_weight: float, lpips_network: str) -> None:
        super().__init__()
        self.weights = {"l1": l1_weight, "l2": l2_weight, "lpips": lpips_weight}
        self.lpips = PerceptualLoss(lpips_network) if lpips_weight else None

    def forward(
        self, reconstruction: torch.Tensor, original: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(B, 3, H, W) each -> the weighted sum and the terms."""
        losses = {"l1": F.l1_loss, "l2": F.mse_loss, "lpips": self.lpips}
        terms = {name: losses[name](reconstruction, original) for name, weight in self.weights.items() if weight}
        return sum(self.weights[name] * term for name, term in terms.items()), terms
