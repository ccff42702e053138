"""The benchmark of rotation in one and two dimensions."""

import json
import sys

import pytest
import torch
from generators import TINY, write_tokens
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import rotation
from generation.vocabulary import Vocabulary


VOCABULARY = Vocabulary(16, 3, 4, "none", "0" * 64, "nowhere")


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["rotation.py", "--model_config", TINY, "--steps", "40", *map(str, arguments)])
    rotation.main()


def turned(dimensions: int) -> torch.Tensor:
    """One vector of a head, turned for each place of [condition + 3 x 4 tokens], (13, 16)."""
    model = rotation.generator(VOCABULARY, dimensions, json.loads(TINY), seed=0)
    cosines, sines = model.model.rotary_emb(torch.zeros(1, 13, 64), torch.arange(13)[None])
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0)).expand(1, 1, 13, 16)
    return apply_rotary_pos_emb(vector, vector, cosines, sines)[0][0, 0]


def test_two_dimensions_turn_as_complex_numbers_do():
    """The formula of LlamaGen's precompute_freqs_cis_2d and apply_rotary_emb: with 16 numbers in a head, two
    frequencies for the row, two for the column, and a factor exp(i * angle) on pairs. transformers pairs the numbers of
    a head with those of its other half."""
    vectors = turned(2)
    assert torch.equal(vectors[0], turned(1)[0])  # the condition stands at place 0 in both
    plain = torch.complex(vectors[0, :8], vectors[0, 8:])
    for place in range(12):
        row, column = divmod(place, 4)
        angles = [row * 10000 ** (-i / 4) for i in range(4)] + [column * 10000 ** (-i / 4) for i in range(4)]
        expected = plain * torch.polar(torch.ones(8), torch.tensor(angles))
        torch.testing.assert_close(torch.complex(vectors[place + 1, :8], vectors[place + 1, 8:]), expected)


def test_in_two_dimensions_attention_sees_rows_and_columns_apart():
    """The token to the left of a row's second one, and the last of the row above the first one, are both one place
    before it in the sequence."""
    for dimensions, alike in ((1, True), (2, False)):
        scores = (vectors := turned(dimensions)) @ vectors.T
        assert torch.allclose(scores[6, 5], scores[5, 4], atol=1e-5) == alike
        assert torch.allclose(scores[6, 2], scores[12, 8], atol=1e-5)  # the token above, in both


def test_both_learn_from_the_same_weights_and_are_measured_on_held_out_rows(tmp_path, monkeypatch, capsys):
    tokens = torch.arange(12).view(1, 1, 3, 4).repeat(10, 1, 1, 1)
    train, held_out = write_tokens(tmp_path / "train", tokens), write_tokens(tmp_path / "held_out", tokens[:3])
    one, two = (rotation.generator(VOCABULARY, dimensions, json.loads(TINY), seed=1) for dimensions in (1, 2))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert rotation.GridRotation not in map(type, one.modules()) and rotation.GridRotation in map(type, two.modules())
    run(monkeypatch, "--train_data", train, "--eval_data", held_out, "--output", tmp_path / "numbers.json")
    assert "| steps | one dimension, seed 0 | two dimensions, seed 0 |" in capsys.readouterr().out
    for values in json.loads((tmp_path / "numbers.json").read_text()).values():
        assert list(values) == ["10", "20", "30", "40"] and values["40"] < values["10"] < 3
    other = write_tokens(tmp_path / "other", tokens, tokenizer_hash="1" * 64)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--train_data", train, "--eval_data", other)
    assert f"the tokens of {other} are of the tokenizer with hash 1111" in capsys.readouterr().err
