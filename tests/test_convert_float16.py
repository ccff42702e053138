"""A trained tokenizer in half the bytes."""

import json

import pytest
import torch
from conftest import tiny_config
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loading import run
from test_training import make_trainer
from transformers.image_utils import PILImageResampling

from convert import float16
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import find_images
from reading.models import load_pretrained


@pytest.fixture
def trained(tmp_path, image_folder):
    torch.manual_seed(0)
    trainer = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path / "mine")
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return tmp_path / "mine"


def test_all_is_rounded_but_the_layer_that_moves_the_codes_and_is_loaded_as_float32(trained, tmp_path, image_folder):
    float16.main(["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "half")])
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "half"))
    for name, tensor in before.items():
        if name.startswith("quantizer.embedding_proj."):
            assert torch.equal(after[name], tensor)
        else:
            assert after[name].dtype == torch.float16 and torch.equal(after[name], tensor.half())
    code = f"""
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "half")!r}, trust_remote_code=True)
AutoImageProcessor.from_pretrained({str(tmp_path / "half")!r}, trust_remote_code=True)
assert {{str(p.dtype) for p in model.state_dict().values()}} == {{"torch.float32"}}
"""
    run(code, tmp_path, HF_HOME=str(tmp_path / "home"))
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["freeze_encoder"]


def test_card_tells_of_the_rounding_and_keeps_the_rest_but_no_numbers_of_other_weights(trained, tmp_path):
    card = ModelCard.load(trained / "README.md")
    card.data.model_name = "mine"
    card.data.eval_results = [EvalResult("image-to-image", "d", "d", "psnr", 20.0)]
    card.save(trained / "README.md")
    float16.main(["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "half")])
    half = ModelCard.load(tmp_path / "half" / "README.md")
    text, told = half.text, "held-out images after step"
    assert not half.data.eval_results and f"Before rounding, {told}" in text
    assert "float16" in text and "raw_weights" not in text and 'from_pretrained("half"' in text
    rest = card.text.partition("## Training")[2]
    assert rest.replace("Held-out images after step", f"Before rounding, {told}") == text.partition("## Training")[2]
    assert list((tmp_path / "half" / "reconstructions").glob("*.png"))


def test_comparison_counts_tokens_and_pixels_that_differ(trained, tmp_path, image_folder):
    float16.main(["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "half")])
    source, rounded = (load_pretrained(str(folder), {}).eval() for folder in (trained, tmp_path / "half"))
    assert "12 images" in float16.compare(source, rounded, str(image_folder))
    with torch.no_grad():
        rounded.quantizer.embedding_proj.bias.add_(100.0)  # every token another one, or nearly
    told = float16.compare(source, rounded, str(image_folder))
    assert float(told.split(": ")[1].split("%")[0]) < 50


def test_comparison_sees_images_of_the_whole_folder_as_the_models_own_processor_makes_them(trained, image_folder):
    settings = trained / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"resample": PILImageResampling.NEAREST}))
    model, seen = load_pretrained(str(trained), {}).eval(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert "4 images" in float16.compare(model, model, str(image_folder), max_images=4)
    processor = VQRAEImageProcessor.for_image_size(32)
    processor.resample = PILImageResampling.NEAREST
    images = [Image.open(file) for file in find_images(image_folder)[::3]]
    assert torch.equal(torch.cat(seen[::2]), processor(images, return_tensors="pt").pixel_values)


def test_values_beyond_float16_are_refused_and_nothing_is_left(trained, tmp_path):
    tensors = load_file(trained / "model.safetensors")
    tensors["decoder.cls_token"].fill_(1e6)
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="decoder.cls_token"):
        float16.main(["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "half")])
    assert {path.name for path in tmp_path.iterdir()} == {"images", "mine"}
