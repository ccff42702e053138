"""From images to tokens to a generator to new images."""

import json
import shlex
import sys

import pytest
import torch
from conftest import tiny_config
from generators import CLASSES, make_tokenizer, pictures, run_training
from PIL import Image
from test_docs import blocks
from test_generation_vocabulary import vocabulary
from test_loading import ROOT
from torchvision.transforms.functional import pil_to_tensor

from generation import sample, tokenize_images, train
from generation.demo import Generator
from generation.sampling import generate_images, load_generator, load_painter
from generation.trainer import GeneratorTrainingArguments
from generation.vocabulary import Vocabulary
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.models import tokenizer_hash
from training.options import parse, refuse_without_effect, rules_of_trainer


def run_sampling(monkeypatch, *arguments) -> None:
    """`python -m generation.sample`, in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, arguments)])
    sample.main()


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def read(file) -> torch.Tensor:
    return pil_to_tensor(Image.open(file)) / 255


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a tokenizer, tokens of 40 images, and a generator that has learned them."""
    folder = tmp_path_factory.mktemp("learned")
    make_tokenizer(folder / "tokenizer")
    for number, (image, label) in enumerate(zip(*pictures())):
        (folder / "images" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        as_pil(image).save(folder / "images" / CLASSES[label] / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--model_name_or_path", folder / "tokenizer", "--data", folder / "images", "--device", "cpu"]
        patch.setattr(sys, "argv", ["x", *map(str, arguments), "--output_dir", str(folder / "tokens")])
        tokenize_images.main()
        run_training(
            patch, "--train_data", folder / "tokens", "--output_dir", folder / "generator", "--max_steps", 150,
            "--learning_rate", 3e-3, "--num_pictures", 4,
        )  # fmt: skip
    return folder


def test_new_images_are_of_their_classes(learned, tmp_path, monkeypatch):
    """Of 40 images of 4 classes: each new one is nearest to images of the class that was asked for."""
    run_sampling(
        monkeypatch, "--model_name_or_path", learned / "generator", "--num_images", 12, "--batch_size", 5,
        "--output_dir", tmp_path, "--guidance_scale", 1.5, "--temperature", 0.5,
    )  # fmt: skip
    images, labels = pictures()
    made = json.loads((tmp_path / "samples.json").read_text())
    for number, entry in enumerate(made["images"]):
        distances = (images - read(tmp_path / entry["file"])).square().mean((1, 2, 3))
        assert CLASSES[labels[distances.argmin()]] == entry["condition"] == CLASSES[number % 4]
        assert distances.min() < 0.02
    assert (learned / "generator" / "samples" / "step-0000150.png").exists()
    metrics = json.loads((learned / "generator" / "eval_results.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_bigram"] < metrics["eval_loss_unigram"]
    assert len((tmp_path / "grid.png").read_bytes()) > 0


def bytes_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("0*.png")}


def test_an_image_is_the_same_in_any_batch_any_order_and_any_run(learned, tmp_path, monkeypatch):
    model = ["--model_name_or_path", learned / "generator", "--guidance_scale", 1.5]
    run_sampling(monkeypatch, *model, "--num_images", 8, "--batch_size", 3, "--output_dir", tmp_path / "a")
    run_sampling(monkeypatch, *model, "--num_images", 8, "--batch_size", 8, "--output_dir", tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") and len(bytes_of(tmp_path / "a")) == 8
    run_sampling(  # image 6 alone: seed 6, class 6 % 4
        monkeypatch, *model, "--num_images", 1, "--seed", 6, "--classes", "ramp", "--output_dir", tmp_path / "c"
    )
    assert bytes_of(tmp_path / "c")["000000.png"] == bytes_of(tmp_path / "a")["000006.png"]
    run_sampling(monkeypatch, *model, "--num_images", 1, "--seed", 6, "--classes", 2, "--output_dir", tmp_path / "c")


def test_a_run_that_was_interrupted_goes_on_and_another_one_is_refused(learned, tmp_path, monkeypatch, capsys):
    model = ["--model_name_or_path", learned / "generator", "--output_dir", tmp_path]
    run_sampling(monkeypatch, *model, "--num_images", 4)
    whole = bytes_of(tmp_path)
    (tmp_path / "000001.png").unlink()
    (tmp_path / "000002.png").write_bytes(b"not made again")
    monkeypatch.setattr(sample, "save_rows", lambda *args: None)
    monkeypatch.setattr(sample.Image, "open", lambda file: Image.new("RGB", (8, 8)))
    run_sampling(monkeypatch, *model, "--num_images", 5)
    again = bytes_of(tmp_path)
    assert again["000001.png"] == whole["000001.png"] and again["000002.png"] == b"not made again" and len(again) == 5
    assert len(json.loads((tmp_path / "samples.json").read_text())["images"]) == 5
    for option, value in (("--temperature", 0.5), ("--seed", 1), ("--classes", "dots")):
        with pytest.raises(SystemExit):
            run_sampling(monkeypatch, *model, option, value)
        assert "has images of other settings" in capsys.readouterr().err
    (tmp_path / "samples.json").unlink()
    with pytest.raises(SystemExit):
        run_sampling(monkeypatch, *model)
    assert "has images and no samples.json" in capsys.readouterr().err


def test_completions_begin_with_the_rows_of_the_image(learned, tmp_path, monkeypatch):
    """And with the right class, the rest is of the same kind."""
    images, _ = pictures()
    tokenizer = load_painter(Vocabulary.load(learned / "generator"))
    with torch.inference_mode():
        tokens = tokenizer.get_image_tokens(images[:1])
    as_pil(images[0]).save(tmp_path / "dots.png")
    run_sampling(
        monkeypatch, "--model_name_or_path", learned / "generator", "--num_images", 2, "--complete",
        tmp_path / "dots.png", "--keep_rows", 3, "--classes", "dots", "--output_dir", tmp_path / "out",
        "--temperature", 0.5,
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]["first_tokens"] == (
        tokens[0, :3].flatten().tolist()
    )
    for number in range(2):
        made = read(tmp_path / "out" / f"{number:06d}.png")
        assert (made - images[0]).square().mean() < 0.02


def test_mistakes_of_sampling_are_named_in_one_line(learned, tmp_path, monkeypatch, capsys):
    torch.manual_seed(1)
    other = VQRAEModel(tiny_config(codebook_size=16))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    for arguments, message in (
        (["--classes", "zebra"], "There is no class 'zebra', the generator knows dots (0), flat (1)"),
        (["--classes", "4"], "There is no class '4'"),
        (["--texts", "a zebra"], "reads no texts (its condition is 'class')"),
        (["--classes", "dots", "--texts", "dots"], "not both"),
        (["--guidance_scale", "-1"], "guidance_scale must not be negative"),
        (["--top_p", "2"], "top_p must be in (0, 1]"),
        (["--keep_rows", "2"], "--keep_rows has no effect"),
        (["--complete", tmp_path / "image.png", "--keep_rows", "4"], "keep_rows must be from 1 to 3"),
        (["--complete", tmp_path / "broken.png"], "broken.png"),
        (["--complete", tmp_path / "nowhere.png"], "nowhere.png"),
        (["--tokenizer", tmp_path / "other"], tokenizer_hash(other)),
        (["--tokenizer", tmp_path / "nowhere"], "nowhere"),
        (["--model_name_or_path", tmp_path / "other"], "is no generator of generation/train.py"),
        (["--model_name_or_path", tmp_path / "no"], f"There is no folder {tmp_path / 'no'}: check the path"),
        (["--model_name_or_path", "me/generator"], "There is no folder me/generator here, and no model of this name"),
        (["--num_images", "0"], "must be at least 1"),
        (["--device", "nowhere"], "is not here"),
    ):
        with pytest.raises(SystemExit) as end:
            given = ["--model_name_or_path", learned / "generator", "--output_dir", tmp_path / "out", *arguments]
            run_sampling(monkeypatch, *given)
        said = capsys.readouterr().err.strip().splitlines()
        assert end.value.code in (1, 2) and "error: " in said[-1] and message in said[-1], (arguments, said)
    assert not (tmp_path / "out").exists()


def test_memory_that_does_not_suffice_for_sampling_ends_in_what_to_lower(learned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(SystemExit):
        run_sampling(monkeypatch, "--model_name_or_path", learned / "generator", "--output_dir", tmp_path / "out")
    said = capsys.readouterr()
    assert "The memory did not suffice when 4000000000000000 bytes more were needed: lower --batch_size" in said.err
    assert "Loading the generator" in said.out and "Loading the tokenizer" in said.out


def test_the_documents_code_runs(learned, tmp_path, monkeypatch):
    """By this repository, and by transformers alone. (The third block is for vLLM, which is not here.)"""
    (tmp_path / "runs").symlink_to(learned)
    monkeypatch.chdir(tmp_path)
    ours, theirs, _ = blocks("docs/generation.md")
    scope = {}
    exec(ours, scope)
    assert [image.size for image in scope["images"]] == [(32, 32)] * 3
    exec(theirs, scope)
    assert scope["image"].shape == (1, 16) and scope["image"].max() < 16


def documented():
    for document in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        text = "\n".join(blocks(document.relative_to(ROOT), "bash")).replace("\\\n", " ")
        for line in text.splitlines():
            if "-m generation.train " in line and "..." not in line:
                yield pytest.param(line.partition("generation.train")[2], id=f"{document.name}: {line[-30:]}")


@pytest.mark.parametrize("command", list(documented()))
def test_documented_trainings_have_no_option_without_effect(command, tmp_path, monkeypatch):
    arguments = shlex.split(command) + ["--bf16", "false", "--use_cpu", "--report_to", "none"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / arguments[arguments.index("--train_data") + 1]).mkdir(parents=True)
    kinds = train.GeneratorArguments, train.TokenArguments, GeneratorTrainingArguments
    (model, data, training), given, by_flags = parse(kinds, arguments, "")
    rules = [*rules_of_trainer(training), *train.rules(model, data, vocabulary())]
    refuse_without_effect(given, by_flags, rules)
    train.make_model(model, vocabulary()) if model.model_config else None
    known = {name for options in (model, data, training) for name in vars(options)}
    for rule in rules:
        assert {*rule.names.split(), *rule.of.split()} <= known, rule


def test_the_demo_draws_what_the_functions_draw(learned):
    """Painted by the tokenizer of the page if it is the right one, else by the one that the generator names."""
    page = load_painter(Vocabulary.load(learned / "generator"))
    shown = Generator.load(str(learned / "generator"), page)
    assert shown.tokenizer is page and shown.choices == ["anything", *CLASSES]
    other = VQRAEModel(tiny_config()).eval()
    assert Generator.load(str(learned / "generator"), other).tokenizer not in (page, other)
    model, words = load_generator(str(learned / "generator"))
    options = {"guidance_scale": 2.0, "temperature": 0.5}
    expected = generate_images(model, words, page, [1, 1], [7, 8], **options)
    assert shown.generate("flat", 7, 2, 2.0, 0.5) == shown.processor.postprocess(expected)
    expected = generate_images(model, words, page, [None], [7], temperature=0.5)
    assert shown.generate("anything", 7, 1, 2.0, 0.5) == shown.processor.postprocess(expected)
    pixels = pictures()[0][:1]
    expected = generate_images(
        model, words, page, [0], [7], first_tokens=page.get_image_tokens(pixels)[0, :2].flatten()
    )
    assert shown.complete(pixels, 2, "dots", 7, 1, 1.0, 1.0) == shown.processor.postprocess(expected)
    with pytest.raises(ValueError, match="Enter a seed"):
        shown.generate("flat", None, 1, 1.0, 1.0)


def test_the_page_has_tabs_for_new_images_where_there_is_a_generator(learned):
    app = pytest.importorskip("app", reason="gradio is not installed (pip install '.[demo]')")
    page = load_painter(Vocabulary.load(learned / "generator"))
    tokenizer = app.Tokenizer(page, VQRAEImageProcessor.for_image_size(32), [])
    for generator in (None, Generator.load(str(learned / "generator"), page)):
        blocks = app.build(tokenizer, "mine", generator).blocks.values()
        tabs = [block.label for block in blocks if isinstance(block, app.gr.Tab)]
        assert ("Generate" in tabs) == ("Complete" in tabs) == (generator is not None)
