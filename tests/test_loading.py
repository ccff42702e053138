"""The three ways in: a clone, an installation, and AutoModel on a machine that has never seen the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from configuration_simvq_gan import SimVQGANConfig
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from modeling_simvq_gan import SimVQGANModel


ROOT = Path(__file__).parents[1]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def finish(arguments, cwd, seconds: float = 900, **environment) -> subprocess.CompletedProcess:
    """A Python process, and what it prints, at its end; after `seconds` it is ended, with all that it started."""
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher ends its workers, which would hold the pipes open for ever
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(code_or_arguments, cwd, **environment) -> str:
    """Standard output of a fresh Python process outside the repository, which knows the repository only if one of its
    scripts runs as a module."""
    arguments = ["-c", code_or_arguments] if isinstance(code_or_arguments, str) else code_or_arguments
    known = arguments[0] == "-m" and (ROOT / arguments[1].split(".")[0]).is_dir()
    done = finish(arguments, cwd, **{"PYTHONPATH": str(ROOT) if known else "", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_a_test_starts_comes_to_an_end(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        finish(["-c", "import time; time.sleep(600)"], tmp_path, seconds=1)


def test_from_a_clone(tmp_path):
    assert "--encoder_name_or_path" in run([str(ROOT / "train_hf.py"), "--help"], tmp_path)
    assert "--inception_weights" in run(["-m", "eval.reconstruction", "--help"], tmp_path)


def test_after_pip_install(tmp_path):
    target = tmp_path / "site"
    run(
        ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(ROOT)],
        tmp_path,
    )
    code = "import modeling_simvq as m; print(m.__file__, m.VQRAEModel.__name__, m.VQRAEConfig.__name__)"
    assert run(code, tmp_path, PYTHONPATH=str(target)).split() == [
        str(target / "modeling_simvq.py"),
        "VQRAEModel",
        "VQRAEConfig",
    ]
    assert sorted(path.name for path in target.glob("*.py")) == [
        "configuration_simvq.py",
        "configuration_simvq_gan.py",
        "decoding_simvq.py",
        "fitting_simvq.py",
        "image_processing_simvq.py",
        "modeling_simvq.py",
        "modeling_simvq_gan.py",
        "quantization_simvq.py",
        "tokenizer_simvq.py",
    ]


def test_automodel_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(codebook_dim=8)).eval()
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    VQRAEImageProcessor.for_image_size(32).save_pretrained(checkpoint)
    pixels = torch.rand(1, 3, 32, 32)
    torch.save({"pixels": pixels, "tokens": model(pixels).image_tokens}, tmp_path / "expected.pt")
    code = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("checkpoint", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("checkpoint", trust_remote_code=True)
expected = torch.load("expected.pt", weights_only=True)
assert not model.training and not any(p.requires_grad for p in model.encoder.parameters())
output = model(expected["pixels"])
assert torch.equal(output.image_tokens, expected["tokens"])
image = Image.new("RGB", (50, 40), (255, 0, 0))
pixels = processor(image, return_tensors="pt").pixel_values
assert processor.postprocess(model(pixels).decoded_pixel_values)[0].size == (32, 32)
print(type(model).__module__)
"""
    module = run(code, tmp_path, HF_HOME=str(tmp_path / "home"))
    assert "transformers_modules" in module


@pytest.mark.parametrize("kind", ["vqrae", "simvq_gan"])
def test_auto_classes_need_no_trust_where_our_code_is_imported(kind, tmp_path):
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "image_size": 32}
    model = VQRAEModel(tiny_config()) if kind == "vqrae" else SimVQGANModel(SimVQGANConfig(**sizes, codebook_size=64))
    model.save_pretrained(tmp_path)
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VQRAEImageProcessor
