"""One pass over images for the features of them: saved for a resumption, and joined."""

import hashlib

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from eval.crops import different_sizes
from eval.evaluation import Networks
from eval.protocol import Protocol


class ImageFeatures:
    """Features of images by each network, to be filled by `eval.reconstruction.evaluate`.

    After `join`, `features` has (N, D) by the name of the network ("rfid" is Inception, "fd_..." the others), and
    Inception's `logits`, in the order of the images, float32 on the CPU.

    Args:
        protocol: of the crop, and of what Inception sees.
        networks: those of `frechet` are used.
    """

    def __init__(self, protocol: Protocol, networks: Networks) -> None:
        self.protocol, self.networks = protocol, networks
        self.features: dict[str, list[torch.Tensor] | torch.Tensor] = {}
        self.index: list[int] = []  # of each image in the data
        self.digests: list[str] = []  # of their pixels
        self.skipped: list[tuple[int, str]] = []  # index and message
        self.size: list[int] | None = None  # height and width of the images
        self.seconds = 0.0

    def update(self, batch: int, index: list[int], images: torch.Tensor, *_) -> list[int]:
        """Adds (B, 3, H, W) of uint8, the images number `index` of the data; none of them is left out."""
        self.size = self.size or list(images.shape[2:])
        if list(images.shape[2:]) != self.size:
            raise ValueError(different_sizes(self.size, images.shape[2:]))
        for name, network in self.networks.frechet.items():
            floats = name == "rfid" and self.protocol.inception == "pytorch-fid"
            features = network(images / 255 if floats else images)
            self.features.setdefault(name, []).append(features.float().cpu())
            if name == "rfid" and network.classifier is not None:
                self.features.setdefault("logits", []).append(network.logits(features).float().cpu())
        self.index += index
        self.digests += [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images.cpu()]
        return []

    def state_dict(self) -> dict:
        """What a resumption needs: tensors, numbers and text."""
        names = ("features", "index", "digests", "skipped", "size", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Takes up what `state_dict` gave; features stay on the CPU."""
        self.__dict__.update(state)

    def join(self) -> None:
        """Joins the parts of all processes, on each of them, in the order of the images.

        Raises:
            ValueError: there are no images, or they differ in size.
        """
        parts = gather_object([self.state_dict()]) if PartialState().num_processes > 1 else [self.state_dict()]
        index = [number for part in parts for number in part["index"]]
        if not index:
            raise ValueError("There are no images whose features could be computed: none of them could be read.")
        sizes = [part["size"] for part in parts if part["size"]]
        for size in sizes:
            if size != sizes[0]:
                raise ValueError(different_sizes(sizes[0], size))
        order = sorted(range(len(index)), key=index.__getitem__)
        digests = [digest for part in parts for digest in part["digests"]]
        self.index, self.digests = [index[i] for i in order], [digests[i] for i in order]
        names = sorted({name for part in parts for name in part["features"]})
        self.features = {
            name: torch.cat([rows for part in parts for rows in part["features"].get(name, [])])[order]
            for name in names
        }
        self.skipped = sorted(value for part in parts for value in part["skipped"])
        self.size = sizes[0]
        self.seconds = max(part["seconds"] for part in parts)

    def fingerprint(self) -> str:
        """SHA-256 of the pixels of all images, cropped, in their order."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()
