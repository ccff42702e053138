#!/usr/bin/env python
"""What rounding of the weights does to tokens: the share that stays the same, and the PSNR of reconstructions.

    python -m benchmarks.rounded_weights --model_name_or_path checkpoints/vqrae-dinov2-small --data examples/images

Rows: fp16 and bf16 (what `.to(dtype)` rounds: all but input projection and quantizer), int8 weights as transformers
loads them (torchao; the decoder alone), and int8 weights of the encoder as well.
"""

import torch
from tqdm import tqdm
from transformers import TorchAoConfig

from eval.commands import CommandParser
from eval.metrics import to_uint8
from eval.psnr.psnr import psnr_per_image
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import dataset_of_files, find_images
from reading.images import decode_image
from reading.models import load_processor


@torch.no_grad()
def outputs(model, images, processor: VQRAEImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the PSNR of each image."""
    tokens, scores = [], []
    for record in tqdm(images, desc="Reconstructing", unit="image", leave=False):
        pixels = processor(decode_image(record), return_tensors="pt").pixel_values
        output = model.eval()(pixels, return_loss=False)
        tokens.append(output.image_tokens.flatten())
        fake, real = to_uint8(output.decoded_pixel_values) / 255, to_uint8(pixels) / 255
        scores.append(psnr_per_image(fake, real))
    return torch.cat(tokens), torch.cat(scores)


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="A trained tokenizer: folder or hub repository.")
    parser.add_argument("--data", required=True, help="A folder of images, or a .txt file that lists them.")
    args = parser.parse_args()
    from torchao.quantization import Int8WeightOnlyConfig

    def load(**options):
        return VQRAEModel.from_pretrained(args.model_name_or_path, dtype=torch.float32, **options)

    model = load()
    images = dataset_of_files(find_images(args.data))["image"]
    processor = load_processor(args.model_name_or_path, model.config.image_size)
    expected, scores = outputs(model, images, processor)
    rows = {
        "float16": lambda: load().half(),
        "bfloat16": lambda: load().bfloat16(),
        "int8, decoder": lambda: load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig())),
        "int8, encoder and decoder": lambda: load(
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["quantizer"])
        ),
    }
    print(f"{len(scores)} images, {len(expected):,} tokens; float32: {scores.mean():.3f} dB")
    for name, build in rows.items():
        tokens, rounded = outputs(build(), images, processor)
        print(f"{name}: {(tokens == expected).float().mean():.2%} of the tokens are the same, {rounded.mean():.3f} dB")


if __name__ == "__main__":
    main()
