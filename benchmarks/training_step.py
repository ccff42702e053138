#!/usr/bin/env python
"""Time and memory of one full training step, GAN and LPIPS on, beside the same step written the references' way.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --device cuda --bf16 --batch_size 64 --steps 20 --data my_images \\
        --num_workers 8 --profile

Both train the quantizer and the decoder on a frozen encoder with L1 + LPIPS (VGG) + adaptive PatchGAN: the same
networks from the same seeds, the same pixels. "references" does what RAE's and taming's loops do: a torchmetrics
metric computes LPIPS, autograd.grad gives each loss's gradient at the last layer (a pass back through each loss
network), backward goes through all of them again, and encoder and decoder run anew for the discriminator; with --bf16
all of it is under autocast. "ours" is VQRAETrainer.training_step and the optimizer's step, as in training.

Each runs in a process of its own, in turns; times are medians. With --data, pixels are random crops of these images as
in training, and the time that a step waits for them is told apart. The parts of ours are timed one by one, beside their
arithmetic (FlopCounterMode) at the rate of one large matrix product of this machine. With --profile, torch's profiler
says where the time of a step of ours goes, and what bounds it. Weights are random (LPIPS too): time does not depend on
them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
import torchmetrics.image.lpip
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

import training.losses
from benchmarks.measuring import OTHERS, PRODUCTS, Profile, name_of, now, peak_megabytes, profiled, timed
from configuration_simvq import VQRAEConfig
from eval.commands import CommandParser, ends_in_one_line
from eval.options import present_device, whole_number
from modeling_simvq import VQRAEModel
from reading.sources import load_images
from training.arguments import VQRAETrainingArguments
from training.data import TrainTransform, collate, with_pixels
from training.losses import discriminator_hinge, generator_hinge
from training.trainer import VQRAETrainer


parser = CommandParser(__doc__)
what = parser.add_argument_group("the step")
what.add_argument("--batch_size", type=whole_number(), default=4, help="Images in a step (default: 4).")
what.add_argument("--image_size", type=whole_number(), default=256, help="Side in pixels (default: 256).")
what.add_argument(
    "--width", type=whole_number(64), default=768, help="Of encoder and decoder (default: 768, SigLIP2-base)."
)
what.add_argument("--layers", type=whole_number(), default=12, help="Of encoder and decoder each (default: 12).")
what.add_argument("--codes", type=whole_number(2), default=16384, help="Size of the codebook (default: 16384).")
what.add_argument("--bf16", action="store_true", help="Autocast to bf16, as train_hf.py --bf16 (default: fp32).")
data = parser.add_argument_group("its images")
data.add_argument("--data", help="Images as train_hf.py --train_data takes them (default: one batch of noise).")
data.add_argument("--num_workers", type=whole_number(0), default=0, help="That decode --data (default: 0).")
how = parser.add_argument_group("how it is measured")
how.add_argument("--device", type=present_device, default="cpu", help="cpu (default) or cuda.")
how.add_argument("--steps", type=whole_number(), default=3, help="Timed steps in a process (default: 3).")
how.add_argument("--rounds", type=whole_number(), default=2, help="Processes of each kind, in turns (default: 2).")
how.add_argument("--profile", action="store_true", help="Also a step of ours under the profiler.")
how.add_argument("--run", choices=["ours", "references", "parts", "profile"], help=argparse.SUPPRESS)


def lpips_network() -> torch.nn.Module:
    torch.manual_seed(1)
    return _NoTrainLpips(net="vgg", pretrained=False, pnet_rand=True, use_dropout=False)


class Lpips(training.losses.PerceptualLoss):
    """With random weights: none are needed here."""

    def __init__(self, *args) -> None:
        torch.nn.Module.__init__(self)
        self.network = lpips_network().requires_grad_(False).eval()


def build(args) -> VQRAEModel:
    torch.manual_seed(0)
    encoder = {"model_type": "siglip_vision_model", "image_size": args.image_size, "patch_size": 16}
    encoder |= {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.width // 64}
    encoder |= {"intermediate_size": 4 * args.width}
    config = VQRAEConfig(encoder_config=encoder, image_size=args.image_size, codebook_size=args.codes, legacy=False)
    return VQRAEModel(config).train().to(args.device)


def batches(args) -> Iterator[torch.Tensor]:
    """Pixels (batch_size, 3, image_size, image_size) on the device, without end."""
    if args.data is None:
        torch.manual_seed(1)
        pixels = torch.rand(args.batch_size, 3, args.image_size, args.image_size).to(args.device)
        while True:
            yield pixels
    images = with_pixels(load_images(args.data), TrainTransform(args.image_size, 0.5))
    loader = torch.utils.data.DataLoader(
        images, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0, pin_memory=args.device.type == "cuda",
    )  # fmt: skip
    if not len(loader):
        raise ValueError(f"{args.data} has {len(images)} images, fewer than --batch_size {args.batch_size}: lower it.")
    while True:
        for batch in loader:
            yield batch["pixel_values"].to(args.device, non_blocking=True)


def make_trainer(model: VQRAEModel, args) -> VQRAETrainer:
    arguments = VQRAETrainingArguments(
        "unused", l1_weight=1.0, l2_weight=0.0, lpips_weight=1.0, gan_weight=0.75, gan_adaptive=True, ema_decay=0.0,
        use_cpu=args.device.type == "cpu", bf16=args.bf16, report_to="none", max_steps=100, learning_rate=1e-4,
        lr_scheduler_type="constant",
    )  # fmt: skip
    torch.manual_seed(2)
    with mock.patch.object(training.losses, "PerceptualLoss", Lpips):
        trainer = VQRAETrainer(model, arguments)
    trainer.accelerator.prepare_model(model)  # autocast, in the model's own forward
    trainer.create_optimizer()
    trainer.create_scheduler(100)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def ours(model: VQRAEModel, args):
    trainer = make_trainer(model, args)

    def step(pixels: torch.Tensor) -> float:
        loss = trainer.training_step(model, {"pixel_values": pixels})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    return step


def references(model: VQRAEModel, args):
    with mock.patch.object(torchmetrics.image.lpip, "_NoTrainLpips", lambda net: lpips_network()):
        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True).requires_grad_(False)
    metric = metric.to(args.device)
    discriminator = make_trainer(model, args).adversary.pair.discriminator
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0)
    last_layer = model.decoder.decoder_pred.weight

    def autocast():
        return torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16)

    def step(pixels: torch.Tensor) -> float:
        discriminator.requires_grad_(False)
        with autocast():
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
        with torch.no_grad(), autocast():
            fake = model(pixels, return_loss=False).decoded_pixel_values
        with autocast():
            loss = discriminator_hinge(discriminator(pixels), discriminator(fake))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        discriminator_optimizer.step()
        discriminator_optimizer.zero_grad()
        return total.item()

    return step


def parts(model: VQRAEModel, args) -> dict[str, dict[str, float]]:
    """Seconds and GFLOP of each part of our step, alone."""
    trainer, pixels = make_trainer(model, args), next(batches(args))
    adversary, lpips = trainer.adversary, trainer.reconstruction_loss.lpips

    def encode():
        with trainer.accelerator.autocast():
            return model.get_image_features(pixels).last_hidden_state

    def decode():
        with trainer.accelerator.autocast():
            return model.decode_latents(quantized, grid).decoded_pixel_values

    features, grid = encode(), model._grid_of(pixels)
    quantized = model.quantizer(features)[0].detach()
    fake = decode().detach()

    def decode_and_back():
        decode().backward(torch.rand_like(fake))
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
        "encoder, forward": encode,
        "quantizer, forward and backward": quantize,
        "decoder, forward and backward": decode_and_back,
        "LPIPS of both images, gradient of one": lpips_and_gradient,
        "discriminator for the generator, with gradient": adversarial_and_gradient,
        "discriminator on both, forward and backward": discriminator,
        "optimizer and clipping": optimize,
    }
    a = torch.rand(4096, 4096, device=args.device, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    rate = 2 * 4096**3 / min(timed(lambda: a @ a, args.device) for _ in range(5)) / 1e9
    measured = {"_rate": {"gflops": rate}}
    for name, function in work.items():
        function()
        with FlopCounterMode(display=False) as counter:
            function()
        seconds = statistics.median(timed(function, args.device) for _ in range(3))
        measured[name] = {"seconds": seconds, "gflop": counter.get_total_flops() / 1e9}
    return measured


def steps_of(kind: str, args) -> dict:
    """Seconds of the timed steps, those of them in which there were no pixels yet, and MB."""
    step, pixels = {"ours": ours, "references": references}[kind](build(args), args), batches(args)
    losses, seconds, waited = [], [], []
    for _ in range(1 + 2 * args.num_workers + args.steps):  # two batches a worker are there when the first is
        start = now(args.device)
        batch = next(pixels)
        there = time.perf_counter()
        losses.append(step(batch))
        seconds.append(now(args.device) - start)
        waited.append(there - start)
    timed_steps = {"seconds": seconds[-args.steps :], "waited": waited[-args.steps :]}
    return {**timed_steps, "peak": peak_megabytes(args.device), "first loss": losses[0]}


def profile_of_a_step(args) -> Profile:
    """Of ours, on pixels that are there."""
    step, pixels = ours(build(args), args), next(batches(args))
    for _ in range(2):  # what is done once, and the discriminator's first step
        step(pixels)
    return profiled(lambda: step(pixels), args.device)


def bound(waiting: float, profile: Profile) -> str:
    """What takes most of a step.

    Args:
        waiting: the share of its time without pixels.
        profile: of the rest.
    """
    working = (1 - waiting) / profile.seconds
    shares = {"waiting for images": waiting}
    shares["matrix products, convolutions and attention"] = working * sum(profile.kinds[kind] for kind in PRODUCTS)
    shares |= {kind: working * profile.kinds[kind] for kind in OTHERS}
    most = max(shares, key=shares.get)
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return f"What bounds the step: {most} ({listed})."


def run(kind: str) -> dict:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], "--run", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"The process of '{kind}' died; its message stands above.")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parser.parse_args()
    if args.num_workers and args.data is None:
        parser.error("--num_workers are for --data")
    if args.run == "parts":
        print(json.dumps(parts(build(args), args)))
    elif args.run == "profile":
        print(json.dumps(vars(profile_of_a_step(args))))
    elif args.run:
        print(json.dumps(steps_of(args.run, args)))
    else:
        compare(args)


def compare(args) -> None:
    """Prints everything."""
    results = {"references": [], "ours": []}
    for number in range(args.rounds):
        for kind, done in results.items():
            print(f"Round {number + 1} of {args.rounds}: {kind}", file=sys.stderr, flush=True)
            done.append(run(kind))
    print("The parts of ours", file=sys.stderr, flush=True)
    measured = run("parts")
    seconds = {kind: statistics.median(x for r in done for x in r["seconds"]) for kind, done in results.items()}
    memory = "MB of the GPU's tensors" if args.device.type == "cuda" else "MB of the process"
    print(
        f"\nBatch {args.batch_size}, {args.image_size} px, {'bf16' if args.bf16 else 'fp32'}, {name_of(args.device)}, "
        f"torch {torch.__version__}, {args.num_workers} workers\n"
    )
    print(f"| step | seconds | images a second | waiting for images | peak {memory} | first loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    shares = {}
    for kind, done in results.items():
        peak = statistics.median(r["peak"] for r in done)
        shares[kind] = sum(x for r in done for x in r["waited"]) / sum(x for r in done for x in r["seconds"])
        print(
            f"| {kind} | {seconds[kind]:.3f} | {args.batch_size / seconds[kind]:.1f} | {shares[kind]:.1%} | "
            f"{peak:,.0f} | {done[0]['first loss']:.6f} |"
        )
    print(f"\nReferences / ours: {seconds['references'] / seconds['ours']:.2f}\n")
    rate = measured.pop("_rate")["gflops"]
    print(f"| part of ours, alone | seconds | GFLOP | seconds at {rate:.0f} GFLOP/s |\n| --- | ---: | ---: | ---: |")
    for name, part in measured.items():
        print(f"| {name} | {part['seconds']:.3f} | {part['gflop']:,.0f} | {part['gflop'] / rate:.3f} |")
    together = sum(part["seconds"] for part in measured.values())
    arithmetic = sum(part["gflop"] for part in measured.values())
    print(f"| sum | {together:.3f} | {arithmetic:,.0f} | {arithmetic / rate:.3f} |")
    print(f"| the whole step; beyond its parts | {seconds['ours']:.3f} | | {seconds['ours'] - together:+.3f} |")
    if args.profile:
        print("A step of ours under the profiler", file=sys.stderr, flush=True)
        profile = Profile(**run("profile"))
        print(f"\n{profile.table()}\n\nOutside matrix products, convolutions and attention: {profile.outside:.1%}")
        print(bound(shares["ours"], profile))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
