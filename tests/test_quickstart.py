"""The README's first command, and the checkpoint that it loads."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from generators import TINY, make_tokenizer
from huggingface_hub import ModelCard
from PIL import Image
from test_loading import ROOT, run

from eval import reconstruction
from eval.commands import ends_in_one_line
from eval.results import weights_file_hash
from examples import quickstart
from generation import train
from generation.vocabulary import Vocabulary
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import find_images
from reading.models import tokenizer_hash
from training.data import split_files


CODE = ("configuration_simvq.py", "decoding_simvq.py", "fitting_simvq.py", "image_processing_simvq.py")
CODE += ("modeling_simvq.py", "quantization_simvq.py", "tokenizer_simvq.py")
CHECKPOINT = ROOT / "checkpoints" / "vqrae-dinov2-small"


def test_quick_start_reconstructs_fine_tunes_measures_and_writes_its_page(tmp_path, monkeypatch, capsys):
    """With a tiny model, and two steps in place of the recipe's."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config())
    model.initialize_codebook([torch.rand(16, 3, 32, 32)])
    model.save_pretrained(tmp_path / "tiny")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "tiny")
    painter = make_tokenizer(tmp_path / "painter")
    words = Vocabulary(
        16, 4, 4, "class", tokenizer_hash(painter), str(tmp_path / "painter"), class_names=["dots", "stripes"]
    )
    train.make_model(train.GeneratorArguments(model_config=json.loads(TINY)), words).save_pretrained(tmp_path / "llama")
    words.save(tmp_path / "llama")
    monkeypatch.setattr(quickstart, "GENERATOR", str(tmp_path / "llama"))
    monkeypatch.setattr(quickstart, "CHECKPOINT", str(tmp_path / "tiny"))
    monkeypatch.setattr(quickstart, "OUTPUT", str(tmp_path / "out"))
    commands = []

    def with_tiny_model(*command):
        commands.append(command)
        if command[0] == "train_hf.py":
            command += ("--model_name_or_path", str(tmp_path / "tiny"), "--image_size", "32", "--max_steps", "2")
            command += ("--output_dir", str(tmp_path / "out"), "--token_passes", "1", "--max_train_samples", "16")
        run_command(*command)

    run_command = quickstart.run
    monkeypatch.setattr(quickstart, "run", with_tiny_model)
    quickstart.main()
    assert [command[0] for command in commands] == ["-m", "train_hf.py", "-m", "-m"]
    page = (tmp_path / "out" / "quickstart.html").read_text()
    assert "data:image/png;base64," in page
    for when in ("before", "after"):
        results = json.loads((tmp_path / "out" / when / "results.json").read_text())
        assert results["num_images"] == 43 and f"<td>{results['metrics']['psnr']:.4g}</td>" in page
    with Image.open(tmp_path / "out" / "quickstart.png") as picture:
        assert picture.size == (8 * 34 + 2, 5 * 34 + 2)  # five rows of eight images of 32 px
    assert str(tmp_path / "out" / "quickstart.html") in capsys.readouterr().out


def test_a_command_that_does_not_end_well_ends_the_quick_start(monkeypatch, capsys):
    """The command has said why; nothing of what would follow is done."""
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    with pytest.raises(SystemExit) as end, ends_in_one_line():
        quickstart.run("-c", "raise SystemExit(3)")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("quickstart.py: error: the command above did not end well")


def test_new_images_of_an_earlier_version_are_in_nobodys_way(tmp_path, monkeypatch):
    """Of another generator, they ended the quick start after a `git pull`."""
    folder = tmp_path / quickstart.OUTPUT / "new_images"
    folder.mkdir(parents=True)
    (folder / "samples.json").write_text("{}")

    def draw(*command):
        folder.mkdir()
        Image.new("RGB", (4, 4), "red").save(folder / "000000.png")

    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "run", draw)
    made = quickstart.new_images(1, torch.Size([8, 8]))
    assert made.shape == (1, 3, 8, 8) and not (folder / "samples.json").exists()


def test_what_is_trained_on_is_not_what_is_held_out():
    train, heldout = ((ROOT / "examples" / f"{name}.txt").read_text().split() for name in ("train", "heldout"))
    assert len(train) == 275 and len(heldout) == 43 and not set(train) & set(heldout)
    sources = [{Path(name).name.split("-")[1].split(".")[0] for name in names} for names in (train, heldout)]
    assert not sources[0] & sources[1]
    assert all((ROOT / name).is_file() for name in train + heldout)
    assert {f"examples/images/{name}" for name in quickstart.SHOWN if name.startswith("emoji")} <= set(heldout)


def test_checkpoint_works_from_another_folder(tmp_path):
    """As in its card; on a photograph that was in no training."""
    code = f"""
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained({str(CHECKPOINT)!r}, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained({str(CHECKPOINT)!r}, trust_remote_code=True)
pixels = processor(Image.open({str(ROOT / "examples/images/chelsea.jpg")!r}), return_tensors="pt").pixel_values
with torch.no_grad():
    tokens = model.encode(pixels).image_tokens
    decoded = model.decode(tokens).decoded_pixel_values
    assert torch.equal(decoded, model(pixels).decoded_pixel_values)
assert model.dtype == torch.float32 and len(tokens.unique()) > 100
psnr = -10 * (decoded.clamp(0, 1) - pixels).square().mean().log10()
assert psnr > 24, psnr
"""
    run(code, tmp_path, HF_HOME=str(tmp_path / "home"))


def test_checkpoint_is_small_and_its_card_is_of_its_weights():
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 60e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for name in CODE:
        assert (CHECKPOINT / name).read_text().split() == (ROOT / name).read_text().split(), name
    card = ModelCard.load(CHECKPOINT / "README.md")
    own = weights_file_hash(CHECKPOINT)
    assert card.data.eval_results and all(r.metric_args["model_sha256"] == own for r in card.data.eval_results)


def measured_and_told(data: str, protocol: str, folder: Path, monkeypatch) -> tuple[dict, dict]:
    """Metrics of the checkpoint on images, and what its card says of the same pixels, by name."""
    command = ["--model_name_or_path", str(CHECKPOINT), "--protocol", protocol, "--network_metrics", "--data", data]
    monkeypatch.setattr(sys, "argv", ["reconstruction.py", *command, "--output_dir", str(folder)])
    reconstruction.main()
    result = json.loads((folder / "results.json").read_text())
    results = ModelCard.load(CHECKPOINT / "README.md").data.eval_results
    same = [r for r in results if r.metric_args["pixels_sha256"] == result["data"]["pixels_sha256"]]
    return result["metrics"], {r.metric_type: r.metric_value for r in same}


def protocol_without(folder: Path, **left_out) -> str:
    """The protocol default without what takes long."""
    default = json.loads((ROOT / "eval" / "protocols" / "default.json").read_text())
    (folder / "quick.json").write_text(json.dumps(default | left_out))
    return str(folder / "quick.json")


def test_all_numbers_of_the_card_are_those_of_the_four_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the list names files from here
    protocol = protocol_without(tmp_path, flat_colours=False)
    measured, told = measured_and_told("examples/photographs.txt", protocol, tmp_path / "out", monkeypatch)
    assert {"psnr", "ssim", "ms_ssim", "semantic_agreement", "codebook_perplexity"} <= told.keys()
    for name in told.keys() - {"lpips_alex", "lpips_vgg"}:
        if not name.startswith("flat_colours"):
            assert measured[name] == pytest.approx(told[name], rel=1e-3), name


@pytest.mark.skipif("VQRAE_ASSETS" not in os.environ, reason="needs the photographs (VQRAE_ASSETS)")
def test_metrics_of_the_card_are_measured_again(tmp_path, monkeypatch):
    """On all of its held-out photographs."""
    photos = split_files(find_images(Path(os.environ["VQRAE_ASSETS"]) / "photos"), 0.15, "-")[1]
    (tmp_path / "heldout_photos.txt").write_text("".join(f"{file}\n" for file in photos))
    protocol = protocol_without(tmp_path, flat_colours=False, semantic_agreement=False, ms_ssim=False)
    data = str(tmp_path / "heldout_photos.txt")
    measured, told = measured_and_told(data, protocol, tmp_path / "out", monkeypatch)
    for name in ("psnr", "ssim"):
        assert measured[name] == pytest.approx(told[name], rel=1e-3), name
