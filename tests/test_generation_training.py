"""Training of a generator: resumption, several processes, what is logged and saved, and mistakes of its user."""

import json
import re
import signal

import datasets
import pytest
import torch
from generators import TINY, run_training, write_tokens
from safetensors.torch import load_file
from test_loading import ROOT, TWO_PROCESSES, finish
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from generation import train
from generation.rows import ImageSequences, load_rows
from generation.sampling import generate_tokens, load_generator
from generation.trainer import GeneratorTrainer, GeneratorTrainingArguments
from generation.vocabulary import Vocabulary
from training.checkpoints import CheckpointingTrainer
from training.options import parse


TEXTS = ["a red dot", "a blue stripe", "a dot", "red red red red stripe"]
# 57 images are 4 steps an epoch, the last one a smaller one: the checkpoint is in the middle of the second epoch
STEPS = ["--max_steps", "10", "--save_strategy", "steps", "--save_steps", "5", "--logging_steps", "1", "--seed", "3"]
STEPS += ["--gradient_accumulation_steps", "2", "--model_config", TINY.replace("}", ', "attention_dropout": 0.1}')]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images with 3 crops each, 2 x 3 tokens, labels and texts, and a tokenizer that is not where they say."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (60, 3, 2, 3), generator=generator).square() // 16
    labels = [i % 4 for i in range(60)]
    return write_tokens(
        tmp_path_factory.mktemp("tokens") / "tokens", tokens, labels=labels, texts=[TEXTS[i] for i in labels]
    )


def weights(output) -> dict[str, torch.Tensor]:
    """Averaged and raw ones."""
    raw = {f"raw {name}": value for name, value in load_file(output / "raw_weights.safetensors").items()}
    return load_file(output / "model.safetensors") | raw


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(folder, tmp_path, monkeypatch, capsys):
    """SIGKILL while the checkpoint of step 10 is written: crops, dropped conditions, attention's dropout, AdamW, the
    schedule and the averages go on from step 5 to the bit."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pytest
from transformers import Trainer
from generators import run_training
save = Trainer._save_optimizer_and_scheduler
def killed(self, output_dir):
    if self.state.global_step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)
Trainer._save_optimizer_and_scheduler = killed
run_training(pytest.MonkeyPatch(), *sys.argv[1:])
""")
    options = ["--train_data", folder, *STEPS]
    killed = finish([program, *options, "--output_dir", tmp_path / "resumed"], tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {path.name for path in (tmp_path / "resumed").glob("checkpoint-*")} == {"checkpoint-5"}
    run_training(monkeypatch, *options, "--output_dir", tmp_path / "resumed")
    assert "Resuming from" in capsys.readouterr().out
    run_training(monkeypatch, *options, "--output_dir", tmp_path / "whole")
    assert_equal(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))
    logs = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("resumed", "whole")
    ]
    assert [log["loss"] for log in logs[0] if "loss" in log] == [log["loss"] for log in logs[1] if "loss" in log]
    assert load_generator(str(tmp_path / "whole" / "checkpoint-5"))[1] == Vocabulary.load(tmp_path / "whole")
    with pytest.raises(SystemExit):  # tokens of other meaning, or another condition
        run_training(monkeypatch, *options, "--condition", "none", "--output_dir", tmp_path / "whole")
    assert "holds another run (condition: class there, none now" in capsys.readouterr().err


def test_two_processes_train_what_one_does(folder, tmp_path, monkeypatch):
    """The same images in the same order, half a batch each: the weights differ by rounding. (Held out are 6, which
    fill the batches: Trainer would fill them up with some twice.)"""
    options = f"--train_data {folder} --max_steps 3 --report_to none --save_strategy no --use_cpu --num_pictures 0"
    options = [*options.split(), *"--optim sgd --learning_rate 0.1 --holdout 0.1".split(), "--model_config", TINY]
    launched = ["-m", "generation.train", *options, "--output_dir", tmp_path / "two"]
    launched += "--per_device_train_batch_size 4 --per_device_eval_batch_size 3".split()
    done = finish([*TWO_PROCESSES, *launched], tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    run_training(monkeypatch, *options, "--per_device_eval_batch_size", "6", "--output_dir", tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    metrics = [json.loads((tmp_path / name / "eval_results.json").read_text())["eval_loss"] for name in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)


def test_each_epoch_draws_other_crops(folder, tmp_path, monkeypatch):
    drawn = []
    row_number = ImageSequences.row_number
    monkeypatch.setattr(ImageSequences, "row_number", lambda *given: drawn.append(row_number(*given)) or drawn[-1])
    run_training(monkeypatch, "--train_data", folder, "--num_train_epochs", 3, "--output_dir", tmp_path)
    words = Vocabulary.load(tmp_path)
    keys = sorted({f"{i:04d}" for i in range(60)} - {*(tmp_path / "heldout_keys.txt").read_text().split()})
    sequences = ImageSequences(load_rows(folder)[0], keys, words, seed=42)
    for epoch in range(3):
        sequences.draws.set_epoch(epoch)
        expected = sorted(row_number(sequences, i) for i in range(57))
        start = 3 + 57 * epoch  # behind those of the models of frequencies
        assert sorted(drawn[start : start + 57]) == expected


def test_held_out_rows_have_the_loss_that_is_computed_by_hand(folder, tmp_path, monkeypatch):
    run_training(
        monkeypatch, "--train_data", folder, "--max_steps", 2, "--output_dir", tmp_path, "--logging_steps", 1,
        "--per_device_eval_batch_size", 2, "--ema_decay", 0,
    )  # fmt: skip
    model, words = load_generator(str(tmp_path))
    keys = (tmp_path / "heldout_keys.txt").read_text().split()
    assert len(keys) == 3
    held_out = ImageSequences(load_rows(folder)[0], keys, words)
    nats = []
    for i in range(3):
        ids = torch.tensor([held_out[i]["input_ids"]])
        assert ids[0, 0] == 16 + int(keys[i]) % 4  # no condition is dropped
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(-1)
        nats += [-logits[0, place, ids[0, place + 1]].item() for place in range(6)]
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(sum(nats) / 18, abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-5)
    frequencies = json.loads((tmp_path / "frequency_models.json").read_text())
    assert metrics["eval_loss_unigram"] == frequencies["unigram"] and frequencies["counted_rows"] == 57 * 3


def test_transformers_alone_loads_a_generator(folder, tmp_path, monkeypatch, capsys):
    run_training(monkeypatch, "--train_data", folder, "--max_steps", 1, "--output_dir", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert model.config.eos_token_id is model.config.bos_token_id is None
    assert model.generation_config.eos_token_id is None
    assert model.config.vocab_size == 16 + 4 + 2
    out = model.generate(torch.tensor([[17]]), max_new_tokens=6, do_sample=True, top_k=0)
    assert out.shape == (1, 7)
    assert not list(tmp_path.rglob("*.bin"))  # no pickles


def text_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("? a red blue dot stripe".split())}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


def test_a_generator_learns_what_a_text_asks_for(tmp_path, monkeypatch, capsys):
    """Texts of several lengths, in one batch; the text tokenizer is saved with the model."""
    words = text_tokenizer(tmp_path / "words")
    tokens = torch.tensor([[1] * 6, [2] * 6, [3] * 6, [4] * 6]).view(4, 1, 2, 3).repeat(10, 1, 1, 1)
    write_tokens(tmp_path / "tokens", tokens, texts=TEXTS * 10)
    run_training(
        monkeypatch, "--train_data", tmp_path / "tokens", "--text_tokenizer", words, "--max_steps", 60,
        "--learning_rate", 3e-3, "--output_dir", tmp_path / "generator",
    )  # fmt: skip
    model, vocabulary = load_generator(str(tmp_path / "generator"))
    assert (vocabulary.condition, vocabulary.text_size, vocabulary.max_prompt) == ("text", 6, 65)
    reads = PreTrainedTokenizerFast.from_pretrained(tmp_path / "generator")
    conditions = [reads(text, add_special_tokens=False).input_ids for text in TEXTS]
    made = generate_tokens(model, vocabulary, conditions, [0, 1, 2, 3], guidance_scale=2.0, temperature=0.5)
    assert torch.equal(made.flatten(1), tokens[:4].flatten(1))


def test_names_of_classes_that_a_stream_gave_become_classes(tmp_path):
    folder = write_tokens(tmp_path / "tokens", torch.ones(3, 1, 2, 3, dtype=torch.long))
    rows = datasets.Dataset.from_parquet(str(folder / "train-00000.parquet"), cache_dir=str(tmp_path / "cache"))
    rows.add_column("label", ["sea", "dog", "sea"]).to_parquet(folder / "train-00000.parquet")
    rows, provenance = load_rows(folder)
    words = train.make_vocabulary(train.GeneratorArguments(), rows, provenance, str(folder), None)
    assert words.condition == "class" and words.class_names == ["dog", "sea"]
    sequences = ImageSequences(rows, ["0000", "0001"], words)
    assert [sequences[i]["input_ids"][0] for i in (0, 1)] == [16 + 1, 16 + 0]


def test_fsdp_is_refused(monkeypatch):
    """New images are painted by one process alone, and the others would not gather what it needs."""

    def begin(self, **kwargs):
        self.is_fsdp_enabled, self.is_deepspeed_enabled = True, False

    monkeypatch.setattr(CheckpointingTrainer, "__init__", begin)
    with pytest.raises(ValueError, match="not supported for generators: start with `accelerate launch --multi_gpu`"):
        GeneratorTrainer(None, None, None, None)


@pytest.mark.parametrize(
    "labels, flags, said",
    [
        ([0, -1] * 4, [], "Some labels of .*tokens are -1, and classes are 0 to 3"),
        ([0, None] * 4, ["--condition_dropout", 0], "tokens have no label.*pass --condition_dropout above 0"),
    ],
)
def test_labels_that_are_no_condition_are_named_before_training(labels, flags, said, tmp_path, monkeypatch, capsys):
    """They ended it in the middle of an epoch."""
    tokens = torch.ones(8, 1, 2, 3, dtype=torch.long)
    write_tokens(tmp_path / "tokens", tokens, labels=labels)
    with pytest.raises(SystemExit):
        run_training(monkeypatch, "--train_data", tmp_path / "tokens", "--output_dir", tmp_path / "out", *flags)
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_recipe_has_no_path_of_this_machine(tmp_path, monkeypatch):
    """It is pushed with the model."""
    write_tokens(tmp_path / "tokens", torch.ones(8, 1, 2, 3, dtype=torch.long), labels=[0] * 8)
    run_training(monkeypatch, "--train_data", tmp_path / "tokens", "--output_dir", tmp_path / "out", "--max_steps", 1)
    recipe = (tmp_path / "out" / "training_recipe.json").read_text()
    assert str(tmp_path) not in recipe and json.loads(recipe)["options"]["train_data"] == "tokens"


def test_empty_texts_need_the_null_condition(tmp_path, monkeypatch, capsys):
    """They stopped the training in the middle of an epoch."""
    write_tokens(tmp_path / "tokens", torch.ones(4, 1, 2, 3, dtype=torch.long), texts=["a dot", "", "a dot", "a"])
    words = text_tokenizer(tmp_path / "words")
    flags = ["--text_tokenizer", words, "--condition_dropout", 0, "--output_dir", tmp_path / "generator"]
    with pytest.raises(SystemExit):
        run_training(monkeypatch, "--train_data", tmp_path / "tokens", *flags)
    assert "is no condition: pass --condition_dropout above 0" in capsys.readouterr().err


def test_sizes_are_those_of_llamagen():
    """Weights without embeddings, and with those of 16,384 codes and 1,000 classes, against what its paper says."""
    for size, millions in (("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411)):
        args = train.GeneratorArguments(model_size=size)
        words = Vocabulary(16384, 16, 16, "class", "0" * 64, "x", class_names=[str(i) for i in range(1000)])
        with torch.device("meta"):
            model = train.make_model(args, words)
        unused = 1002 * model.config.hidden_size  # rows of the output layer that LlamaGen does not have
        assert round((model.num_parameters() - unused) / 1e6) == pytest.approx(millions, abs=1)


def test_memory_that_does_not_suffice_for_training_ends_in_what_to_lower(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(SystemExit):
        run_training(monkeypatch, "--train_data", folder, "--output_dir", tmp_path / "out", "--max_steps", "1")
    said = capsys.readouterr()
    assert (
        "The memory did not suffice when 4000000000000000 bytes more were needed: lower --per_device_train" in said.err
    )
    assert "Reading the tokens of" in said.out and "Making the generator" in said.out


def test_mistakes_are_named_in_one_line(folder, tmp_path, monkeypatch, capsys):
    other = write_tokens(tmp_path / "grid", torch.zeros(4, 1, 2, 2, dtype=torch.long), labels=[0, 1, 2, 3])
    strange = write_tokens(tmp_path / "strange", torch.zeros(4, 1, 2, 3, dtype=torch.long), tokenizer_hash="1" * 64)
    plain = write_tokens(tmp_path / "plain", torch.full((4, 1, 2, 3), 15), codebook_size=8)
    unfinished = write_tokens(tmp_path / "unfinished", torch.zeros(4, 1, 2, 3, dtype=torch.long), num_rows=None)
    (tmp_path / "images").mkdir()
    for arguments, message in (
        (["--train_data", tmp_path / "nowhere"], "train_data: there is no folder"),
        (["--train_data", tmp_path / "images"], "python -m generation.tokenize_images"),
        (["--train_data", unfinished], "is not finished"),
        (["--train_data", plain, "--condition", "class"], "condition 'class': the tokens of"),
        (["--train_data", folder, "--condition", "text"], "needs a --text_tokenizer"),
        (["--train_data", folder, "--condition", "text", "--text_tokenizer", tmp_path / "nowhere"], "nowhere"),
        (["--train_data", folder, "--condition", "colour"], "condition must be auto, class, text or none"),
        (["--train_data", folder, "--model_size", "S"], "model_size must be one of B, L, XL, XXL"),
        (["--train_data", folder, "--model_config", "{"], "model_config must be JSON"),
        (["--train_data", folder, "--model_config", '{"colour": 1}'], "colour"),
        (["--train_data", folder, "--model_config", '{"eos_token_id": 2}'], "eos_token_id, which the tokens decide"),
        (["--train_data", folder, "--model_config", '{"hidden_size": 65}'], "hidden size (65)"),
        (["--train_data", folder, "--condition_dropout", "1"], "condition_dropout must be in [0, 1)"),
        (["--train_data", plain, "--condition_dropout", "0.2"], "--condition_dropout has no effect"),
        (["--train_data", plain, "--picture_guidance", "1.5"], "--picture_guidance has no effect"),
        (["--train_data", folder, "--condition_dropout", "0", "--picture_guidance", "2"], "--picture_guidance has no"),
        (["--train_data", folder, "--max_text_tokens", "9"], "--max_text_tokens has no effect"),
        (["--train_data", folder, "--eval_data", other, "--holdout", "0.1"], "--holdout has no effect"),
        (["--train_data", folder, "--eval_data", other], "have 2 x 2 tokens, those of --train_data 2 x 3"),
        (["--train_data", folder, "--eval_data", strange], "1" * 64),
        (["--train_data", folder, "--push_to_hub", "--report_to", "none"], "--push_to_hub has no effect"),
        (["--train_data", folder, "--tokenizer", tmp_path / "nowhere", "--num_pictures", "1"], "nowhere"),
        (["--train_data", plain, "--max_steps", "1"], "Tokens must be in [0, 8), got 15 to 15"),
    ):
        with pytest.raises(SystemExit) as end:
            run_training(monkeypatch, *arguments, "--output_dir", tmp_path / "out")
        said = capsys.readouterr().err.strip().splitlines()
        assert end.value.code in (1, 2) and said[-1].startswith("train.py: error: "), (arguments, said)
        assert message in said[-1], (arguments, said)


def test_the_recipe_of_the_generator_in_the_box_parses_and_its_weights_fit_25_mb(folder, tmp_path):
    kinds = train.GeneratorArguments, train.TokenArguments, GeneratorTrainingArguments
    flags = [str(ROOT / "configs" / "emoji_llama.json"), "--train_data", str(folder), "--output_dir", str(tmp_path)]
    (model_args, _, training_args), _, _ = parse(kinds, flags, "")
    assert training_args.eval_steps and training_args.save_steps
    vocabulary = Vocabulary(16384, 14, 14, "class", "hash", "tokenizer", class_names=[f"group {i}" for i in range(9)])
    with torch.device("meta"):
        model = train.make_model(model_args, vocabulary)
    assert 2 * model.num_parameters() <= 25e6
