#!/usr/bin/env python
"""What a generator loses by knowing the place in the row of tokens alone: rotation in one dimension against two.

    python -m benchmarks.rotation --train_data runs/emoji_tokens --eval_data runs/emoji_tokens_heldout

Llama turns queries and keys by the place of a token in its sequence. LlamaGen turns one half of each head by the row of
the grid and the other half by the column. Both are trained here on the same rows in the same order, from the same
random weights, and measured on held-out rows, in nats a token. The condition is not turned in two dimensions (LlamaGen
makes its key zero instead). Printed is a table of steps, a column for each rotation and seed.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

from benchmarks.measuring import name_of
from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.options import present_device, whole_number
from generation.rows import Collate, ImageSequences, load_rows
from generation.train import GeneratorArguments, check_eval_data, make_model, make_vocabulary
from generation.vocabulary import Vocabulary


SMALL = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 512,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}
NAMES = {1: "one dimension", 2: "two dimensions"}


class GridRotation(nn.Module):
    """Cosines and sines for Llama's attention, of which the first half of the frequencies turns by the row and the
    second by the column of the grid (`precompute_freqs_cis_2d` of LlamaGen's autoregressive/models/gpt.py, in the order
    in which transformers pairs the numbers of a head). What stands before the grid is not turned.

    Args:
        model: whose rotation it replaces.
        vocabulary: of it, with one id before the tokens.
    """

    def __init__(self, model: LlamaForCausalLM, vocabulary: Vocabulary) -> None:
        super().__init__()
        half = model.config.head_dim // 2
        frequencies = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, half, 2) / half)
        places = torch.arange(vocabulary.num_tokens)
        rows, columns = places // vocabulary.width, places % vocabulary.width
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)
        self.register_buffer("angles", torch.cat([torch.zeros(1, half), angles]).repeat(1, 2), persistent=False)

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, length, head_dim) each."""
        angles = self.angles[position_ids]
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def generator(vocabulary: Vocabulary, dimensions: int, fields: dict, seed: int) -> LlamaForCausalLM:
    """A model whose random weights are decided by the seed alone."""
    torch.manual_seed(seed)
    model = make_model(GeneratorArguments(model_config=fields), vocabulary)
    if dimensions == 2:
        model.model.rotary_emb = GridRotation(model, vocabulary)
    return model


def loss_of(model: LlamaForCausalLM, rows: ImageSequences, chosen: Iterable[int]) -> torch.Tensor:
    """Nats a token on some of the rows."""
    batch = Collate(rows.vocabulary)([rows[i] for i in chosen])
    return model(**{key: value.to(model.device) for key, value in batch.items()}).loss


@torch.inference_mode()
def nats(model: LlamaForCausalLM, held_out: ImageSequences, batch_size: int) -> float:
    """A token, of all rows."""
    model.eval()
    parts = torch.arange(len(held_out)).split(batch_size)
    total = sum(len(part) * loss_of(model, held_out, part.tolist()).item() for part in parts)
    model.train()
    return total / len(held_out)


def train(
    model: LlamaForCausalLM,
    rows: ImageSequences,
    held_out: ImageSequences,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    evaluations: int,
    title: str,
) -> dict[int, float]:
    """By AdamW, with the settings of configs/emoji_llama.json but for the averaging of weights.

    Returns:
        {step: nats a token on the held-out rows}, evenly spaced.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(60, steps // 10), steps)
    generator, found = torch.Generator().manual_seed(seed), {}
    torch.manual_seed(seed)  # of dropout
    measured_at = {steps * (i + 1) // evaluations for i in range(evaluations)}
    for step in tqdm(range(1, steps + 1), desc=title, unit="step"):
        chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        optimizer.zero_grad()
        loss_of(model, rows, chosen).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in measured_at:
            found[step] = nats(model, held_out, batch_size)
    return found


def table(found: dict[tuple[int, int], dict[int, float]]) -> str:
    """Markdown; `found` is {(dimensions, seed): {step: nats}}."""
    lines = ["| steps | " + " | ".join(f"{NAMES[number]}, seed {seed}" for number, seed in found) + " |"]
    lines.append("| --- |" + " ---: |" * len(found))
    for step in next(iter(found.values())):
        lines.append(f"| {step:,} | " + " | ".join(f"{values[step]:.3f}" for values in found.values()) + " |")
    return "\n".join(lines)


parser = CommandParser(__doc__)
parser.add_argument("--train_data", required=True, type=Path, help="Tokens with classes, or none of them.")
parser.add_argument("--eval_data", required=True, type=Path, help="Held-out tokens of the same tokenizer and grid.")
parser.add_argument("--steps", type=whole_number(10), default=600, help="Of each training (default: 600).")
parser.add_argument("--batch_size", type=whole_number(), default=8, help="Images of a step (default: 8).")
parser.add_argument("--learning_rate", type=float, default=1e-3, help="The highest (default: 1e-3).")
parser.add_argument("--seeds", type=whole_number(), default=1, help="Trainings of each kind (default: 1).")
parser.add_argument("--model_config", default=json.dumps(SMALL), help="Fields of LlamaConfig (default: %(default)s).")
parser.add_argument("--device", type=present_device, default="cpu", help="cpu (default) or cuda.")
parser.add_argument("--output", type=Path, help="A JSON file for the numbers.")


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    rows, provenance = load_rows(args.train_data)
    eval_rows, eval_provenance = load_rows(args.eval_data)
    chosen = GeneratorArguments(model_config=args.model_config)
    vocabulary = make_vocabulary(chosen, rows, provenance, args.train_data, None)
    check_eval_data(eval_rows, eval_provenance, vocabulary, args.eval_data)
    train_rows = ImageSequences(rows, sorted(rows.unique("key")), vocabulary, condition_dropout=0.1)
    held_out = ImageSequences(eval_rows, sorted(eval_rows.unique("key")), vocabulary)
    found = {}
    for seed in range(args.seeds):
        for dimensions, name in NAMES.items():
            model = generator(vocabulary, dimensions, chosen.model_config, seed).to(args.device)
            found[dimensions, seed] = train(
                model,
                train_rows,
                held_out,
                args.steps,
                args.batch_size,
                args.learning_rate,
                seed,
                evaluations=4,
                title=f"{name}, seed {seed}",
            )
    print(
        f"torch {torch.__version__}, {name_of(args.device)}; {model.num_parameters():,} weights, {vocabulary.height} x "
        f"{vocabulary.width} tokens of {vocabulary.codebook_size:,} codes, {len(train_rows):,} images, "
        f"{len(held_out):,} held out, batches of {args.batch_size}\n\nNats a token on held-out rows:\n\n{table(found)}"
    )
    if args.output:
        numbers = {f"{number} dimensions, seed {seed}": values for (number, seed), values in found.items()}
        write_whole(args.output, lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"))


if __name__ == "__main__":
    main()
