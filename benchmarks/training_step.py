#!/usr/bin/env python
"""Time and memory of one full training step, GAN and LPIPS on, beside the same step written the references' way.

    python -m benchmarks.training_step

Both train the quantizer and the decoder on a frozen encoder with L1 + LPIPS (VGG) + adaptive PatchGAN: the same
networks from the same seeds, the same pixels, fp32. "references" does what RAE's and taming's loops do: a torchmetrics
metric computes LPIPS, autograd.grad gives each loss's gradient at the last layer (a pass back through each loss
network), backward goes through all of them again, and encoder and decoder run anew for the discriminator. "ours" is
VQRAETrainer.training_step and the optimizer's step, as in training.

Each runs in a process of its own, in turns; times are medians. The parts of ours are timed one by one, beside their
arithmetic (FlopCounterMode) at the rate of one large matrix product of this machine. Weights are random (LPIPS too):
time does not depend on them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics.image.lpip
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

import training.losses
from configuration_simvq import VQRAEConfig
from eval.commands import ends_in_one_line
from modeling_simvq import VQRAEModel
from training.arguments import VQRAETrainingArguments
from training.losses import discriminator_hinge, generator_hinge
from training.trainer import VQRAETrainer


ROOT = Path(__file__).resolve().parents[1]


def lpips_network() -> torch.nn.Module:
    torch.manual_seed(1)
    return _NoTrainLpips(net="vgg", pretrained=False, pnet_rand=True, use_dropout=False)


class Lpips(training.losses.PerceptualLoss):
    """With random weights: none are needed here."""

    def __init__(self, *args) -> None:
        torch.nn.Module.__init__(self)
        self.network = lpips_network().requires_grad_(False).eval()


def build(args) -> tuple[VQRAEModel, torch.Tensor]:
    torch.manual_seed(0)
    encoder = {"model_type": "siglip_vision_model", "image_size": args.image_size, "patch_size": 16}
    encoder |= {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.width // 64}
    encoder |= {"intermediate_size": 4 * args.width}
    config = VQRAEConfig(encoder_config=encoder, image_size=args.image_size, codebook_size=args.codes, legacy=False)
    return VQRAEModel(config).train(), torch.rand(args.batch_size, 3, args.image_size, args.image_size)


def make_trainer(model: VQRAEModel, folder: str) -> VQRAETrainer:
    training.losses.PerceptualLoss = Lpips
    arguments = VQRAETrainingArguments(
        folder, l1_weight=1.0, l2_weight=0.0, lpips_weight=1.0, gan_weight=0.75, gan_adaptive=True, ema_decay=0.0,
        use_cpu=True, report_to="none", max_steps=100, learning_rate=1e-4, lr_scheduler_type="constant",
    )  # fmt: skip
    torch.manual_seed(2)
    trainer = VQRAETrainer(model, arguments)
    trainer.create_optimizer()
    trainer.create_scheduler(100)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def ours(model: VQRAEModel, pixels: torch.Tensor):
    trainer = make_trainer(model, "unused")

    def step() -> float:
        loss = trainer.training_step(model, {"pixel_values": pixels})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    return step


def references(model: VQRAEModel, pixels: torch.Tensor):
    torchmetrics.image.lpip._NoTrainLpips = lambda net: lpips_network()
    metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True).requires_grad_(False)
    discriminator = make_trainer(model, "unused").adversary.pair.discriminator
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0)
    last_layer = model.decoder.decoder_pred.weight

    def step() -> float:
        discriminator.requires_grad_(False)
        output = model(pixels, return_loss=False)
        reconstruction = output.decoded_pixel_values
        loss = F.l1_loss(reconstruction, pixels) + metric(reconstruction.clamp(0, 1), pixels)
        adversarial = generator_hinge(discriminator(reconstruction))
        a = torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
        b = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
        weight = (a.norm() / (b.norm() + 1e-6)).clamp(0, 1e4).detach()
        total = loss + 0.75 * weight * adversarial + output.embedding_loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        discriminator.requires_grad_(True)
        with torch.no_grad():
            fake = model(pixels, return_loss=False).decoded_pixel_values
        discriminator_hinge(discriminator(pixels), discriminator(fake)).backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        discriminator_optimizer.step()
        discriminator_optimizer.zero_grad()
        return total.item()

    return step


def parts(model: VQRAEModel, pixels: torch.Tensor) -> dict[str, dict[str, float]]:
    """Seconds and GFLOP of each part of our step, alone."""
    trainer = make_trainer(model, "unused")
    adversary, lpips = trainer.adversary, trainer.reconstruction_loss.lpips
    features = model.get_image_features(pixels).last_hidden_state
    grid = model._grid_of(pixels)
    quantized = model.quantizer(features)[0].detach()
    fake = model.decode_latents(quantized, grid).decoded_pixel_values.detach()

    def decode_and_back():
        model.decode_latents(quantized, grid).decoded_pixel_values.backward(torch.rand_like(fake))
        model.zero_grad()

    def lpips_and_gradient():
        leaf = fake.clone().requires_grad_()
        lpips(leaf, pixels).backward()

    def adversarial_and_gradient():
        leaf = fake.clone().requires_grad_()
        adversary.generator_loss(leaf).backward()

    def discriminator():
        adversary.backward(pixels, fake, 1)
        adversary.discard()

    def quantize():
        model.quantizer(features)[1].backward()
        model.zero_grad()

    def optimize():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    work = {
        "encoder, forward": lambda: model.get_image_features(pixels).last_hidden_state,
        "quantizer, forward and backward": quantize,
        "decoder, forward and backward": decode_and_back,
        "LPIPS of both images, gradient of one": lpips_and_gradient,
        "discriminator for the generator, with gradient": adversarial_and_gradient,
        "discriminator on both, forward and backward": discriminator,
        "optimizer and clipping": optimize,
    }
    a = torch.rand(4096, 4096)
    rate = 2 * 4096**3 / min(timed(lambda: a @ a) for _ in range(5)) / 1e9
    measured = {"_rate": {"gflops": rate}}
    for name, function in work.items():
        function()
        with FlopCounterMode(display=False) as counter:
            function()
        seconds = statistics.median(timed(function) for _ in range(3))
        measured[name] = {"seconds": seconds, "gflop": counter.get_total_flops() / 1e9}
    return measured


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4, help="Images in a step (default: 4).")
    parser.add_argument("--image_size", type=int, default=256, help="Side in pixels (default: 256).")
    parser.add_argument("--width", type=int, default=768, help="Of encoder and decoder (default: 768, SigLIP2-base).")
    parser.add_argument("--layers", type=int, default=12, help="Of encoder and decoder each (default: 12).")
    parser.add_argument("--codes", type=int, default=16384, help="Size of the codebook (default: 16384).")
    parser.add_argument("--steps", type=int, default=3, help="Timed steps in a process (default: 3).")
    parser.add_argument("--rounds", type=int, default=2, help="Processes of each kind, in turns (default: 2).")
    parser.add_argument("--run", choices=["ours", "references", "parts"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        model, pixels = build(args)
        if args.run == "parts":
            print(json.dumps(parts(model, pixels)))
            return
        step = {"ours": ours, "references": references}[args.run](model, pixels)
        first = step()
        seconds = [timed(step) for _ in range(args.steps)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak": peak, "first loss": first}))
        return

    def run(kind: str) -> dict:
        command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], "--run", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"The process of '{kind}' died; its message stands above.")
        return json.loads(done.stdout.splitlines()[-1])

    results = {"references": [], "ours": []}
    for number in range(args.rounds):
        for kind, done in results.items():
            print(f"Round {number + 1} of {args.rounds}: {kind}", file=sys.stderr, flush=True)
            done.append(run(kind))
    measured = run("parts")
    seconds = {kind: statistics.median(x for r in done for x in r["seconds"]) for kind, done in results.items()}
    print(
        f"\nBatch {args.batch_size}, {args.image_size} px, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
    )
    print("| step | seconds | peak MB of the process | first loss |\n| --- | ---: | ---: | ---: |")
    for kind, done in results.items():
        peak = statistics.median(r["peak"] for r in done)
        print(f"| {kind} | {seconds[kind]:.2f} | {peak:,.0f} | {done[0]['first loss']:.6f} |")
    print(f"\nReferences / ours: {seconds['references'] / seconds['ours']:.2f}\n")
    rate = measured.pop("_rate")["gflops"]
    print(f"| part of ours, alone | seconds | GFLOP | seconds at {rate:.0f} GFLOP/s |\n| --- | ---: | ---: | ---: |")
    for name, part in measured.items():
        print(f"| {name} | {part['seconds']:.2f} | {part['gflop']:,.0f} | {part['gflop'] / rate:.2f} |")
    together = sum(part["seconds"] for part in measured.values())
    arithmetic = sum(part["gflop"] for part in measured.values())
    print(f"| sum | {together:.2f} | {arithmetic:,.0f} | {arithmetic / rate:.2f} |")
    print(f"| the whole step; beyond its parts | {seconds['ours']:.2f} | | {seconds['ours'] - together:+.2f} |")


if __name__ == "__main__":
    with ends_in_one_line():
        main()
