"""The pretrained networks of the metrics: loading them, and saying what to do where they cannot be had."""

import hashlib
import importlib
import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from torchvision.transforms.functional import normalize
from transformers import AutoConfig, AutoModel

from eval.evaluation import Networks
from eval.lpips.lpips import load_lpips
from eval.protocol import Protocol
from eval.rfid.rfid import InceptionV3, load_inception_weights, load_statistics
from modeling_simvq import read_pixel_statistics
from reading.models import MODELS, loading


_HINTS = {
    "rfid": "pass --inception_weights weights-inception-2015-12-05-6726825d.pth (releases of toshas/torch-fidelity)",
    "lpips_alex": "put torchvision's alexnet-owt-7be5be79.pth into $TORCH_HOME/hub/checkpoints",
    "lpips_vgg": "put torchvision's vgg16-397923af.pth into $TORCH_HOME/hub/checkpoints",
}


class VisionFeatures(nn.Module):
    """Features of whole images by a vision model of transformers, for a Frechet distance: its pooled output (for DINOv2
    the class token after the last norm, as in dgm-eval, Stein et al. 2023), or the mean of its tokens.

    Args:
        name_or_path: hub repository or folder; of an image-text model, its vision part.

    Raises:
        ValueError: its pixel statistics are not known, or it is a tokenizer of this repository.
    """

    def __init__(self, name_or_path: str) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type in MODELS:
            raise ValueError(
                f"{name_or_path} is an image tokenizer, not a vision model of transformers: name the encoder it was "
                "made with, or a function of yours, module:function."
            )
        config = getattr(config, "vision_config", config)
        self.network = AutoModel.from_pretrained(name_or_path, config=config, dtype=torch.float32)
        statistics, size = read_pixel_statistics(name_or_path, config.model_type)
        if not statistics:
            raise ValueError(
                f"{name_or_path} has no preprocessor_config.json, and the pixel statistics of "
                f"'{config.model_type}' are not known here: save its image processor beside it."
            )
        # 224 px as in dgm-eval: DINOv2's configuration has 518, the size of its positions
        self.statistics, self.size = (statistics["image_mean"], statistics["image_std"]), size or 224
        self.register_buffer("seen_as", torch.tensor([*self.statistics, [self.size] * 3]))  # for the hash of the whole
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), uint8 -> (B, D)."""
        pixels = F.interpolate(images / 255, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        output = self.network(normalize(pixels, *self.statistics))
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state.mean(1) if pooled is None else pooled


def load_object(name: str):
    """What `module:name` names.

    Raises:
        ValueError: it is no such name, or the module has none.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"'{name}' must be module:function.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'{name}' cannot be imported ({error}): is its folder in PYTHONPATH?") from error


def source_hash(function) -> str | None:
    """SHA-256 of the file that a function is from; `None` where there is no such file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # built in
        return None


def load_networks(
    protocol: Protocol,
    device: torch.device,
    inception_weights: str | None = None,
    features: list[str] = (),
    reference_statistics: str | None = None,
    names: list[str] | None = None,
) -> tuple[Networks, dict[str, str], dict[str, str]]:
    """The networks that a protocol asks for, as far as their weights can be had.

    Args:
        protocol: see [`Protocol`].
        device: where they run.
        inception_weights: a local file; `None`: torch.hub's cache, or a download.
        features: further Frechet distances: vision models of transformers, or `module:function` from (B, 3, H, W) of
            uint8 to (B, D).
        reference_statistics: an .npz file with `mu` and `sigma`, in place of the originals in rFID.
        names: of the protocol's metrics, those that are wanted; `None`: all. `features` come on top.

    Returns:
        The networks; for those left out, the reason by name; for the others, by name, the SHA-256 of their weights, of
        the source file of a function, and of the reference statistics ("reference_statistics").

    Raises:
        ValueError: a file or features that were named cannot be used.
    """
    if inception_weights and not Path(inception_weights).is_file():
        raise ValueError(f"There is no file {inception_weights} (--inception_weights).")

    def inception():
        dtype = getattr(torch, protocol.inception_dtype)
        return InceptionV3(load_inception_weights(inception_weights), protocol.inception, dtype)

    builders = {f"lpips_{name}": lambda name=name: load_lpips(name) for name in protocol.lpips_networks}
    if protocol.inception:
        builders = {"rfid": inception} | builders
    networks, reasons, hashes = Networks(), {}, {}
    for name, build in builders.items():
        if names is not None and name not in names:
            reasons[name] = "not asked for"
            continue
        print(f"Loading the network of {name} (its weights are downloaded if they are not cached).", flush=True)
        try:
            network = build()
        except (OSError, RuntimeError, ModuleNotFoundError) as error:  # URLError is an OSError
            reasons[name] = f"weights not available ({error}); {_HINTS[name]}"
            print(f"{name} is left out: {reasons[name]}", flush=True)
            continue
        (networks.frechet if name == "rfid" else networks.lpips)[name] = network
    # a network that one process cannot have is used by none: its images would be missing from the sums
    for name in {name for part in gather_object([reasons]) for name in part}:
        reasons.setdefault(name, "weights not available on another process")
        networks.frechet.pop(name, None), networks.lpips.pop(name, None)
    for name, network in (networks.frechet | networks.lpips).items():
        hashes[name] = weights_hash(network.to(device))
    if reference_statistics and "rfid" in networks.frechet:
        networks.reference_statistics["rfid"] = statistics = load_statistics(reference_statistics)
        if len(statistics[0]) != (width := networks.frechet["rfid"].num_features):
            raise ValueError(
                f"{reference_statistics} is of {len(statistics[0])} features, and Inception has {width}: pass the "
                "statistics of FID's Inception."
            )
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in statistics))
        hashes["reference_statistics"] = digest.hexdigest()
    for feature in features:
        name = "fd_" + feature.rstrip("/").replace(":", "/").split("/")[-1]
        if name in networks.frechet:
            raise ValueError(f"Two --features would be called {name}: rename one.")
        if ":" in feature:
            network = load_object(feature)
        else:
            with loading(feature):
                network = VisionFeatures(feature).to(device)
        networks.frechet[name] = network
        hashes[name] = weights_hash(network) if isinstance(network, nn.Module) else source_hash(network)
    return networks, reasons, hashes


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the names, shapes, types and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
