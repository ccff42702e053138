import json
import runpy

import pytest
from conftest import encoder_config, tiny_config

import configuration_simvq
from configuration_simvq import VQRAEConfig
from configuration_simvq_gan import SimVQGANConfig


def test_json_round_trip(tmp_path):
    config = tiny_config(codebook_dim=8, image_mean=[0.1, 0.2, 0.3], noise_tau=0.5, encoder_layers=(0, 2))
    config.save_pretrained(tmp_path)
    assert VQRAEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_default_is_a_siglip_encoder_with_16384_codes_and_a_symmetric_decoder():
    config = VQRAEConfig()
    assert config.encoder_config.model_type == "siglip_vision_model"
    assert (config.image_size, config.decoder_patch_size, config.codebook_size) == (256, 16, 16384)
    assert config.decoder_hidden_size == config.encoder_config.hidden_size
    assert config.decoder_num_hidden_layers == config.encoder_config.num_hidden_layers
    assert config.legacy and config.use_simvq and config.freeze_encoder and config.commitment_cost == 0.25


@pytest.mark.parametrize(
    "fields, numbers",
    [
        ({"image_size": 64}, ("4 x 4", "8 x 8")),
        ({"image_size": 36}, ("36", "8")),
        ({"encoder_input_size": 33}, ("33", "8")),
        ({"decoder_num_attention_heads": 5}, ("32", "5")),
        ({"codebook_size": 0}, ("codebook_size", "0")),
        ({"codebook_dim": -1}, ("codebook_dim", "-1")),
        ({"num_channels": 1}, ("1", "3")),
        ({"image_mean": [0.5]}, ("1", "3")),
        ({"image_std": [0.5, 0, 0.5]}, ("image_std", "0")),
        ({"commitment_cost": -0.25}, ("commitment_cost", "-0.25")),
        ({"encoder_layers": []}, ("0 to 2", "[]")),
        ({"encoder_layers": [1, 3]}, ("0 to 2", "[1, 3]")),
        ({"encoder_layers": [1, 1]}, ("0 to 2", "[1, 1]")),
    ],
)
def test_impossible_combinations_name_both_numbers(fields, numbers):
    with pytest.raises(ValueError) as error:
        tiny_config(**fields)
    assert all(number in str(error.value) for number in numbers)


def test_encoder_may_see_another_size_than_the_image():
    config = VQRAEConfig(
        encoder_config=encoder_config(image_size=518, patch_size=14), encoder_input_size=224, image_size=256
    )
    assert config.grid_size == 16


def test_unknown_field_is_an_error_that_names_the_nearest():
    for build in (VQRAEConfig, lambda **fields: SimVQGANConfig(**fields), tiny_config):
        with pytest.raises(TypeError, match="no field 'codebok_size': did you mean codebook_size?"):
            build(codebok_size=8)


def test_field_of_a_later_version_is_ignored_with_a_warning(tmp_path, monkeypatch):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"decoder_flavour": "mint"}))
    said = []
    monkeypatch.setattr(configuration_simvq.logger, "warning", said.append)
    loaded = VQRAEConfig.from_pretrained(tmp_path)
    assert "decoder_flavour" in said[0] and not hasattr(loaded, "decoder_flavour")
    assert loaded.to_dict() == VQRAEConfig.from_dict(fields).to_dict()


def test_one_number_for_the_statistics_of_all_channels():
    config = tiny_config(image_mean=0.25, image_std=1)
    assert config.image_mean == [0.25] * 3 and config.image_std == [1] * 3


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.3.0")
    with pytest.raises(ImportError, match="needs transformers >= .*5.3.0.*pip install"):
        runpy.run_path(configuration_simvq.__file__)


def test_language_models_are_refused():
    with pytest.raises(ValueError, match="bert"):
        VQRAEConfig(encoder_config={"model_type": "bert"})


def test_what_trainers_write_into_any_config_is_read_without_a_word(tmp_path, caplog):
    """transformers' Trainer sets `use_cache` on every model, and with it every fine-tuned model is saved."""
    config = tiny_config()
    config.use_cache = False
    config.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        VQRAEConfig.from_pretrained(tmp_path)
    assert "use_cache" in (tmp_path / "config.json").read_text() and "use_cache" not in caplog.text
