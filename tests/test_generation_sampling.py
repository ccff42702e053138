"""Drawing images with transformers' generate: against a loop written out, and what a seed decides."""

import json

import pytest
import torch
from generators import make_tokenizer
from test_generation_vocabulary import of_kind, vocabulary
from transformers import LlamaConfig, LlamaForCausalLM

from generation.sample import SAMPLES, write_samples
from generation.sampling import SeededCodes, generate_tokens, load_generator, load_painter
from reading.models import tokenizer_hash


CONDITIONS = {"class": [3, 0, 2], "text": [[4], [0, 1, 2], None], "none": [None] * 3}
SEEDS = [5, 11, 7]


def model_of(words, **fields) -> LlamaForCausalLM:
    """Random weights, large enough that its distributions are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words.size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=words.max_prompt + words.num_tokens, bos_token_id=None, eos_token_id=None,
        pad_token_id=words.pad, initializer_range=0.3, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def naive(model, words, condition, seed, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, first=()) -> torch.Tensor:
    """One image, without a cache, without a batch, all in float64 behind the model."""
    generator, tokens = torch.Generator().manual_seed(seed), []
    for place in range(words.num_tokens):
        uniform = torch.rand(words.codebook_size, generator=generator).double().clamp(min=2**-25)
        if place < len(first):
            tokens.append(int(first[place]))
            continue

        def logits(prompt):
            ids = torch.tensor([prompt + tokens])  # noqa: B023
            return model(ids).logits[0, -1, : words.codebook_size].double()

        scores = logits(words.prompt(condition))
        if guidance != 1:
            without = logits(words.prompt(None))
            scores = without + guidance * (scores - without)
        if temperature == 0:
            tokens.append(scores.argmax().item())
            continue
        order = (scores / temperature).softmax(0).sort(descending=True)
        allowed = order.indices[: top_k or None]
        mass = order.values[: len(allowed)] / order.values[: len(allowed)].sum()
        allowed = allowed[mass.cumsum(0) - mass < top_p]
        gumbel = -(-uniform.log()).log()
        tokens.append(max(allowed.tolist(), key=lambda code: (scores / temperature + gumbel)[code].item()))  # noqa: B023
    return torch.tensor(tokens).view(words.height, words.width)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 2.0, "temperature": 0.7},
        {"guidance_scale": 0.0, "top_k": 5},
        {"guidance_scale": 1.5, "top_p": 0.6},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.8},
        {"temperature": 0.0, "guidance_scale": 3.0},
    ],
    ids=str,
)
def test_images_are_those_of_a_loop_without_a_cache(condition, options):
    words = vocabulary(condition, height=4, width=5)
    if condition == "none":
        options = options | {"guidance_scale": 1.0}
    model = model_of(words)
    tokens = generate_tokens(model, words, CONDITIONS[condition], SEEDS, **options)
    plain = {name.removesuffix("_scale"): value for name, value in options.items()}
    for image, which, seed in zip(tokens, CONDITIONS[condition], SEEDS):
        assert torch.equal(image, naive(model, words, which, seed, **plain))
    assert tokens.shape == (3, 4, 5) and tokens.unique().numel() > 5


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_completion_keeps_what_it_is_given_and_goes_on_as_the_loop(guidance_scale):
    words = vocabulary(height=4, width=5)
    model, first = model_of(words), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    tokens = generate_tokens(model, words, [1, 2], [5, 6], first_tokens=first, guidance_scale=guidance_scale)
    for image, which, seed in zip(tokens, [1, 2], [5, 6]):
        assert torch.equal(image.flatten()[:10], first)
        assert torch.equal(image, naive(model, words, which, seed, guidance_scale, first=first))
    whole = generate_tokens(model, words, [1], [5], guidance_scale)  # its own upper half: nothing changes
    again = generate_tokens(model, words, [1], [5], guidance_scale, first_tokens=whole.flatten()[:10])
    assert torch.equal(whole, again)


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_seed_decides_about_an_image_whatever_is_beside_it(condition, cache):
    words = vocabulary(condition, height=4, width=5)
    model, conditions = model_of(words), CONDITIONS[condition]
    together = generate_tokens(model, words, conditions, SEEDS, 2.0)
    for image, which, seed in zip(together, conditions, SEEDS):
        assert torch.equal(generate_tokens(model, words, [which], [seed], 2.0, cache=cache)[0], image)
    turned = generate_tokens(model, words, conditions[::-1], SEEDS[::-1], 2.0, cache=cache)
    assert torch.equal(turned.flip(0), together)
    assert not torch.equal(generate_tokens(model, words, conditions[:1], [6], 2.0)[0], together[0])


def test_code_2_and_the_51st_code_are_codes_as_all_others():
    """Defaults of transformers: id 2 ends a sequence, and only the best 50 are drawn from."""
    words = vocabulary("none", codebook_size=512, height=10, width=10)
    model = model_of(words)
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = generate_tokens(model, words, [None] * 20, list(range(20)))
    assert tokens.shape == (20, 10, 10) and (tokens == 2).any()
    assert tokens.unique().numel() > 490  # of 2,000 draws from 512: 502 +- 3.1
    assert tokens.max() < 512


def test_draws_have_the_probabilities_of_the_softmax():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 50.0]])  # the last is no code
    seeds = list(range(20_000))
    draws = SeededCodes(4, seeds)(None, scores.expand(len(seeds), -1)).argmax(1)
    shares = draws.bincount(minlength=5) / len(seeds)
    assert (shares[:4] - scores[0, :4].softmax(0)).abs().max() < 0.012 and shares[4] == 0  # 3.4 deviations


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("class without null", {"guidance_scale": 2.0}, "needs a null condition.*--condition_dropout 0"),
        ("none", {"guidance_scale": 2.0}, "no condition to guide towards"),
        ("class", {"guidance_scale": -1.0}, "guidance_scale must not be negative"),
        ("class", {"temperature": -1.0}, "temperature must not be negative"),
        ("class", {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ("class", {"top_k": -1}, "top_k must not be negative"),
        ("class", {"first_tokens": torch.zeros(6, dtype=torch.long)}, "fewer than 6 codes below 16, got 6"),
        ("class", {"first_tokens": torch.tensor([16])}, "got 1 up to 16"),
        ("class", {"seeds": [1]}, "a seed for each condition, got 3 and 1"),
        ("class", {"conditions": [1, 2, 4]}, "no class 4"),
    ],
)
def test_what_cannot_be_drawn_is_named(kind, options, message):
    words = of_kind(kind)
    asked = {"conditions": CONDITIONS[kind.split()[0]], "seeds": SEEDS} | options
    with pytest.raises(ValueError, match=message):
        generate_tokens(model_of(words), words, **asked)


def test_a_generator_of_another_vocabulary_grid_or_tokenizer_is_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    words = vocabulary(tokenizer_hash=tokenizer_hash(tokenizer), model_name_or_path=str(tmp_path / "tokenizer"))
    model_of(words).save_pretrained(tmp_path / "generator")
    words.save(tmp_path / "generator")
    assert load_generator(str(tmp_path / "generator"))[1] == words
    assert load_painter(words).config.codebook_size == 16
    with torch.no_grad():
        tokenizer.quantizer.embedding.weight[0, 0] += 1
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError) as error:
        load_painter(words, str(tmp_path / "other"))
    assert words.tokenizer_hash in str(error.value) and tokenizer_hash(tokenizer) in str(error.value)
    words.model_name_or_path = str(tmp_path / "moved")
    with pytest.raises(ValueError, match="moved.*Pass --tokenizer if it is in another place"):
        load_painter(words)
    vocabulary(codebook_size=17).save(tmp_path / "generator")
    with pytest.raises(ValueError, match=r"The vocabulary has 23 ids \(17 codes\), and the model 22"):
        load_generator(str(tmp_path / "generator"))
    vocabulary(height=3).save(tmp_path / "generator")
    with pytest.raises(ValueError, match="A grid of 3 x 3 needs 10 positions, and the model has 7"):
        load_generator(str(tmp_path / "generator"))


def test_a_copy_of_an_image_beside_the_others_is_none_of_them(tmp_path):
    """Such as file managers make."""
    for name in ("000002.png", "000001 copy.png", "0000000007 (1).png"):
        (tmp_path / name).touch()
    write_samples(tmp_path, {}, {"seed": 5}, ["a"], 2)
    listed = json.loads((tmp_path / SAMPLES).read_text())["images"]
    assert [image["file"] for image in listed] == [f"{i:06d}.png" for i in range(3)]
