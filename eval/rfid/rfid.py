"""rFID: the Fréchet distance between Inception features of images and of their reconstructions."""

import zipfile
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as blocks
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x


_DESCRIPTION = """
The Fréchet Inception distance (Heusel et al. 2017) between reconstructions and their originals: how far apart the
Gaussians are that have the means and covariances of their 2,048 Inception features. Lower is better, 0 at best.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: reconstructions, RGB images of 8 bits.
    references: their originals; not needed with `reference_statistics`.
    weights: a local file with torch-fidelity's Inception weights (the same as pytorch-fid's); default: the cache of
        torch.hub, or a download of 91 MB.
    reference_statistics: an .npz file with `mu` and `sigma` of the originals, as pytorch-fid and ADM write, in place of
        references.

With `evaluate.load("eval/rfid", "features")` predictions and references are rows of features of your own; the result is
called frechet_distance, since only Inception's is an FID.

Returns:
    rfid: the distance.
    num_images: the number of reconstructions. Under about 10,000 the distance is biased upwards; compare only values of
        the same number.
Examples:

    >>> rfid = evaluate.load("eval/rfid")
    >>> rfid.compute(predictions=reconstructions, references=originals)
    {'rfid': 1.31, 'num_images': 50000}
"""

_CITATION = """
@inproceedings{heusel2017gans,
  title={{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={NeurIPS},
  year={2017}
}
"""


def load_inception_weights(path: str | Path | None = None) -> dict[str, torch.Tensor]:
    """The weights of FID's Inception, without unpickling anything but tensors.

    Args:
        path: a local file; `None`: the cache of torch.hub, or a download.

    Raises:
        OSError: no such file, or no network; says where the file belongs.
    """
    if path is not None:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file brings up that is another or damaged
            raise ValueError(f"{path} is damaged, or no file of weights: {type(error).__name__}.") from error
    url = blocks.URL_INCEPTION_V3
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except OSError as error:  # URLError is one
        raise OSError(
            f"The Inception weights cannot be downloaded ({error}): pass the file of {url} as `weights`, or put it "
            f"into {torch.hub.get_dir()}/checkpoints."
        ) from error


class InceptionV3(nn.Module):
    """The Inception of FID up to its 2,048 pooled features, from torch-fidelity's blocks; `logits` goes on from there.

    Args:
        weights: of `load_inception_weights`.
        preprocessing: "torch-fidelity": 8-bit images, resized to 299 px as TensorFlow 1 did, `(x - 128) / 128`.
            "pytorch-fid": pixels in [0, 1], `F.interpolate(mode="bilinear")`, `2 x - 1`.
        dtype: torch.float32, or torch.float64 as in TiTok's evaluator.

    Raises:
        ValueError: the weights are of another network.
    """

    num_features = 2048

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        preprocessing: str = "torch-fidelity",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, layer in {
            "Conv2d_1a_3x3": blocks.BasicConv2d(3, 32, kernel_size=3, stride=2),
            "Conv2d_2a_3x3": blocks.BasicConv2d(32, 32, kernel_size=3),
            "Conv2d_2b_3x3": blocks.BasicConv2d(32, 64, kernel_size=3, padding=1),
            "MaxPool_1": nn.MaxPool2d(kernel_size=3, stride=2),
            "Conv2d_3b_1x1": blocks.BasicConv2d(64, 80, kernel_size=1),
            "Conv2d_4a_3x3": blocks.BasicConv2d(80, 192, kernel_size=3),
            "MaxPool_2": nn.MaxPool2d(kernel_size=3, stride=2),
            "Mixed_5b": blocks.InceptionA(192, pool_features=32),
            "Mixed_5c": blocks.InceptionA(256, pool_features=64),
            "Mixed_5d": blocks.InceptionA(288, pool_features=64),
            "Mixed_6a": blocks.InceptionB(288),
            "Mixed_6b": blocks.InceptionC(768, channels_7x7=128),
            "Mixed_6c": blocks.InceptionC(768, channels_7x7=160),
            "Mixed_6d": blocks.InceptionC(768, channels_7x7=160),
            "Mixed_6e": blocks.InceptionC(768, channels_7x7=192),
            "Mixed_7a": blocks.InceptionD(768),
            "Mixed_7b": blocks.InceptionE_1(1280),
            "Mixed_7c": blocks.InceptionE_2(2048),
        }.items():
            self.add_module(name, layer)
        own = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}  # the classifier
        try:
            self.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"These are not the weights of FID's Inception (torch-fidelity's file): {error}") from None
        self.register_buffer("classifier", weights.get("fc.weight"), persistent=False)  # of no part in features
        self.preprocessing = preprocessing
        self.dtype = dtype
        self.to(dtype).requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), uint8 or in [0, 1] as `preprocessing` says, to (B, 2048)."""
        if self.preprocessing == "pytorch-fid":
            x = F.interpolate(images.to(self.dtype), size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
        else:
            x = interpolate_bilinear_2d_like_tensorflow1x(images.to(self.dtype), size=(299, 299), align_corners=False)
            x = (x - 128) / 128
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 2048) features to (B, 1008) logits without the classifier's biases, of which the Inception score is."""
        return features @ self.classifier.T


class Moments:
    """Mean and covariance of features in memory that does not grow with their number: sums in float64.

    Args:
        num_features: width of the features.
        device: where the sums are.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """features: (B, num_features)."""
        features = features.double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.products.addmm_(features.T, features)

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (num_features,) and unbiased covariance (num_features, num_features); zero for one image."""
        mean = self.sum / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1).clamp_min(1)
        return mean, covariance


def frechet_distance(
    mean1: torch.Tensor, covariance1: torch.Tensor, mean2: torch.Tensor, covariance2: torch.Tensor
) -> float:
    """Squared Fréchet distance of two Gaussians, `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)`.

    The trace of the root is the sum of the singular values of `S1^1/2 S2^1/2`: real and not negative whatever the rank,
    so that fewer images than features are no special case.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric.

    Raises:
        ValueError: statistics of different width.
    """
    if mean1.shape != mean2.shape:
        raise ValueError(f"Statistics of {len(mean1)} and of {len(mean2)} features cannot be compared.")
    roots = []
    for covariance in (covariance1.double(), covariance2.double()):
        variances, directions = torch.linalg.eigh(covariance)
        rank = variances > variances[-1] * len(variances) * torch.finfo(torch.float64).eps  # the rest is rounding
        roots.append(directions[:, rank] * variances[rank].sqrt())
    trace_of_root = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    difference = mean1.double() - mean2.double()
    distance = difference.dot(difference) + covariance1.trace() + covariance2.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def load_statistics(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance from an .npz file with `mu` and `sigma` (pytorch-fid, ADM); no pickles.

    Raises:
        ValueError: it has not both, or not of fitting shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            arrays = [torch.from_numpy(np.asarray(file[x], dtype=np.float64)) for x in ("mu", "sigma") if x in file]
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file of numbers: {error}") from error
    if len(arrays) < 2:
        raise ValueError(f"{path} holds {names}, but no 'mu' and 'sigma': it is no file of statistics.")
    mean, covariance = arrays
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit together.")
    return mean, covariance


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RFID(evaluate.Metric):
    def _info(self):
        kind = datasets.Sequence(datasets.Value("float64")) if self.config_name == "features" else datasets.Image()
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": kind, "references": kind}),
            reference_urls=["https://arxiv.org/abs/1706.08500", "https://github.com/toshas/torch-fidelity"],
        )

    def compute(self, *, predictions=None, references=None, reference_statistics=None, **kwargs):
        """As of any metric; with `reference_statistics` there are no references."""
        if reference_statistics is not None:
            if references is not None:
                raise ValueError("Pass references or reference_statistics, not both.")
            references = predictions  # evaluate wants both; they are not looked at
            kwargs["reference_statistics"] = reference_statistics
        return super().compute(predictions=predictions, references=references, **kwargs)

    @torch.no_grad()
    def _compute(self, predictions, references, weights=None, reference_statistics=None):
        if self.config_name == "features":
            statistics = [torch.tensor(rows, dtype=torch.float64) for rows in (predictions, references)]
            moments = [Moments(rows.shape[1]) for rows in statistics]
            for sums, rows in zip(moments, statistics):
                sums.update(rows)
            distance = frechet_distance(*moments[0].compute(), *moments[1].compute())
            return {"frechet_distance": distance, "num_images": len(predictions)}
        network = InceptionV3(load_inception_weights(weights))
        statistics = []
        for images, known in ((predictions, None), (references, reference_statistics)):
            if known is not None:
                statistics += load_statistics(known)
                continue
            moments = Moments(network.num_features)
            for image in images:  # of any sizes
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
                moments.update(network(pixels[None]))
            statistics += moments.compute()
        return {"rfid": frechet_distance(*statistics), "num_images": len(predictions)}
