"""What the page of app.py does with a generator."""

from PIL import Image
from transformers import PreTrainedModel

from generation.sampling import (
    first_rows,
    generate_images,
    grid_processor,
    load_generator,
    load_painter,
    load_text_encoder,
)
from generation.vocabulary import Vocabulary
from modeling_simvq import ImageTokenizer
from reading.models import tokenizer_hash


ANYTHING = "anything"  # the null condition, among names of classes


class Generator:
    """A generator and its tokenizer, in the steps of the page.

    Args:
        model, vocabulary: see `load_generator`.
        tokenizer: which paints.
        encode_text: gives ids of a text; for a generator that reads texts.
    """

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, tokenizer: ImageTokenizer, encode_text=None
    ) -> None:
        self.model, self.vocabulary, self.tokenizer, self.encode_text = model, vocabulary, tokenizer, encode_text
        self.processor = grid_processor(tokenizer, vocabulary)

    @classmethod
    def load(cls, name_or_path: str, page: ImageTokenizer) -> "Generator":
        """A generator, painted by the tokenizer of the page if it is of that, else by the one that it names.

        Raises:
            ValueError: see `load_generator` and `load_painter`.
        """
        model, vocabulary = load_generator(name_or_path, page.device)
        own = tokenizer_hash(page) == vocabulary.tokenizer_hash
        tokenizer = page if own else load_painter(vocabulary, device=page.device)
        encode_text = None
        if vocabulary.condition == "text":
            encode_text = load_text_encoder(name_or_path)
        return cls(model, vocabulary, tokenizer, encode_text)

    @property
    def choices(self) -> list[str]:
        """Names of classes, in front of them the null condition if there is one."""
        return [ANYTHING] * self.vocabulary.has_null + (self.vocabulary.class_names or [])

    def generate(
        self, condition: str, seed: int | None, count: int, guidance: float, temperature: float, first=None
    ) -> list[Image.Image]:
        """New images with the seeds `seed`, `seed` + 1, ...

        Args:
            condition: the name of a class or a text; `ANYTHING` or nothing: the null condition.
            first: tokens that they begin with.

        Raises:
            ValueError: there is no seed, or see `generate_tokens`.
        """
        if seed is None or not 0 <= seed < 2**63:
            raise ValueError("Enter a seed, a number from 0 on.")
        encoded = None
        if condition and condition != ANYTHING:
            is_text = self.vocabulary.condition == "text"
            encoded = self.encode_text(condition) if is_text else self.vocabulary.class_number(condition)
        if encoded is None:
            guidance = 1.0  # there is nothing to guide towards
        images = generate_images(
            self.model,
            self.vocabulary,
            self.tokenizer,
            [encoded] * count,
            list(range(seed, seed + count)),
            guidance_scale=guidance,
            temperature=temperature,
            first_tokens=first,
        )
        return self.processor.postprocess(images)

    def complete(self, pixels, keep_rows: int, *options) -> list[Image.Image]:
        """Images whose upper rows of tokens are those of `pixels`, (1, 3, H, W) as `processor` gives them; `options` as
        those of `generate`."""
        return self.generate(*options, first=first_rows(self.tokenizer, self.vocabulary, pixels, keep_rows))
