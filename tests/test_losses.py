"""Losses against formulas written out, and who gets a gradient from which."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from test_training import make_trainer, training_arguments
from torch import nn

from modeling_simvq import VQRAEModel
from training.adversary import Adversary
from training.arguments import VQRAETrainingArguments
from training.discriminators import DinoDiscriminator, PatchDiscriminator, augment
from training.losses import (
    ConvNextLoss,
    PerceptualLoss,
    adaptive_weight,
    discriminator_hinge,
    discriminator_non_saturating,
    discriminator_vanilla,
    generator_hinge,
    generator_non_saturating,
    lecam,
)


class Perceptual(nn.Module):
    """A stand-in for the networks whose weights are not here; like them it never trains and is never linear."""

    def __init__(self, *args) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.network = nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, reconstruction, original):
        return (self.network(reconstruction).tanh() - self.network(original).tanh()).square().mean()


@pytest.fixture
def perceptual(monkeypatch):
    monkeypatch.setattr("training.losses.PerceptualLoss", Perceptual)
    monkeypatch.setattr("training.losses.ConvNextLoss", Perceptual)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_adversarial_losses_equal_their_formulas():
    torch.manual_seed(0)
    real, fake = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    r, f = real.flatten().tolist(), fake.flatten().tolist()
    r_images, f_images = real.mean((1, 2, 3)).tolist(), fake.mean((1, 2, 3)).tolist()

    def softplus(x):
        return math.log1p(math.exp(x))

    expected = {
        generator_hinge(fake): -mean(f),
        generator_non_saturating(fake): mean(softplus(-x) for x in f_images),
        discriminator_hinge(real, fake): (mean(max(0, 1 - x) for x in r) + mean(max(0, 1 + x) for x in f)) / 2,
        discriminator_vanilla(real, fake): (mean(softplus(-x) for x in r) + mean(softplus(x) for x in f)) / 2,
        discriminator_non_saturating(real, fake): mean(softplus(-x) for x in r_images)
        + mean(softplus(x) for x in f_images),
        lecam(real, fake, torch.tensor(0.1), torch.tensor(-0.2)): max(0, mean(r) + 0.2) ** 2
        + max(0, 0.1 - mean(f)) ** 2,
    }
    for computed, formula in expected.items():
        assert computed.item() == pytest.approx(formula, abs=1e-9)


def test_patchgan_is_the_network_of_the_references():
    """Widths, strides and the one missing bias of taming's NLayerDiscriminator; pixels in [-1, 1] inside."""
    torch.manual_seed(0)
    network = PatchDiscriminator()
    convolutions = [module for module in network.layers if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0], c.bias is not None) for c in convolutions] == [
        (3, 64, 2, True), (64, 128, 2, False), (128, 256, 2, False), (256, 512, 1, False), (512, 1, 1, True)
    ]  # fmt: skip
    pixels = torch.rand(2, 3, 64, 64)
    x = pixels * 2 - 1
    for i, convolution in enumerate(convolutions):
        x = F.conv2d(x, convolution.weight, convolution.bias, convolution.stride, 1)
        if 0 < i < 4:
            variance, average = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            norm = network.layers[3 * i]
            x = (x - average) / (variance + 1e-5).sqrt() * norm.weight.view(1, -1, 1, 1)
        if i < 4:
            x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(network(pixels), x, atol=1e-5, rtol=1e-4)
    assert not list(network.buffers())


@pytest.fixture
def tiny_vit(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=224, patch_size=32
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_dino_discriminator(tiny_vit):
    """Levels of RAE, backbone frozen and unsaved, logits as the layers say."""
    network = DinoDiscriminator(tiny_vit, kernel_size=3)
    assert network.levels == [4, 1, 2, 3, 4]
    pixels = torch.rand(2, 3, 64, 64, requires_grad=True)
    logits = network.train()(pixels)
    assert logits.shape == (2, 5 * 49)
    logits.sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert not network.backbone.training
    assert all(p.grad is None for p in network.backbone.parameters())
    assert all(p.grad is not None for p in network.heads.parameters())
    # the first head by hand
    network.eval()
    with torch.no_grad():
        x = F.interpolate(pixels, size=(224, 224), mode="bilinear", align_corners=False)
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
            1, 3, 1, 1
        )
        blocks = []
        hooks = [
            layer.register_forward_hook(lambda m, i, o: blocks.append(o[0] if isinstance(o, tuple) else o))
            for layer in network.backbone.layers
        ]
        network.backbone(x)
        for hook in hooks:
            hook.remove()
        features = blocks[3][:, 1:].transpose(1, 2)  # the last block, without the final norm

        def block(x, convolution, norm):
            size = convolution.weight.shape[-1]
            x = F.pad(x, (size // 2, size // 2), mode="circular")
            x = F.conv1d(x, convolution.weight, convolution.bias)
            variance, average = torch.var_mean(x, 2, correction=0, keepdim=True)
            return F.leaky_relu((x - average) / (variance + 1e-6).sqrt(), 0.2)

        head = network.heads[0]
        first = block(features, *head.first[:2])
        second = (block(first, *head.second[:2]) + first) / math.sqrt(2)
        expected = F.conv1d(second, head.last.weight, head.last.bias).flatten(1)
        torch.testing.assert_close(network(pixels)[:, :49], expected, atol=1e-5, rtol=1e-4)
    for module in network.heads.modules():
        if isinstance(module, nn.Conv1d):  # spectral norm
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2) < 2


def test_a_dino_discriminator_learns_from_fakes_as_a_file_holds_them(tmp_path, tiny_vit):
    """Pixels between or beyond the levels of a file would give every fake away; the generator is judged on its own."""
    from accelerate import Accelerator

    args = training_arguments(tmp_path, gan_weight=0.1, discriminator="dino", discriminator_name_or_path=tiny_vit)
    adversary = Adversary(args)
    adversary.prepare(Accelerator(cpu=True))
    real, fake, seen = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32) * 1.2 - 0.1, []
    adversary.pair.discriminator.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    adversary.backward(real, fake, 1)
    adversary.generator_loss(fake)
    assert torch.equal(seen[0], real) and torch.equal(seen[2], fake)
    assert torch.equal(seen[1], (fake.clamp(0, 1) * 255).round() / 255) and not torch.equal(seen[1], fake)


def test_augmentation_moves_recolours_and_cuts():
    torch.manual_seed(0)
    pixels = torch.rand(64, 3, 16, 16).requires_grad_()
    out = augment(pixels)
    assert out.shape == pixels.shape
    out.sum().backward()
    assert pixels.grad.abs().sum() > 0
    # of a constant image only brightness and what comes in from outside is left
    grey = augment(torch.full((64, 3, 16, 16), 0.5))
    assert (grey.amax((1, 2, 3)) - grey.amin((1, 2, 3))).max() < 1e-6
    brightness = grey.mean((1, 2, 3)) - 0.5
    assert -0.25 <= brightness.min() < -0.1 and 0.1 < brightness.max() <= 0.25
    # contrast: half to one and a half of a step; saturation: none to double of what colours differ by
    step = torch.full((64, 3, 16, 16), 0.4)
    step[..., 8:] = 0.6
    contrast = augment(step)[:, :, 4:12, [4, 11]].diff(dim=-1).mean((1, 2, 3)) / 0.2
    assert 0.5 <= contrast.min() < 0.65 and 1.35 < contrast.max() <= 1.5
    colours = augment(torch.tensor([0.6, 0.4, 0.5]).view(1, 3, 1, 1).expand(64, 3, 16, 16))
    saturation = (colours[:, 0] - colours[:, 1])[:, 4:12, 4:12].mean((1, 2)) / 0.2
    assert 0 <= saturation.min() < 0.2 and 1.6 < saturation.max() <= 3
    # a lone white pixel is found within two pixels (an eighth of 16) of its place
    dot = torch.zeros(64, 3, 16, 16)
    dot[:, :, 8, 8] = 1
    moved = augment(dot)[:, 0, 3:13, 3:13].flatten(1).argmax(1)
    offsets = torch.stack([moved // 10 + 3 - 8, moved % 10 + 3 - 8], 1)
    assert offsets.min() == -2 and offsets.max() == 2
    # cutout: the cut part is 0.5 whatever the image
    cut = augment(torch.rand(8, 3, 16, 16), cutout=0.5) == 0.5
    assert (cut.all(1).flatten(1).sum(1) >= 8).all()


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    torch.manual_seed(0)
    layer = nn.Linear(4, 12)
    x = torch.randn(2, 4)
    out = layer(x).view(2, 3, 2, 2)
    a, b = torch.randn_like(out), torch.randn_like(out)
    expected = [torch.autograd.grad((out * w).sum(), layer.weight, retain_graph=True)[0].norm() for w in (a, b)]
    torch.testing.assert_close(adaptive_weight(out, layer.weight, a, b), expected[0] / (expected[1] + 1e-6))
    assert adaptive_weight(out, layer.weight, a, b * 0) == 1e4


# The loss of each recipe: what compute_loss gives, and its gradient, against the sum written out
RECIPES = {
    "vqrae stage 1": {"l2_weight": 1.0, "lpips_weight": 1.0, "convnext_weight": 0.1},
    "vqrae stage 2": {
        "l2_weight": 1.0, "lpips_weight": 1.0, "convnext_weight": 0.1, "gan_weight": 0.1, "lecam_weight": 0.001,
        "distillation_weight": 1.0,
    },
    "rae": {"l1_weight": 1.0, "l2_weight": 0.0, "lpips_weight": 1.0, "gan_weight": 0.75, "gan_adaptive": True},
    "simvq": {
        "l1_weight": 1.0, "l2_weight": 0.0, "lpips_weight": 1.0, "gan_weight": 0.1,
        "gan_generator_loss": "non_saturating",
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_of_a_recipe_and_its_gradient(recipe, perceptual, tmp_path, image_folder, pixels):
    weights = {"l1_weight": 0.0, "convnext_weight": 0.0} | RECIPES[recipe]
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(freeze_encoder=recipe != "vqrae stage 2", legacy=False))
    trainer = make_trainer(model, image_folder, tmp_path, **weights)
    trainer.create_optimizer()
    model.train()
    if trainer.teacher:  # as if training had moved the encoder
        for parameter in model.encoder.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    loss = trainer.compute_loss(model, {"pixel_values": pixels})
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    features = model.get_image_features(pixels).last_hidden_state
    z = features.detach() if model.config.freeze_encoder else features
    codes = model.quantizer.embedding.weight @ model.quantizer.embedding_proj.weight.T
    codes = codes + model.quantizer.embedding_proj.bias
    chosen = codes[torch.cdist(z, codes[None].expand(2, -1, -1)).argmin(-1)]
    vq = 0.25 * (chosen.detach() - z).square().mean() + (chosen - z.detach()).square().mean()
    x = model.decode_latents(z + (chosen - z).detach()).decoded_pixel_values
    network = Perceptual().network
    features_of_x, features_of_y = network(x).tanh(), network(pixels).tanh()
    perceptual_loss = ((features_of_x - features_of_y) ** 2).mean()
    reconstruction = weights["l1_weight"] * (x - pixels).abs().mean()
    reconstruction = reconstruction + weights["l2_weight"] * ((x - pixels) ** 2).mean()
    reconstruction = reconstruction + (weights["lpips_weight"] + weights["convnext_weight"]) * perceptual_loss
    expected = reconstruction + vq
    if trainer.adversary:
        logits = trainer.adversary.pair.discriminator(x)
        if recipe == "simvq":
            adversarial = (1 + (-logits.mean((1, 2, 3))).exp()).log().mean()
        else:
            adversarial = -logits.mean()
        weight = weights["gan_weight"]
        if recipe == "rae":
            last = model.decoder.decoder_pred.weight
            a, b = (torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (reconstruction, adversarial))
            weight = weight * a / b
        expected = expected + weight * adversarial
    if recipe == "vqrae stage 2":
        with torch.no_grad():
            target = trainer.teacher.get_image_features(pixels).last_hidden_state
        assert (features - target).abs().max() > 1e-3
        expected = expected + (features - target).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    expected.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_under_bf16_perceptual_losses_are_fp32_and_the_discriminator_is_bf16_in_both_its_passes(
    perceptual, tmp_path, image_folder, pixels
):
    """Also where a caller has autocast on; logits become fp32 before the losses of them."""
    weights = {"lpips_weight": 1.0, "convnext_weight": 1.0, "gan_weight": 0.1}
    trainer = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path, bf16=True, max_steps=1, **weights)
    seen = {}

    def watch(name, module):
        module.register_forward_hook(lambda module, inputs, output: seen.setdefault(name, []).append(output.dtype))

    watch("lpips", trainer.reconstruction_loss.lpips.network)
    watch("convnext", trainer.reconstruction_loss.convnext.network)
    watch("discriminator", trainer.adversary.pair.discriminator.layers[0])
    watch("decoder", trainer.model.decoder.decoder_layers[0].fc1)
    trainer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trainer.reconstruction_loss(pixels.bfloat16(), pixels)
    dtypes = {name: set(found) for name, found in seen.items()}
    bf16, fp32 = {torch.bfloat16}, {torch.float32}
    assert dtypes == {"lpips": fp32, "convnext": fp32, "discriminator": bf16, "decoder": bf16}
    assert len(seen["discriminator"]) == 3  # for the generator, then real and fake


@pytest.mark.parametrize("stage", [1, 2])
def test_who_gets_gradients_from_which_loss(stage, perceptual, tmp_path, image_folder, pixels):
    """Encoder: in stage 2 only. W and b: from the quantizer's loss only. Codebook, teacher, loss networks: never. The
    discriminator: from its own loss only."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(freeze_encoder=stage == 1, legacy=False))
    sources = {
        "pixels": {"l2_weight": 1.0},
        "perceptual": {"l2_weight": 1e-30, "lpips_weight": 1.0},
        "gan": {"l2_weight": 1e-30, "gan_weight": 0.1},
        "vq": {"l2_weight": 1e-30, "vq_weight": 1.0},
        "distillation": {"l2_weight": 1e-30, "distillation_weight": 1.0},
    }
    reached = {}
    for source, weights in sources.items():
        weights = {"lpips_weight": 0.0, "vq_weight": 0.0} | weights
        trainer = make_trainer(model, image_folder, tmp_path, **weights)
        trainer.create_optimizer()
        model.train()
        if trainer.teacher:
            for parameter in trainer.teacher.encoder.parameters():
                parameter.data += 0.01
        model.zero_grad()
        trainer.compute_loss(model, {"pixel_values": pixels}).backward()
        reached[source] = {
            part
            for part in ("encoder", "quantizer.embedding_proj", "decoder")
            for name, p in model.named_parameters()
            if name.startswith(part) and p.grad is not None and p.grad.abs().max() > 1e-12
        }
        frozen = [model.quantizer.embedding.weight, *trainer.reconstruction_loss.parameters()]
        frozen += list(trainer.teacher.parameters()) if trainer.teacher else []
        assert all(tensor.grad is None and not tensor.requires_grad for tensor in frozen)
        if trainer.adversary:
            assert all(p.grad is None for p in trainer.adversary.pair.parameters())
            real, fake = pixels.clone().requires_grad_(), pixels.flip(0).clone().requires_grad_()
            before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            trainer.adversary.backward(real, fake, 1)
            assert all(p.grad is not None for p in trainer.adversary.pair.parameters())
            assert real.grad is None and fake.grad is None
            assert all(torch.equal(before[n], p.grad) for n, p in model.named_parameters() if p.grad is not None)
    encoder = {"encoder"} if stage == 2 else set()
    assert reached == {
        "pixels": {"decoder"} | encoder,
        "perceptual": {"decoder"} | encoder,
        "gan": {"decoder"} | encoder,
        "vq": {"quantizer.embedding_proj"} | encoder,
        "distillation": encoder,
    }


def test_lecam_averages_follow_the_logits(tmp_path):
    torch.manual_seed(0)
    args = training_arguments(tmp_path, gan_weight=0.1, lecam_weight=1.0)
    from accelerate import Accelerator

    adversary = Adversary(args)
    adversary.prepare(Accelerator(cpu=True))
    adversary.prepare_schedule(10)
    expected = torch.zeros(2)
    for _ in range(2):  # micro-batches
        terms = adversary.backward(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), 2)
        expected = 0.999 * expected + 0.001 * torch.stack([terms["logits_real"], terms["logits_fake"]])
    assert not adversary.pair.averages.any()
    adversary.step()
    torch.testing.assert_close(adversary.pair.averages, expected)
    adversary.backward(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), 1)
    adversary.discard()
    adversary.step()
    torch.testing.assert_close(adversary.pair.averages, expected)


def test_convnext_loss_is_the_squared_error_of_logits_at_224_px(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    monkeypatch.setattr("training.losses.convnext_small", lambda weights: network)
    x, y = torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)
    loss = ConvNextLoss()(x, y)
    std, average = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.229, 0.224, 0.225], [0.485, 0.456, 0.406]))
    logits = [network((F.interpolate(v, size=224, mode="bilinear", antialias=True) - average) / std) for v in (x, y)]
    torch.testing.assert_close(loss, (logits[0] - logits[1]).square().mean())
    loss.backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in network.parameters())


def test_missing_perceptual_weights(monkeypatch, tmp_path, image_folder):
    """An error that says what to do, or training without, as the arguments say; a folder is used where given."""

    def refuse(**kwargs):
        raise OSError("no network")

    monkeypatch.setattr("eval.lpips.lpips.LearnedPerceptualImagePatchSimilarity", refuse)
    with pytest.raises(RuntimeError, match="--perceptual_optional"):
        PerceptualLoss("vgg")
    model = VQRAEModel(tiny_config())
    with pytest.raises(RuntimeError, match="--lpips_weight 0"):
        make_trainer(model, image_folder, tmp_path, lpips_weight=1.0)
    trainer = make_trainer(model, image_folder, tmp_path, lpips_weight=1.0, perceptual_optional=True)
    assert set(trainer.reconstruction_loss(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))[1]) == {"l2"}

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "vgg16.pth").touch()
    cache, seen = torch.hub.get_dir(), []

    def look(net_type):
        seen.extend(file.name for file in (Path(torch.hub.get_dir()) / "checkpoints").iterdir())
        raise OSError("seen")

    monkeypatch.setattr("eval.lpips.lpips.LearnedPerceptualImagePatchSimilarity", look)
    with pytest.raises(RuntimeError):
        PerceptualLoss("vgg", str(tmp_path / "weights"))
    assert seen == ["vgg16.pth"] and torch.hub.get_dir() == cache


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"gan_generator_loss": "wasserstein"}, "gan_generator_loss must be one of"),
        ({"discriminator": "stylegan"}, "discriminator must be one of"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps"),
        ({"l2_weight": 0.0}, "nothing would train the decoder"),
    ],
)
def test_arguments_that_cannot_work_are_named(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **wrong)


def test_help_of_every_option_says_something():
    own = VQRAETrainingArguments.__dataclass_fields__.keys() - VQRAETrainingArguments.__mro__[1].__dataclass_fields__
    assert "gan_weight" in own
    for name in own:
        assert len(VQRAETrainingArguments.__dataclass_fields__[name].metadata["help"]) > 10, name
