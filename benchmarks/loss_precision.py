#!/usr/bin/env python
"""What bf16 does to the loss networks of training: the gradient that each gives at the reconstruction's pixels, under
autocast and in fp32.

    python -m benchmarks.loss_precision --data PHOTOS
    python -m benchmarks.loss_precision --data PHOTOS --device cuda

Images go through a trained tokenizer, and its reconstructions through LPIPS, ConvNeXt-S (where their weights can be
had) and discriminators that have learned for a few steps to tell both apart. "nearer" are reconstructions with a tenth
of the error, as late in a training. cosine: of the gradients, the batch's and the worst image's; length: of the one
under autocast over the other; value: relative difference of the loss; ms: forward and back to the pixels.
"""

import statistics
import time

import torch
from torch import nn

from eval.commands import CommandParser
from image_processing_simvq import VQRAEImageProcessor
from reading.files import dataset_of_files, find_images
from reading.images import decode_image
from reading.models import load_pretrained
from training.discriminators import DinoDiscriminator, PatchDiscriminator
from training.losses import ConvNextLoss, PerceptualLoss, discriminator_hinge, generator_hinge


def gradient(loss, fake: torch.Tensor, real: torch.Tensor, bf16: bool) -> tuple[torch.Tensor, float]:
    """At the pixels of `fake`, (B, 3, H, W), and the value of the loss."""
    leaf = fake.detach().requires_grad_()
    with torch.autocast(fake.device.type, dtype=torch.bfloat16, enabled=bf16):
        value = loss(leaf, real)
    return torch.autograd.grad(value, leaf)[0].float(), value.item()


def milliseconds(loss, fake: torch.Tensor, real: torch.Tensor, bf16: bool, rounds: int) -> float:
    """The median of some passes, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        gradient(loss, fake, real, bf16)  # ends in .item(), which waits for the device
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def trained(network: nn.Module, fake: torch.Tensor, real: torch.Tensor, steps: int):
    """The generator's loss of a discriminator that has learned for some steps."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.5, 0.9))
    for _ in range(steps):
        optimizer.zero_grad()
        discriminator_hinge(network(real), network(fake)).backward()
        optimizer.step()
    network.requires_grad_(False).eval()
    return lambda fake, real: generator_hinge(network(fake).float())


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--data", required=True, help="Images: a folder, or a .txt file that lists them.")
    parser.add_argument("--model_name_or_path", default="checkpoints/vqrae-dinov2-small", help="A trained tokenizer.")
    parser.add_argument("--images", type=int, default=8, help="Images in the batch.")
    parser.add_argument("--discriminator_steps", type=int, default=30, help="Steps of the discriminators.")
    parser.add_argument("--vit", help="A frozen ViT for the dino discriminator, such as facebook/dino-vits8.")
    parser.add_argument("--rounds", type=int, default=0, help="Passes of which the time is the median; 0: none.")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = load_pretrained(args.model_name_or_path, {}).eval().to(args.device)
    processor = VQRAEImageProcessor.for_image_size(model.config.image_size)
    records = dataset_of_files(find_images(args.data)[: args.images])["image"]
    real = processor([decode_image(record) for record in records], return_tensors="pt").pixel_values.to(args.device)
    with torch.no_grad():
        fake = model(real, return_loss=False).decoded_pixel_values
    print("Loading the networks, and training the discriminators.", flush=True)
    networks = {}
    for name, build in (
        ("LPIPS (vgg)", lambda: PerceptualLoss("vgg")),
        ("LPIPS (alex)", lambda: PerceptualLoss("alex")),
        ("ConvNeXt-S", ConvNextLoss),
    ):
        try:
            networks[name] = build().to(args.device)
        except RuntimeError as error:
            print(f"{name} is left out: {error}")
    torch.manual_seed(0)
    networks["PatchGAN"] = trained(PatchDiscriminator().to(args.device), fake, real, args.discriminator_steps)
    if args.vit:
        networks["dino"] = trained(DinoDiscriminator(args.vit).to(args.device), fake, real, args.discriminator_steps)

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{len(real)} images of {model.config.image_size} px, {device}, torch {torch.__version__}\n")
    columns = ["cosine", "worst image", "length", "value", *(["ms fp32", "ms bf16"] if args.rounds else [])]
    print(f"| network | reconstructions | {' | '.join(columns)} |\n| --- | --- |{' ---: |' * len(columns)}")
    for name, loss in networks.items():
        for kind, pixels in (("as they are", fake), ("nearer", real + 0.1 * (fake - real))):
            (expected, value), (found, rounded) = (gradient(loss, pixels, real, bf16) for bf16 in (False, True))
            cosine = torch.cosine_similarity(found.flatten(), expected.flatten(), 0).item()
            worst = torch.cosine_similarity(found.flatten(1), expected.flatten(1)).min().item()
            length = (found.norm() / expected.norm()).item()
            numbers = [f"{cosine:.4f}", f"{worst:.4f}", f"{length:.3f}", f"{abs(rounded / value - 1):.2%}"]
            if args.rounds:
                numbers += [f"{milliseconds(loss, pixels, real, bf16, args.rounds):.1f}" for bf16 in (False, True)]
            print(f"| {name} | {kind} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
