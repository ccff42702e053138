"""Inference as everyone does it: under every mode of autograd, in pipelines, compiled, exported, offloaded, in 8 bits,
with adapters, and with the stock Trainer."""

import copy
import os
import threading
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from conftest import tiny_config
from datasets import Dataset
from PIL import Image
from test_loading import run
from test_simvq_gan import small_model
from transformers import Trainer, TrainingArguments, pipeline

from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.eval().save_pretrained(tmp_path / "saved")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


# Modes ---------------------------------------------------------------------------------------------------------------


def infer(model, pixels):
    model.eval()
    with torch.inference_mode():
        model(pixels), model.decode(model.get_image_tokens(pixels))


def look(model, pixels):
    model.eval()
    with torch.no_grad():
        model(pixels)


def learn(model, pixels):
    model.train()(pixels).loss.backward()


def in_a_thread(model, pixels):
    errors = []

    def body():
        try:
            infer(model, pixels)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and not errors, errors


@pytest.mark.parametrize("use_simvq", [True, False])
def test_any_order_of_modes_works(use_simvq, pixels):
    """The cached table and the counts of the codes belong to none of the modes."""
    steps = (infer, look, learn, in_a_thread)
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(use_simvq=use_simvq, freeze_encoder=False))
    expected = model.eval().get_image_tokens(pixels)
    for first in steps:
        for second in steps:
            fresh = copy.deepcopy(model)
            first(fresh, pixels), second(fresh, pixels), first(fresh, pixels)
            assert torch.equal(fresh.eval().get_image_tokens(pixels), expected), (first, second)
            assert fresh.quantizer.get_codebook_counts().sum() >= 4 * expected.numel()


# Outputs -------------------------------------------------------------------------------------------------------------


def test_pipeline_gives_the_continuous_features(saved):
    image = Image.effect_noise((40, 36), 90).convert("RGB")
    features = torch.tensor(pipeline("image-feature-extraction", model=saved, trust_remote_code=True)(image))
    pixels = VQRAEImageProcessor.for_image_size(32)(image, return_tensors="pt").pixel_values
    expected = VQRAEModel.from_pretrained(saved).get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("build", [lambda: VQRAEModel(tiny_config()), small_model], ids=["VQRAE", "SimVQ"])
def test_a_pipeline_of_features_alone_takes_batches(build):
    """As docs/downstream.md tells: of the whole output it could not divide the losses among images."""
    torch.manual_seed(0)
    model, processor = build().eval(), VQRAEImageProcessor.for_image_size(32)
    images = [Image.effect_noise((32, 32), 20 * i + 20).convert("RGB") for i in range(5)]
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor, batch_size=4)
    with pytest.raises(IndexError, match="invalid index of a 0-dim tensor"):
        extract(images)
    model.forward = model.get_image_features
    expected = model.get_image_features(processor(images, return_tensors="pt").pixel_values).last_hidden_state
    torch.testing.assert_close(torch.tensor(extract(images))[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_loss_comes_first_in_training_and_last_in_eval_mode(tiny_model, pixels):
    for training, place in ((True, 0), (False, -1)):
        output = tiny_model.train(training)(pixels)
        assert torch.equal(output.to_tuple()[place], output.loss)
        assert torch.equal(output.loss, output.reconstruction_loss + output.embedding_loss)
        without = tiny_model(pixels, return_loss=False)
        assert "loss" not in without and torch.equal(without[0], output.last_hidden_state)


def test_stock_trainer_trains_and_reports_a_loss(tiny_model, tmp_path):
    data = Dataset.from_dict({"pixel_values": torch.rand(8, 3, 32, 32).tolist()}).with_format("torch")
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(tiny_model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_hidden_states_and_attentions(pixels):
    """Of the decoder in `forward`, with its cls token, and of the encoder with its features."""
    model = VQRAEModel(tiny_config(attn_implementation="eager")).eval()
    output = model(pixels, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 17, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 17, 17)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 2, 17))
    patches = model.decoder.decoder_pred(model.decoder.decoder_norm(output.hidden_states[-1][:, 1:]))
    painted = patches.view(2, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 32, 32) * 0.5 + 0.5
    torch.testing.assert_close(output.decoded_pixel_values, painted)
    features = model.get_image_features(pixels, output_hidden_states=[-1])
    last = model.encoder_norm(features.hidden_states[-1][:, 1:])
    assert features.hidden_states[:2] == (None, None) and features.attentions is None
    torch.testing.assert_close(features.last_hidden_state, last)
    assert isinstance(model.get_image_features(pixels, return_dict=False), tuple)


@pytest.mark.parametrize("build", [lambda: VQRAEModel(tiny_config()), small_model])
def test_one_layer_is_asked_for_by_its_number_and_one_that_there_is_not_is_refused(build):
    """As LLaVA's `vision_feature_layer=-2`; 0 is the first one, and no `False`."""
    model, pixels = build().eval(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for method in (model.get_image_features, model):
        states = method(pixels, output_hidden_states=True).hidden_states
        for place in (0, -2):
            one = method(pixels, output_hidden_states=place).hidden_states
            kept = [state is not None for state in one]
            assert kept == [number == place % len(states) for number in range(len(states))]
            assert torch.equal(one[place], states[place])
        for place in (len(states), -len(states) - 1):
            with pytest.raises(ValueError, match=rf"\[{place}\].*from {-len(states)} to {len(states) - 1}"):
                method(pixels, output_hidden_states=[place])


# Graphs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"use_simvq": False}, {"codebook_dim": 8, "freeze_encoder": False}])
def test_compiled_as_one_graph_it_gives_the_same_tokens_and_counts_them(fields, pixels, device):
    torch.manual_seed(0)
    torch._dynamo.reset()  # each graph of an earlier test counts as one more variant of this code
    model, pixels = VQRAEModel(tiny_config(**fields)).eval().to(device), pixels.to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the whole graph, without a compiler
    with torch.no_grad():
        expected = model(pixels)
        model.quantizer.reset_codebook_usage()
        output = compiled(pixels)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    torch.testing.assert_close(output.decoded_pixel_values, expected.decoded_pixel_values)
    assert model.quantizer.get_codebook_counts().sum() == expected.image_tokens.numel()
    model.train()
    model(pixels).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled(pixels).loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


def test_near_ties_are_decided_in_a_graph_too(device):
    """The exact search runs there, not a formula in fp32: codes that differ by less than its rounding."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(codebook_dim=4)).eval().to(device)
    quantizer = model.quantizer
    with torch.no_grad():
        quantizer.embedding_proj.weight.copy_(torch.eye(4))
        quantizer.embedding_proj.bias.fill_(1000.0)
        quantizer.embedding.weight.mul_(1e-3)
    every = torch.arange(64, device=device)
    z = quantizer.get_codebook_entry(every)[None] + 1e-4 * torch.randn(1, 64, 4).to(device)
    codes = quantizer.get_codebook_entry(every).double()
    expected = (z[0].double()[:, None] - codes).square().sum(-1).argmin(1)
    in_fp32 = torch.cdist(z[0], codes.float(), compute_mode="use_mm_for_euclid_dist").argmin(1)
    assert not torch.equal(in_fp32, expected)  # else this would show nothing
    assert torch.equal(torch.compile(quantizer, fullgraph=True)(z)[2][0], quantizer(z)[2][0])


def test_exported_program_searches_exactly(tiny_model, pixels):
    program = torch.export.export(tiny_model.eval(), (pixels,))
    graphs = [module.graph for module in program.graph_module.modules()]
    assert any("simvq.nearest_codes" in str(node.target) for graph in graphs for node in graph.nodes)
    other = torch.rand_like(pixels)
    assert torch.equal(program.module()(other).image_tokens, tiny_model(other).image_tokens)


def test_several_copies_of_the_code_live_in_one_process(tiny_model, tmp_path, pixels):
    """Remote code of two checkpoints: each has a module of its own, and all share the operator of the search."""
    for name in ("one", "two"):
        VQRAEModel(tiny_config(codebook_dim=8)).save_pretrained(tmp_path / name)
    code = """
import torch
from transformers import AutoModel
models = [AutoModel.from_pretrained(name, trust_remote_code=True) for name in ("one", "two")]
assert type(models[0]).__module__ != type(models[1]).__module__
x = torch.rand(2, 3, 32, 32)
for model in models:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x).image_tokens, model(x).image_tokens)
"""
    run(code, tmp_path, HF_HOME=str(tmp_path / "home"))


# Devices and dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16().float()])
def test_codes_stay_in_fp32(cast, pixels):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(codebook_dim=8)).eval()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if "quantizer" in name}
    expected |= {f"project_in.{name}": tensor.clone() for name, tensor in model.project_in.state_dict().items()}
    cast(model)
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    output = model(pixels)
    assert output.decoded_pixel_values.isfinite().all()
    assert torch.equal(model.decode(output.image_tokens).decoded_pixel_values, output.decoded_pixel_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "build", [lambda: VQRAEModel(tiny_config(image_size=64, decoder_patch_size=16)), lambda: small_model(image_size=64)]
)
def test_pixels_that_come_in_half_precision_are_not_rounded_again_on_the_way(build, dtype):
    """DeepSpeed and `BatchFeature.to` cast them; resizing and normalising them in bf16 would round three times more."""
    torch.manual_seed(0)
    model, pixels = build().eval(), torch.rand(2, 3, 64, 64).to(dtype)
    features, expected = (model.get_image_features(x).last_hidden_state for x in (pixels, pixels.float()))
    assert torch.equal(features, expected)


@pytest.mark.parametrize(
    "where", [{"": "cpu", "quantizer": "disk"}, {"": "cpu", "quantizer": "disk", "decoder": "disk"}]
)
def test_parts_on_the_disk(where, tmp_path, pixels):
    """accelerate brings weights in when a module is called, and the quantizer's are read by calling it."""
    torch.manual_seed(0)
    config = tiny_config("siglip_vision_model", codebook_dim=8)
    model = VQRAEModel(config).eval()
    model.save_pretrained(tmp_path / "saved")
    parts = {name: where.get(name, where[""]) for name, _ in model.named_children()}
    options = {"offload_folder": str(tmp_path / "offload"), "offload_buffers": True}
    with init_empty_weights():
        empty = VQRAEModel(config).eval()
    dispatched = load_checkpoint_and_dispatch(empty, str(tmp_path / "saved"), device_map=parts, **options)
    loaded = VQRAEModel.from_pretrained(tmp_path / "saved", device_map=parts, **options)
    for offloaded in (dispatched, loaded):
        with torch.no_grad():
            tokens, again = model.get_image_tokens(pixels), model.decode(model.get_image_tokens(pixels))
            for _ in range(2):
                assert torch.equal(offloaded.get_image_tokens(pixels), tokens)
                assert torch.equal(offloaded.decode(tokens).decoded_pixel_values, again.decoded_pixel_values)
        assert offloaded.quantizer._cache is None  # what is offloaded is not kept in memory by a cache


def test_subfolder(tiny_model, tmp_path, pixels):
    tiny_model.eval().save_pretrained(tmp_path / "tokenizer")
    loaded = VQRAEModel.from_pretrained(tmp_path, subfolder="tokenizer")
    assert torch.equal(loaded.get_image_tokens(pixels), tiny_model.get_image_tokens(pixels))


class NoFloat64(torch.Tensor):
    """A tensor on a device that has no float64, and from which `.to("cpu")` leads to an ordinary one."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.Tensor.to and arguments[1] == torch.device("cpu"):
            return arguments[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, arguments, options or {})
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("This device has no float64.")
        return result


def test_a_device_without_float64_is_not_asked_for_it(monkeypatch):
    """MPS. The few tokens that fp32 cannot decide are decided on the CPU: the same indices as everywhere."""
    import quantization_simvq as q

    monkeypatch.setattr(q, "_NO_FLOAT64", ("cpu",))
    torch.manual_seed(0)
    codes = torch.randn(300, 8)
    codes[150:] = codes[:150] + 1e-7 * torch.randn(150, 8)  # near ties
    z, mean = codes[torch.randperm(300)] + 0.05 * torch.randn(300, 8), codes.mean(0)
    table = codes - mean, (codes - mean).square().sum(1) / 2, mean
    expected = q.nearest_codes(z, *table)
    found = q.nearest_codes(*(tensor.as_subclass(NoFloat64) for tensor in (z, *table)))
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    centroids = q.kmeans(z.as_subclass(NoFloat64), 20, 3, torch.Generator().manual_seed(0))
    assert torch.equal(centroids.as_subclass(torch.Tensor), q.kmeans(z, 20, 3, torch.Generator().manual_seed(0)))
    assert q.float64_device(torch.device("cuda")).type == "cuda"


def test_latents_that_are_not_finite_get_a_code_and_are_counted(tiny_model, pixels, monkeypatch):
    tiny_model.eval()
    monkeypatch.setattr(
        tiny_model.project_in, "forward", lambda latents: latents.index_fill(1, torch.tensor([3]), torch.inf)
    )
    tokens = tiny_model.get_image_tokens(pixels).flatten(1)
    assert tiny_model.quantizer.get_num_nonfinite() == 2 and (tokens[:, 3] == 0).all()


# 8 bits and adapters -------------------------------------------------------------------------------------------------


def test_int8_leaves_what_decides_tokens_as_it_is():
    """On the tokenizer in the box and the example photographs, by transformers' own way to load in 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    checkpoint = ROOT / "checkpoints" / "vqrae-dinov2-small"
    processor = VQRAEImageProcessor.from_pretrained(checkpoint)
    files = sorted((ROOT / "examples" / "images").glob("*.jpg"))
    pixels = processor([Image.open(file) for file in files], return_tensors="pt").pixel_values
    model = VQRAEModel.from_pretrained(checkpoint)
    rounded = VQRAEModel.from_pretrained(checkpoint, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    kinds = {
        type(module.weight).__name__ for module in rounded.decoder.modules() if isinstance(module, torch.nn.Linear)
    }
    assert any("Int8" in kind for kind in kinds)
    with torch.no_grad():
        expected, output = model(pixels), rounded(pixels)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    error = (output.decoded_pixel_values - expected.decoded_pixel_values).abs().mean()
    assert 0 < error < 2 / 255


def test_adapters_on_a_frozen_encoder_learn_and_come_back(tiny_model, saved, tmp_path, pixels):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=r"encoder\..*(query|value|q_proj|v_proj)"))
    learned = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert learned and all("lora" in name for name in learned)
    optimizer = torch.optim.SGD(learned.values(), lr=1.0)
    for _ in range(2):  # B of LoRA is zero before the first step, and so is the gradient of A
        adapted.train()(pixel_values=pixels).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in learned.values())
    features = adapted.eval().get_image_features(pixels).last_hidden_state
    assert not torch.allclose(features, VQRAEModel.from_pretrained(saved).get_image_features(pixels).last_hidden_state)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(VQRAEModel.from_pretrained(saved), tmp_path / "adapter").eval()
    assert torch.equal(again.get_image_features(pixels).last_hidden_state, features)
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "adapter")


def test_encoder_is_frozen_and_unfrozen_by_methods(tiny_model, pixels, tmp_path):
    def learns() -> bool:
        tiny_model.zero_grad()
        tiny_model.train()(pixels).loss.backward()
        weights = [p for name, p in tiny_model.encoder.named_parameters() if "layer" in name]
        return all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)

    assert not learns() and not tiny_model.encoder.training
    tiny_model.unfreeze_encoder()
    assert learns() and tiny_model.encoder.training and not tiny_model.config.freeze_encoder
    tiny_model.freeze_encoder()
    assert not learns() and not tiny_model.encoder.training
    tiny_model.save_pretrained(tmp_path)
    assert VQRAEModel.from_pretrained(tmp_path).config.freeze_encoder
