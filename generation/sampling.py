"""Images from a language model by transformers' own `generate`."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from generation.provenance import check_tokenizer
from generation.vocabulary import Vocabulary
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import ImageTokenizer
from reading.models import load_pretrained, loading


class SeededCodes(LogitsProcessor):
    """Makes greedy decoding draw codes, and nothing but codes, each image by its own seed.

    The largest of logits plus Gumbel noise is a draw from their softmax. The noise of an image comes from a generator
    of its own on the CPU, so it is the same in any batch and on any device. With guidance the second half of the batch
    has the null condition; both halves are given the code that is drawn from

        null + guidance_scale * (conditional - null)

    Args:
        codebook_size: the first ids are codes.
        seeds: of the images.
        guidance_scale: 1: the batch has no second half.
        temperature: logits are divided by it; 0: the most likely code, without noise.
        top_k: only the most likely codes may be drawn; 0: all.
        top_p: only the most likely codes that together have this probability may be drawn; 1: all.
        skip: codes of each image that are there already, and whose noise is passed over, so that what follows does not
            depend on how many were kept.
    """

    def __init__(
        self,
        codebook_size: int,
        seeds: list[int],
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        skip: int = 0,
    ) -> None:
        self.codebook_size, self.guidance_scale, self.temperature = codebook_size, guidance_scale, temperature
        self.warpers = [TopKLogitsWarper(min(top_k, codebook_size))] if top_k else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature else []
        for generator in self.generators:
            torch.rand(skip, codebook_size, generator=generator)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of all ids to those of the codes alone, (B, codebook_size)."""
        codes = scores[:, : self.codebook_size].float()
        if self.guidance_scale != 1:
            conditional, null = codes.chunk(2)
            codes = torch.lerp(null, conditional, self.guidance_scale)
        if self.temperature:
            if self.temperature != 1:
                codes = codes / self.temperature
            for warper in self.warpers:
                codes = warper(input_ids, codes)
            codes = codes - self._exponential().to(codes.device).log_()
        return codes if self.guidance_scale == 1 else torch.cat([codes, codes])

    def _exponential(self) -> torch.Tensor:
        """(images, codebook_size); minus the logarithm of it is Gumbel noise."""
        uniform = torch.empty(len(self.generators), self.codebook_size)
        for row, generator in zip(uniform, self.generators):
            torch.rand(self.codebook_size, generator=generator, out=row)
        return -uniform.clamp_(min=2**-25).log_()  # it is a multiple of 2 ** -24


@torch.inference_mode()
def generate_tokens(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    conditions: list,
    seeds: list[int],
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first_tokens: torch.Tensor | None = None,
    cache: str = "dynamic",
) -> torch.Tensor:
    """New images as tokens, all in one batch.

    Args:
        model: a language model with the ids of `vocabulary`, in eval mode.
        conditions: of each image, see `Vocabulary.prompt`.
        seeds: of each image. It decides about the image, whatever stands beside it in the batch.
        guidance_scale: how far away from the null condition; 1: no guidance. Otherwise the batch is doubled.
        temperature, top_k, top_p: see [`SeededCodes`].
        first_tokens: (B, n) or (n,), with which the images begin, in raster order; the model adds the rest.
        cache: of keys and values, "dynamic", or "static", with which transformers compiles the model on a GPU.

    Returns:
        (B, height, width), integers in [0, codebook_size).

    Raises:
        ValueError: a condition that there is not, guidance without a null condition, an option out of its range, or
            first tokens that leave nothing to add.
    """
    check_model(model, vocabulary)
    check_options(vocabulary, guidance_scale, temperature, top_k, top_p)
    if len(conditions) != len(seeds) or not seeds:
        raise ValueError(f"There must be a seed for each condition, got {len(conditions)} and {len(seeds)}.")
    prompts = [vocabulary.prompt(condition) for condition in conditions]
    first = torch.zeros(len(seeds), 0, dtype=torch.long)
    if first_tokens is not None:
        first = torch.as_tensor(first_tokens, dtype=torch.long).cpu().expand(len(seeds), -1)
    new = vocabulary.num_tokens - first.shape[1]
    if new < 1 or (first.numel() and not 0 <= first.min() <= first.max() < vocabulary.codebook_size):
        raise ValueError(
            f"first_tokens must be fewer than {vocabulary.num_tokens} codes below {vocabulary.codebook_size}, got "
            f"{first.shape[1]} up to {first.max() if first.numel() else 0}."
        )
    if guidance_scale != 1:
        prompts, first = prompts + [vocabulary.prompt(None)] * len(seeds), torch.cat([first, first])
    longest = max(map(len, prompts))
    padded = torch.tensor([[vocabulary.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    ids = torch.cat([padded, first], 1).to(model.device)
    draw = SeededCodes(vocabulary.codebook_size, seeds, guidance_scale, temperature, top_k, top_p, skip=first.shape[1])
    sequences = model.generate(
        ids,
        attention_mask=(ids != vocabulary.pad).long(),
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        logits_processor=[draw],
        cache_implementation=cache,
        pad_token_id=vocabulary.pad,
        eos_token_id=None,
    )
    return sequences[: len(seeds), longest:].view(-1, vocabulary.height, vocabulary.width)


def generate_images(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    tokenizer: ImageTokenizer,
    conditions: list,
    seeds: list[int],
    **options,
) -> torch.Tensor:
    """New images as pixels, (B, 3, H, W) in [0, 1], on the CPU; see `generate_tokens`, which has the same arguments but
    `tokenizer`, the one that paints (`load_painter`)."""
    tokens = generate_tokens(model, vocabulary, conditions, seeds, **options)
    with torch.inference_mode():
        return tokenizer.decode_image_tokens(tokens.to(tokenizer.device)).float().clamp(0, 1).cpu()


def grid_processor(tokenizer: ImageTokenizer, vocabulary: Vocabulary) -> VQRAEImageProcessor:
    """Makes of any image one that has the grid of a generator."""
    patch = tokenizer.config.decoder_patch_size
    height, width = vocabulary.height * patch, vocabulary.width * patch
    return VQRAEImageProcessor(size={"shortest_edge": max(height, width)}, crop_size={"height": height, "width": width})


def first_rows(
    tokenizer: ImageTokenizer, vocabulary: Vocabulary, pixels: torch.Tensor, keep_rows: int | None = None
) -> torch.Tensor:
    """The tokens of the upper rows of an image, (keep_rows * width,), for `generate_tokens` to go on with.

    Args:
        pixels: (1, 3, H, W) in [0, 1], of the size that `grid_processor` makes.
        keep_rows: of tokens, 1 to height - 1. `None`: half of them.

    Raises:
        ValueError: so many rows there are not, or nothing would be left to add.
    """
    keep = vocabulary.height // 2 if keep_rows is None else keep_rows
    if not 1 <= keep < vocabulary.height:
        raise ValueError(f"keep_rows must be from 1 to {vocabulary.height - 1}, the grid less one row, got {keep}.")
    with torch.inference_mode():
        return tokenizer.get_image_tokens(pixels.to(tokenizer.device))[0, :keep].flatten().cpu()


def check_options(
    vocabulary: Vocabulary, guidance_scale: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> None:
    """
    Raises:
        ValueError: an option of sampling is out of its range, or asks for what a generator cannot do.
    """
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale must not be negative, got {guidance_scale}: 1 is no guidance.")
    if guidance_scale != 1 and vocabulary.condition == "none":
        raise ValueError(f"guidance_scale {guidance_scale}: this generator has no condition to guide towards; pass 1.")
    if guidance_scale != 1 and not vocabulary.has_null:
        raise ValueError(
            f"guidance_scale {guidance_scale} needs a null condition, and this generator was trained with "
            "--condition_dropout 0: pass 1, or train it with dropout."
        )
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}.")
    if top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}: 0 is all codes.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")


def check_model(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """
    Raises:
        ValueError: a model with another number of ids than its vocabulary, or with too few positions.
    """
    if model.config.vocab_size != vocabulary.size:
        raise ValueError(
            f"The vocabulary has {vocabulary.size} ids ({vocabulary.codebook_size} codes), and the model "
            f"{model.config.vocab_size}: they do not belong together."
        )
    needed = vocabulary.max_prompt + vocabulary.num_tokens
    if model.config.max_position_embeddings < needed:
        raise ValueError(
            f"A grid of {vocabulary.height} x {vocabulary.width} needs {needed} positions, and the model has "
            f"{model.config.max_position_embeddings}: they do not belong together."
        )


def load_generator(
    name_or_path: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Vocabulary]:
    """A generator and its vocabulary. No code that comes with it is run.

    Args:
        name_or_path: a folder, or a repository of the hub.
        revision: branch, tag or commit of the latter.

    Raises:
        ValueError: it cannot be loaded, or is no generator.
    """
    vocabulary = Vocabulary.load(name_or_path, revision)
    with loading(name_or_path):
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, revision=revision)
    check_model(model, vocabulary)
    return model.eval().to(device), vocabulary


def load_text_encoder(name_or_path: str, revision: str | None = None) -> Callable[[str], list[int]]:
    """Gives the ids of a text, as a generator of condition "text" takes it.

    Args:
        name_or_path: the generator, beside which its text tokenizer is saved: a folder, or a repository of the hub.
        revision: branch, tag or commit of the latter.

    Raises:
        ValueError: it cannot be loaded.
    """
    with loading(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def load_painter(
    vocabulary: Vocabulary, tokenizer: str | None = None, device: torch.device | str = "cpu"
) -> ImageTokenizer:
    """The tokenizer that paints what a generator writes.

    Args:
        vocabulary: which names it.
        tokenizer: another place where it is, a folder or a repository of the hub.

    Raises:
        ValueError: it is not there, or is another tokenizer; both hashes are named.
    """
    name, hub = tokenizer or vocabulary.model_name_or_path, {}
    if vocabulary.revision and not tokenizer and not Path(name).is_dir():
        hub["revision"] = vocabulary.revision
    try:
        model = load_pretrained(name, {}, hub).eval()
    except ValueError as error:
        raise ValueError(f"The tokenizer that paints: {error} Pass --tokenizer if it is in another place.") from error
    check_tokenizer(model, vocabulary.tokenizer_hash, "The generator's vocabulary")
    return model.to(device)
