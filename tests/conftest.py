"""Tiny models and images; no downloads."""

import os
import sys
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once: else a GPU's products are not the same bits each time
if "PYTEST_XDIST_WORKER" in os.environ:
    # processes of one run share the cores, and must not write the same copies of the code beside checkpoints
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    run = f"{os.environ['PYTEST_XDIST_TESTRUNUID']}-{os.environ['PYTEST_XDIST_WORKER']}"
    os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), run)

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from configuration_simvq import VQRAEConfig
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel


ENCODERS = {
    "siglip_vision_model": {},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": {"num_register_tokens": 4},
    "vit_mae": {},
    "clip_vision_model": {},
    "vit": {},
    "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
}


def encoder_config(model_type: str = "dinov2", **overrides) -> dict:
    """32 px, patch 8: a grid of 4 x 4."""
    config = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"image_size": 32, "patch_size": 8, "intermediate_size": 64} | ENCODERS[model_type] | overrides
    if "mlp_ratio" in config:
        del config["intermediate_size"]
    return config


def tiny_config(model_type: str = "dinov2", **overrides) -> VQRAEConfig:
    fields = {"encoder_config": encoder_config(model_type), "image_size": 32, "decoder_patch_size": 8}
    return VQRAEConfig(**{**fields, "codebook_size": 64, **overrides})


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return VQRAEModel(tiny_config())


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def image_folder(tmp_path):
    """12 images of 4 sources."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for source in "abcd":
        for number in range(3):
            noise = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).resize((48, 40)).save(folder / f"{source}-{number}.png")
    return folder


# Devices --------------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """What holds on a CPU holds on a GPU."""
    return torch.device(request.param)


@pytest.fixture
def same_bits(device):
    """On a GPU, algorithms that round alike every time, where others are faster; an operation that has none raises."""
    torch.use_deterministic_algorithms(device.type == "cuda")
    yield
    torch.use_deterministic_algorithms(False)


# Evaluation -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pair():
    """Three photographs and noisy ones, (3, 3, 128, 128) of uint8; of very different error."""
    images = [
        photographs.astronaut()[:128, 100:228],
        photographs.coffee()[:128, :128],
        photographs.chelsea()[:128, :128],
    ]
    real = np.stack(images)
    noise = np.random.default_rng(0).normal(size=real.shape) * np.array([2, 20, 60]).reshape(-1, 1, 1, 1)
    fake = (real + noise).clip(0, 255).astype(np.uint8)
    return tuple(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (real, fake))


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights of torch-fidelity's network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:  # its own layers, without weights
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # keeps activations at their size
    torch.save(network.state_dict(), path)
    return path


class MeanColors(torch.nn.Module):
    """Features for a Frechet distance without weights: local means and contrasts."""

    def forward(self, images):
        cells = images.float().unfold(2, 16, 16).unfold(3, 16, 16).flatten(4)
        return torch.cat([cells.mean(-1), cells.diff(dim=-1).abs().mean(-1)], 1).flatten(1)[:, ::7]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs eval/reconstruction.py in `tmp_path`; gives what it prints or, with `fails`, the text of its error."""
    from eval import reconstruction

    def run_it(*arguments, fails: bool = False) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["reconstruction.py", *map(str, arguments)])
        if not fails:
            reconstruction.main()
            return capsys.readouterr().out
        with pytest.raises((SystemExit, ValueError, RuntimeError)) as error:
            reconstruction.main()
        return f"{capsys.readouterr().err} {error.value}"

    return run_it


@pytest.fixture
def saved_model(tmp_path):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "model")
    return model


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path, monkeypatch, saved_model):
    """A folder with a tokenizer and 14 images of two classes, of several sizes."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for number in range(14):
        file = tmp_path / "images" / ("cats" if number < 5 else "dogs") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(((26, 40, 17)[number % 3], (30, 19)[number % 2])).save(file)
    return tmp_path
