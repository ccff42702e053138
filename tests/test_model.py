import numpy as np
import pytest
import torch
from conftest import ENCODERS, tiny_config
from PIL import Image
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

import tokenizer_simvq
from configuration_simvq import VQRAEConfig
from decoding_simvq import sincos_positions
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from quantization_simvq import VectorQuantizer
from tokenizer_simvq import VQRAEEncoderOutput


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders(model_type):
    """Every family: square and wide grids, tokens that decode to the forward reconstruction, gradients where due."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(model_type)).eval()
    for height, width in ((32, 32), (32, 48)):
        x = torch.rand(2, 3, height, width)
        with torch.no_grad():
            output, encoded = model(x), model.encode(x)
            decoded = model.decode(encoded.image_tokens).decoded_pixel_values
        assert encoded.image_tokens.shape == (2, height // 8, width // 8)
        assert encoded.last_hidden_state.shape == (2, height * width // 64, 32)
        assert encoded.quantized_last_hidden_state.shape == encoded.last_hidden_state.shape
        assert output.decoded_pixel_values.shape == x.shape
        torch.testing.assert_close(decoded, output.decoded_pixel_values, atol=1e-5, rtol=0)
        features = encoded.last_hidden_state
        torch.testing.assert_close(features.mean(-1), torch.zeros(features.shape[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(features.shape[:2]), atol=1e-2, rtol=0)
    model.train()(torch.rand(2, 3, 32, 32)).loss.backward()
    assert not model.encoder.training
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("model_type", ENCODERS)
def test_stage_2_leaves_no_parameter_without_a_gradient(model_type):
    model = VQRAEModel(tiny_config(model_type, freeze_encoder=False)).train()
    model(torch.rand(2, 3, 32, 32)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.encoder.training


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "dinov2_with_registers", "dinov3_vit", "vit_mae"])
def test_features_are_the_encoders_patch_tokens_without_the_norms_affine(model_type):
    """Against the encoder run by hand: prefix dropped, last norm undone, order kept."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(model_type)).eval()
    x = torch.rand(2, 3, 32, 32)
    stock = AutoModel.from_config(model.config.encoder_config).eval()
    stock.load_state_dict(model.encoder.state_dict(), strict=False)
    norm = next(getattr(stock, n) for n in ("layernorm", "post_layernorm", "norm") if hasattr(stock, n))
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    noise = {"noise": torch.arange(16.0).expand(2, -1)} if model_type == "vit_mae" else {}
    with torch.no_grad():
        hidden = stock((x - 0.5) / 0.5, **noise).last_hidden_state[:, -16:]
        expected = (hidden - norm.bias) / norm.weight
        torch.testing.assert_close(model.get_image_features(x).last_hidden_state, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "dinov2", "dinov3_vit", "vit_mae", "internvl_vision"])
def test_several_layers_are_quantized_as_the_mean_of_their_normalised_outputs(model_type, pixels):
    """Layers caught by hooks; the continuous features stay those of the last one."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(model_type, encoder_layers=[1, 2])).eval()
    (layers,) = [m for m in model.encoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    caught = {}
    for number, layer in enumerate(layers, 1):

        def keep(module, inputs, output, number=number):
            hidden = (output[0] if isinstance(output, tuple) else output)[:, -16:]
            caught[number] = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=model.encoder_norm.eps)

        layer.register_forward_hook(keep)
    with torch.no_grad():
        encoded = model.encode(pixels)
        mean = (caught[1] + caught[2]) / 2
        tokens = model.quantizer(mean)[2]
        alone = VQRAEModel(tiny_config(model_type, encoder_layers=[2])).eval()
        alone.load_state_dict(model.state_dict())
        torch.testing.assert_close(alone.encode(pixels).last_hidden_state, caught[2])
        assert torch.equal(alone.get_image_tokens(pixels).flatten(1), alone.quantizer(caught[2])[2])
    torch.testing.assert_close(encoded.last_hidden_state, caught[2])
    assert torch.equal(encoded.image_tokens.flatten(1), tokens)
    assert not torch.allclose(mean, caught[2], atol=1e-4)  # else this would show nothing


def test_the_patch_embedding_is_layer_0(pixels):
    model = VQRAEModel(tiny_config(encoder_layers=[0])).eval()
    with torch.no_grad():
        embedded = model.encoder_norm(model.encoder.embeddings(model._normalize(pixels))[:, 1:])
        torch.testing.assert_close(model.get_latents(pixels), embedded)


@torch.no_grad()
def test_the_decoder_is_maes_written_out():
    """A class token without a position in front, fixed positions, pre-norm layers, and the pixels of each patch row by
    row, on a grid that is not square."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])).eval()
    weights = {name.removeprefix("decoder."): tensor for name, tensor in model.state_dict().items()}
    for tensor in weights.values():
        if tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn(tensor.shape))  # biases and norms that matter
    weights["cls_token"].normal_()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    eps, heads = model.config.decoder_layer_norm_eps, model.config.decoder_num_attention_heads
    latents = torch.randn(2, 6, 32)
    x = linear(latents, "decoder_embed") + sincos_positions(2, 3, 32, "cpu").float()
    x = torch.cat([weights["cls_token"].expand(2, 1, 32), x], 1)
    for number in range(model.config.decoder_num_hidden_layers):
        layer = f"decoder_layers.{number}"
        y = norm(x, f"{layer}.layernorm_before")
        q, k, v = (linear(y, f"{layer}.attention.{part}_proj").chunk(heads, -1) for part in "qkv")
        scores = [(a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in zip(q, k, v)]
        x = x + linear(torch.cat(scores, -1), f"{layer}.attention.o_proj")
        y = linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.fc1")
        x = x + linear(torch.nn.functional.gelu(y), f"{layer}.fc2")
    patches = linear(norm(x[:, 1:], "decoder_norm"), "decoder_pred")
    expected = torch.zeros(2, 3, 16, 24)
    for token in range(6):
        top, left = 8 * (token // 3), 8 * (token % 3)
        values = iter(patches[:, token].T)
        for row in range(8):
            for column in range(8):
                for channel in range(3):
                    expected[:, channel, top + row, left + column] = next(values)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    decoded = model.decode_latents(latents, (2, 3)).decoded_pixel_values
    torch.testing.assert_close(decoded, expected * std + mean, atol=1e-5, rtol=1e-4)


def test_known_tokens_take_the_place_of_encoder_and_search(tiny_model, pixels, monkeypatch):
    tiny_model.eval()
    tokens = tiny_model.get_image_tokens(pixels)
    expected = tiny_model(pixels)
    monkeypatch.setattr(tiny_model.encoder, "forward", None)
    output = tiny_model(pixels, image_tokens=tokens)
    assert torch.equal(output.decoded_pixel_values, expected.decoded_pixel_values)
    assert output.loss == output.reconstruction_loss == expected.reconstruction_loss
    assert output.embedding_loss is None and output.last_hidden_state is None
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 4, 4\)"):
        tiny_model(pixels, image_tokens=tokens[:, :3])


def test_thin_helpers_agree_with_encode_and_decode(tiny_model, pixels):
    tiny_model.eval()
    encoded = tiny_model.encode(pixels)
    assert torch.equal(tiny_model.get_image_tokens(pixels), encoded.image_tokens)
    assert torch.equal(tiny_model.get_image_features(pixels).last_hidden_state, encoded.last_hidden_state)
    decoded = tiny_model.decode(encoded.image_tokens).decoded_pixel_values
    assert torch.equal(tiny_model.decode_image_tokens(encoded.image_tokens), decoded)


def test_loss_is_its_terms(tiny_model, pixels):
    output = tiny_model(pixels)
    squared = (output.decoded_pixel_values - pixels).pow(2).mean()
    torch.testing.assert_close(output.loss, squared + output.embedding_loss)
    assert tiny_model(pixels, return_loss=False).loss is None


def test_projections_and_plain_codebook(pixels):
    model = VQRAEModel(tiny_config(codebook_dim=8)).train()
    model(pixels).loss.backward()
    assert model.quantizer.embedding.weight.shape == (64, 8)
    assert model.project_in.weight.grad.abs().sum() > 0 and model.project_out.weight.grad.abs().sum() > 0
    plain = VQRAEModel(tiny_config(use_simvq=False)).train()
    plain(pixels).loss.backward()
    assert type(plain.quantizer) is VectorQuantizer and plain.quantizer.embedding.weight.grad.abs().sum() > 0


def test_another_encoder_size_than_image_size():
    model = VQRAEModel(tiny_config(image_size=64, decoder_patch_size=16)).eval()
    output = model(torch.rand(1, 3, 64, 96))
    assert output.decoded_pixel_values.shape == (1, 3, 64, 96) and output.image_tokens.shape == (1, 4, 6)


def test_noise_only_while_training(pixels):
    model = VQRAEModel(tiny_config(noise_tau=0.8))
    first, second = (model.train()(pixels).decoded_pixel_values for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(pixels).decoded_pixel_values for _ in range(2))
    assert torch.equal(first, second)


def test_positions_are_those_of_mae():
    """numpy, as MAE's code computes them: columns in the first half, then rows."""
    omega = 1 / 10000 ** (np.arange(4) / 4)
    for row, column in ((0, 0), (1, 2), (2, 4)):
        expected = np.concatenate([f(p * omega) for p in (column, row) for f in (np.sin, np.cos)])
        np.testing.assert_allclose(sincos_positions(3, 5, 16, "cpu")[row * 5 + column], expected, atol=1e-6)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.rand(2, 1, 32, 32), r"\(B, 3, height, width\).*\(2, 1, 32, 32\)"),
        (torch.rand(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.randint(0, 256, (2, 3, 32, 32)), "int64"),
        (torch.rand(2, 3, 33, 32), "33 x 32.*8"),
        (torch.rand(0, 3, 32, 32), "hold no images"),
        (torch.rand(2, 3, 32, 32) * 255, r"\[0, 1\].*divide them by 255"),
        (torch.full((2, 3, 32, 32), float("inf")), "some are not finite"),
        (np.zeros((2, 3, 32, 32), np.float32), "must be a tensor, got ndarray: use the image processor"),
        ({"pixel_values": torch.rand(2, 3, 32, 32)}, r"got dict: use the image processor, and model\(\*\*processor"),
        (torch.rand(2, 3, 32, 32) * 4 - 2, r"\[0, 1\], got -.* to "),
        (torch.linspace(0.35, 1, 32).expand(2, 3, 32, 32) * 2 - 1, "-0.3 to 1, with areas whose mean is -0.15"),
        ((torch.linspace(0.6, 1, 32).expand(2, 3, 32, 32) - 0.485) / 0.229, "areas whose mean is|to 2.25"),
        (torch.full((2, 3, 32, 32), float("nan")), "NaN"),
    ],
)
def test_bad_pixels_are_named(tiny_model, bad, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.eval()(bad)


@pytest.mark.parametrize("pattern", ["stripes", "squares", "noise"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [16, 64, 104, 152, 224])
def test_what_a_resize_overshoots_is_no_error(tiny_model, pattern, antialias, size):
    """Bicubic, without clamping: black and white next to each other overshoot most."""
    side = torch.arange(56)
    images = {"stripes": (side // 4 % 2).expand(56, 56), "squares": (side[:, None] // 4 + side // 4) % 2}
    images["noise"] = torch.randint(0, 2, (56, 56), generator=torch.Generator().manual_seed(0))
    image = images[pattern].float().expand(1, 3, 56, 56)
    resized = torch.nn.functional.interpolate(image, size=size, mode="bicubic", antialias=antialias)
    if size > 56:
        assert resized.min() < -0.05 and resized.max() > 1.05  # else this would show nothing
    tiny_model.eval()._grid(resized)


def test_an_encoder_whose_parts_are_not_known_is_refused():
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for model_type, part in (
        ("aimv2_vision_model", "rms_norm"),
        ("pixtral", "ln_pre"),
        ("siglip2_vision_model", "NaFlex"),
    ):
        encoder = tiny | {"model_type": model_type, "image_size": 32, "patch_size": 8}
        with pytest.raises(ValueError, match=f"'{model_type}'.*{part}"):
            VQRAEModel(VQRAEConfig(encoder_config=encoder, image_size=32, decoder_patch_size=8))


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.full((1, 4, 4), 64), "64"),
        (torch.full((1, 4, 4), -1), "-1"),
        (torch.zeros(1, 16, dtype=torch.int64), r"\(B, h, w\)"),
        (torch.zeros(1, 4, 4), "float32"),
        ([[[1, 2], [3, 4]]], r"got list: pass encode\(\.\.\.\)\.image_tokens, or torch\.tensor"),
        (VQRAEEncoderOutput(), "got VQRAEEncoderOutput: pass encode"),
    ],
)
def test_bad_tokens_are_named(tiny_model, bad, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.decode(bad)


def test_latents_that_do_not_fill_the_grid_are_named(tiny_model):
    assert tiny_model.decode_latents(torch.randn(1, 15, 32), (3, 5)).decoded_pixel_values.shape == (1, 3, 24, 40)
    with pytest.raises(ValueError, match="15 latents.*3 x 3"):
        tiny_model.decode_latents(torch.randn(1, 15, 32))
    for bad, got in ((torch.randn(1, 16, 31), r"\(1, 16, 31\)"), (VQRAEEncoderOutput(), "VQRAEEncoderOutput")):
        with pytest.raises(ValueError, match=rf"32\), got {got}: pass encode.*quantized_last_hidden_state"):
            tiny_model.decode_latents(bad)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(tiny_model, pixels, implementation, tmp_path):
    tiny_model.eval().save_pretrained(tmp_path)
    other = VQRAEModel.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert other.encoder.config._attn_implementation == implementation
    torch.testing.assert_close(
        other(pixels).decoded_pixel_values, tiny_model(pixels).decoded_pixel_values, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loading_keeps_the_codebook(tiny_model, pixels, tmp_path, dtype):
    tiny_model.save_pretrained(tmp_path)
    half = VQRAEModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.decoder.decoder_pred.weight.dtype == dtype and half.encoder.dtype == dtype
    assert all(tensor.dtype == torch.float32 for tensor in half.quantizer.state_dict().values())
    assert torch.equal(half.quantizer.embedding.weight, tiny_model.quantizer.embedding.weight)
    output = half(pixels)
    decoded = half.decode(output.image_tokens).decoded_pixel_values
    assert output.decoded_pixel_values.dtype == torch.float32
    torch.testing.assert_close(decoded, output.decoded_pixel_values, atol=1e-5, rtol=0)


class Outer(PreTrainedModel):
    """Somebody's model with a tokenizer inside."""

    config_class = PreTrainedConfig

    def __init__(self, config, vision=None):
        super().__init__(config)
        self.vision = VQRAEModel(VQRAEConfig.from_dict(config.vision_config))
        self.post_init()


def test_a_frozen_encoder_stays_frozen_inside_a_model_that_is_loaded(tmp_path, monkeypatch):
    """Whose own `from_pretrained` gives every parameter a gradient."""
    said = []
    monkeypatch.setattr(tokenizer_simvq.logger, "warning_once", said.append)
    outer = Outer(PreTrainedConfig(vision_config=tiny_config().to_dict()))
    outer.save_pretrained(tmp_path)
    loaded = Outer.from_pretrained(tmp_path).train()
    assert not said
    assert not loaded.vision.encoder.training
    assert not any(parameter.requires_grad for parameter in loaded.vision.encoder.parameters())
    assert all(parameter.requires_grad for parameter in loaded.vision.decoder.parameters())
    loaded.vision.encoder.requires_grad_(True)  # not the way to do it
    assert not loaded.train().vision.encoder.training and "Call unfreeze_encoder()" in said[0]
    loaded.vision.unfreeze_encoder()
    assert loaded.train().vision.encoder.training


def test_pixels_get_gradients_through_a_frozen_encoder(tiny_model):
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    tiny_model.get_image_features(pixels).last_hidden_state.square().mean().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny_model.encoder.parameters())
    with torch.no_grad():
        assert not tiny_model.get_image_features(pixels).last_hidden_state.requires_grad


def test_reload_freezes_again(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded, info = VQRAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for model in (loaded, VQRAEModel.from_pretrained(tmp_path)):
        model.train()
        assert not model.encoder.training
        assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
        assert "quantizer.embedding.weight" not in dict(model.named_parameters())
    for (name, a), b in zip(tiny_model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    stage_2 = VQRAEModel.from_pretrained(tmp_path, freeze_encoder=False).train()
    assert stage_2.encoder.training
    assert all(p.requires_grad for name, p in stage_2.encoder.named_parameters() if "mask_token" not in name)


def test_initialising_again_does_not_move_what_was_loaded(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    model = VQRAEModel.from_pretrained(tmp_path)
    model.init_weights()
    assert torch.equal(model.quantizer.embedding.weight, tiny_model.quantizer.embedding.weight)


def test_sharded_checkpoint(tiny_model, pixels, tmp_path):
    tiny_model.eval().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = VQRAEModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels).image_tokens, tiny_model(pixels).image_tokens)


def test_checkpoint_with_another_codebook_size_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="quantizer.embedding.weight|size mismatch|mismatch"):
        VQRAEModel.from_pretrained(tmp_path, codebook_size=32)


def test_meta_device():
    with torch.device("meta"):
        model = VQRAEModel(tiny_config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_gradient_checkpointing_gives_the_same_gradients(pixels):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(freeze_encoder=False)).train()
    model(pixels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(pixels).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_compiled_eval_forward(tiny_model, pixels):
    tiny_model.eval()
    compiled = torch.compile(tiny_model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(pixels).decoded_pixel_values, tiny_model(pixels).decoded_pixel_values, atol=1e-5, rtol=0
        )


def test_from_encoder_pretrained_grafts_weights_and_reads_statistics(tmp_path):
    torch.manual_seed(0)
    source = VQRAEModel(tiny_config("dinov2")).config.encoder_config
    encoder = AutoModel.from_config(source)
    encoder.save_pretrained(tmp_path)
    model = VQRAEModel.from_encoder_pretrained(str(tmp_path), codebook_size=32)
    weights = encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.encoder.state_dict().items())
    assert model.config.image_mean == [0.485, 0.456, 0.406]  # DINOv2's, where no file tells
    assert (model.config.image_size, model.config.decoder_patch_size, model.config.codebook_size) == (32, 8, 32)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    smaller = VQRAEModel.from_encoder_pretrained(str(tmp_path), image_size=64, decoder_patch_size=16)
    assert smaller.config.encoder_input_size == 32

    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], '
        '"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}'
    )
    model = VQRAEModel.from_encoder_pretrained(str(tmp_path))
    assert model.config.image_mean == [0.1, 0.2, 0.3] and model.config.image_std == [0.4, 0.5, 0.6]
    assert model.config.image_size == 24


def test_from_encoder_pretrained_refuses_other_models(tmp_path):
    AutoConfig.for_model("bert", hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert"):
        VQRAEModel.from_encoder_pretrained(str(tmp_path))


def test_processor_there_and_back():
    gradient = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    processor = VQRAEImageProcessor.for_image_size(32)
    pixels = processor(Image.fromarray(gradient), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32) and 0 <= pixels.min() and pixels.max() <= 1
    expected = Image.fromarray(gradient).resize((48, 32), Image.BICUBIC).crop((8, 0, 40, 32))
    (back,) = processor.postprocess(pixels)
    assert np.abs(np.asarray(back).astype(int) - np.asarray(expected)).max() <= 2
    exact = torch.randint(0, 256, (2, 3, 8, 8)) / 255
    returned = [np.asarray(image) for image in processor.postprocess(exact)]
    np.testing.assert_array_equal(np.stack(returned), (exact * 255).round().byte().permute(0, 2, 3, 1).numpy())


def test_transparent_images_are_composited_on_white():
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    pixels = VQRAEImageProcessor.for_image_size(32)(clear, return_tensors="pt").pixel_values
    assert pixels.min() == 1
