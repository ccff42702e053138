#!/usr/bin/env python
"""What drawing images with transformers' generate costs, beside the forward passes that it needs and two other loops.

    python -m benchmarks.generation
    python -m benchmarks.generation --model_name_or_path runs/generator --device cuda --batch_size 64

bare      the forward passes alone, one token at a time with a cache of keys and values, of the same batch: conditions
          and null conditions. Nothing is drawn.
ours      generation.sampling.generate_tokens: generate, guidance, a draw by the seed of each image.
LlamaGen  its loop in our words (autoregressive/models/generate.py): a cache as long as the image from the start, of
          which attention sees all and masks the rest, softmax, multinomial, probabilities kept.
two       generate's own guidance (negative_prompt_ids), which runs conditions and null conditions one after the other,
          with the draws of ours.
no cache  the whole image so far in every step. Run once; draws with the noise of ours, and must give the same tokens.

All on the same model. Loops take turns; printed are medians of seconds on the clock and, for a machine that others use
too, of seconds of this process on processors.
"""

import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.measuring import name_of, now
from eval.commands import CommandParser, ends_in_one_line
from eval.options import present_device, whole_number
from generation.sampling import SeededCodes, generate_tokens, load_generator
from generation.vocabulary import Vocabulary


parser = CommandParser(__doc__)
parser.add_argument("--model_name_or_path", help="A generator (default: random weights, of the size below).")
parser.add_argument("--side", type=whole_number(2), default=10, help="Of the random model's grid (default: 10).")
parser.add_argument("--codes", type=whole_number(2), default=16384, help="Of the random model (default: 16384).")
parser.add_argument("--width", type=whole_number(64), default=512, help="Of the random model (default: 512).")
parser.add_argument("--layers", type=whole_number(), default=6, help="Of the random model (default: 6).")
parser.add_argument("--batch_size", type=whole_number(), default=16, help="Images (default: 16).")
parser.add_argument("--guidance_scale", type=float, default=1.5, help="1: none (default: 1.5).")
parser.add_argument("--repeats", type=whole_number(), default=3, help="Timed turns after the first (default: 3).")
parser.add_argument("--device", type=present_device, default="cpu", help="cpu (default) or cuda.")


def random_generator(side: int, codes: int, width: int, layers: int) -> tuple[LlamaForCausalLM, Vocabulary]:
    """A model with random weights, of 10 classes."""
    torch.manual_seed(0)
    names = [str(number) for number in range(10)]
    vocabulary = Vocabulary(codes, side, side, "class", "0" * 64, "none", class_names=names)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=1 + vocabulary.num_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=vocabulary.pad,
    )
    return LlamaForCausalLM(config).eval(), vocabulary


class Loops:
    """The ways, each from conditions and seeds to tokens (images, height * width).

    Args:
        guidance_scale: 1: none, and no second half of the batch.
    """

    def __init__(self, model, vocabulary: Vocabulary, images: int, guidance_scale: float) -> None:
        self.model, self.vocabulary, self.guidance_scale = model, vocabulary, guidance_scale
        self.conditions = [None] * images
        if vocabulary.condition == "class":
            self.conditions = [i % vocabulary.num_conditions for i in range(images)]
        elif vocabulary.condition == "text":
            self.conditions = [[0]] * images
        self.seeds = list(range(images))
        prompts = [vocabulary.prompt(condition) for condition in self.conditions]
        if guidance_scale != 1:
            null = vocabulary.prompt(None)
            prompts += [[vocabulary.pad] * (len(prompts[0]) - len(null)) + null] * images
        self.prompt = torch.tensor(prompts, device=model.device)

    def _combined(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits[:, : self.vocabulary.codebook_size].float()
        if self.guidance_scale == 1:
            return logits
        conditional, null = logits.chunk(2)
        return null + self.guidance_scale * (conditional - null)

    def bare(self) -> None:
        cache, ids = DynamicCache(config=self.model.config), self.prompt
        for _ in range(self.vocabulary.num_tokens):
            self.model(ids, cache=cache, use_cache=True, logits_to_keep=1)
            ids = self.prompt[:, -1:]

    def ours(self) -> torch.Tensor:
        cache = "static" if self.model.device.type == "cuda" else "dynamic"
        options = {"guidance_scale": self.guidance_scale, "cache": cache}
        return generate_tokens(self.model, self.vocabulary, self.conditions, self.seeds, **options).flatten(1)

    def llamagen(self) -> torch.Tensor:
        length = self.prompt.shape[1] + self.vocabulary.num_tokens
        cache, ids = StaticCache(config=self.model.config, max_cache_len=length), self.prompt
        drawn, probabilities = [], []
        for _ in range(self.vocabulary.num_tokens):
            logits = self.model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            probabilities.append(self._combined(logits).softmax(-1))
            drawn.append(torch.multinomial(probabilities[-1], 1))
            ids = drawn[-1] if self.guidance_scale == 1 else torch.cat([drawn[-1]] * 2)
        return torch.cat(drawn, 1)

    def two(self) -> torch.Tensor:
        images = len(self.seeds)
        prompt, null = self.prompt[:images], self.prompt[images:]
        return self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            negative_prompt_ids=null,
            negative_prompt_attention_mask=torch.ones_like(null),
            guidance_scale=self.guidance_scale,
            max_new_tokens=self.vocabulary.num_tokens,
            do_sample=False,
            logits_processor=[SeededCodes(self.vocabulary.codebook_size, self.seeds)],
        )[:, prompt.shape[1] :]

    def no_cache(self) -> torch.Tensor:
        draw, ids = SeededCodes(self.vocabulary.codebook_size, self.seeds, self.guidance_scale), self.prompt
        for _ in range(self.vocabulary.num_tokens):
            logits = self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            ids = torch.cat([ids, draw(ids, logits).argmax(-1, keepdim=True)], 1)
        return ids[: len(self.seeds), self.prompt.shape[1] :]


def seconds(function, device: torch.device) -> tuple[tuple[float, float], torch.Tensor | None]:
    """How long a function takes, on the clock and on processors, and what it returns."""
    start = now(device), time.process_time()
    result = function()
    return (now(device) - start[0], time.process_time() - start[1]), result


@torch.inference_mode()
def compare(loops: Loops, repeats: int) -> tuple[dict[str, tuple[float, float]], float]:
    """Medians of seconds (see `seconds`) by the name of the loop, and the share of ours's tokens that the loop without
    a cache has otherwise."""
    device, names, made = loops.model.device, ["bare", "ours", "llamagen"], {}
    if loops.guidance_scale != 1 and loops.vocabulary.condition == "class":  # prompts of one length
        names.append("two")
    taken = {name: [] for name in names}
    for turn in range(repeats + 1):  # the first one warms up, and compiles on a GPU
        for name, times in taken.items():
            spent, made[name] = seconds(getattr(loops, name), device)
            times += [spent] if turn else []
    result = {name: tuple(map(statistics.median, zip(*times))) for name, times in taken.items()}
    result["no_cache"], naive = seconds(loops.no_cache, device)
    return result, (made["ours"] != naive).float().mean().item()


def table(result: dict[str, tuple[float, float]], images: int) -> str:
    lines = ["| loop | seconds | images a second | of the bare passes | on processors | of the bare passes |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    titles = {"bare": "forward passes alone", "ours": "ours (generate)", "llamagen": "LlamaGen's"}
    titles |= {"two": "generate's guidance", "no_cache": "no cache"}
    for name, (clock, processors) in result.items():
        ratios = clock / result["bare"][0], processors / result["bare"][1]
        lines.append(
            f"| {titles[name]} | {clock:.2f} | {images / clock:.2f} | {ratios[0]:.2f} | {processors:.2f} | "
            f"{ratios[1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = parser.parse_args()
    if args.model_name_or_path:
        model, vocabulary = load_generator(args.model_name_or_path, args.device)
    else:
        model, vocabulary = random_generator(args.side, args.codes, args.width, args.layers)
        model.to(args.device)
    result, different = compare(Loops(model, vocabulary, args.batch_size, args.guidance_scale), args.repeats)
    print(
        f"torch {torch.__version__}, {name_of(args.device)}; {model.num_parameters():,} weights, {vocabulary.height} x "
        f"{vocabulary.width} tokens of {vocabulary.codebook_size:,} codes, {args.batch_size} images, guidance "
        f"{args.guidance_scale}\n\n{table(result, args.batch_size)}\n\nTokens that differ between ours and the loop "
        f"without a cache: {different:.2%}"
    )


if __name__ == "__main__":
    with ends_in_one_line():
        main()
