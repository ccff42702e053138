"""What the hub reads at the top of a README.md: of models, of datasets of tokens, and of the Space.

The hub's own check (`RepoCard.validate`) is a request to it. What can be held without a network: the classes of
huggingface_hub read the metadata and give the same again, and values are among those that the hub lists.
"""

import re
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, SpaceCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from packaging.requirements import Requirement
from packaging.version import Version
from test_app import serving
from test_loading import ROOT
from transformers import TrainerState
from transformers.pipelines import PIPELINE_REGISTRY

from eval.results import evaluation_results, update_model_card
from examples.space import make_space
from generation.card import dataset_card
from generation.provenance import Provenance as OfTokens
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from training.arguments import VQRAETrainingArguments
from training.card import Provenance, model_card


NAME_ON_HUB = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "other"}  # of https://hf.co/docs/hub/repositories-licenses
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


# Models --------------------------------------------------------------------------------------------------------------


def check_model(card: ModelCard) -> None:
    data = card.data
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    assert data.library_name == "transformers" and {"simvq", "image-tokenizer"} <= set(data.tags)
    assert PIPELINE_REGISTRY.check_task(data.pipeline_tag)[0] == data.pipeline_tag
    assert data.license in LICENCES
    for name in (data.base_model, *(data.datasets or [])):
        assert name is None or re.fullmatch(NAME_ON_HUB, name)
    assert all(example["src"].startswith("https://") and example["example_title"] for example in data.widget)
    if data.eval_results:
        index = eval_results_to_model_index(data.model_name, data.eval_results)
        assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)
        assert all(isinstance(entry.metric_value, (int, float)) for entry in data.eval_results)
        assert all(re.fullmatch(NAME_ON_HUB, entry.dataset_type) for entry in data.eval_results)


def card_of(tmp_path, **provenance) -> ModelCard:
    """Of a run that has not begun."""
    trainer = SimpleNamespace(
        model=VQRAEModel(tiny_config()),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        args=VQRAETrainingArguments(str(tmp_path), use_cpu=True, report_to=[], lpips_weight=0),
        state=TrainerState(),
        ema=None,
        teacher=None,
        card_files=lambda: [],
    )
    return model_card("me/mine", trainer, Provenance(**provenance))


def test_the_metadata_of_a_trained_model(tmp_path):
    card = card_of(tmp_path, encoder="facebook/dinov2-base", train_data="org/images", license="mit")
    check_model(card)
    assert card.data.base_model == "facebook/dinov2-base" and card.data.datasets == ["org/images"]


def test_a_path_of_this_machine_is_no_metadata(tmp_path):
    (tmp_path / "encoder").mkdir()
    card = card_of(tmp_path, encoder=str(tmp_path / "encoder"), train_data=str(tmp_path), license="mit")
    check_model(card)
    assert card.data.base_model is None and card.data.datasets is None and str(tmp_path) not in str(card)


def test_a_pattern_of_files_on_this_machine_is_no_metadata(tmp_path):
    """It names no file that is there."""
    card = card_of(tmp_path, train_data=f"{tmp_path}/{{000..012}}.tar", license="mit")
    assert card.data.datasets is None and str(tmp_path) not in str(card)
    result = result_of(112, f"{tmp_path}/*.parquet", "train")
    assert {entry.dataset_type for entry in evaluation_results(result)} == {"imagefolder"}
    text = str(dataset_card("mine", tokens(8, f"{tmp_path}/*.parquet"), []))
    assert str(tmp_path) not in text and "source_datasets" not in text


def test_the_metadata_of_the_tokenizer_in_the_box():
    path = ROOT / "checkpoints" / "vqrae-dinov2-small" / "README.md"
    check_model(ModelCard.load(path))
    assert metadata_load(path) == ModelCard.load(path).data.to_dict()


def result_of(size: int, name: str = "images", split: str | None = None) -> dict:
    """Of an evaluation, as in results.json."""
    data = {"name": name, "split": split, "config": None, "pixels_sha256": f"{size}"}
    return {
        "metrics": {"psnr": size / 10, "rfid": None},
        "protocol": {"name": "default"},
        "num_images": 4,
        "image_size": size,
        "data": data,
    }


@pytest.mark.parametrize("name, split", [("my images", None), ("org/images", "validation")])
def test_evaluations_at_two_sizes_stay_apart_in_the_card(tmp_path, name, split):
    """In a model-index, what shares type, configuration and split of a dataset shares its name and arguments, too."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    for size in (224, 112, 224):
        update_model_card(str(tmp_path), result_of(size, name, split))
    card = ModelCard.load(tmp_path / "README.md")
    found = {(e.metric_name, e.metric_args["pixels_sha256"]): e.metric_value for e in card.data.eval_results}
    assert found == {
        ("PSNR, dB, protocol default, 4 images of 224 px", "224"): 22.4,
        ("PSNR, dB, protocol default, 4 images of 112 px", "112"): 11.2,
    }
    assert {entry.dataset_type for entry in card.data.eval_results} == {name if split else "imagefolder"}
    written = [entry for size in (112, 224) for entry in evaluation_results(result_of(size, name, split))]
    assert card.data.eval_results == written


# Datasets of tokens --------------------------------------------------------------------------------------------------


def tokens(num_rows: int, source: str) -> OfTokens:
    return OfTokens(
        model_name_or_path="org/tokenizer", revision=None, tokenizer_hash="0", codebook_size=64, patch_size=8,
        image_size=32, crops=1, ten_crop_ratio=None, flip=False, resample=3, dtype="float32",
        share_changed_by_dtype=None, batch_size=8, shard_size=8, source=source, split="train", source_hash="0",
        max_samples=None, label_names=None, versions={}, num_images=num_rows, num_unreadable=0, num_rows=num_rows,
    )  # fmt: skip


@pytest.mark.parametrize("digits", range(1, 13))
def test_the_metadata_of_a_dataset_of_tokens(digits, tmp_path):
    card = dataset_card("me/tokens", tokens(10**digits - 1, "org/images"), ["key", "text"], "cc-by-4.0")
    assert DatasetCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.license in LICENCES and card.data.source_datasets == ["org/images"]
    assert card.data.task_categories == ["text-to-image"]
    (size,) = card.data.size_categories
    options = re.findall(r"'([^']*n[<>][^']*)'", DatasetCardData.__doc__)
    assert len(options) == 11 and size in options
    low, _, high = (
        re.sub("[KMBT]", lambda m: "0" * (3 + 3 * "KMBT".index(m[0])), part) for part in size.partition("n")
    )
    assert int(low.strip("<") or 0) <= 10**digits - 1 < int(high.strip("<"))
    local = dataset_card("tokens", tokens(5, str(tmp_path)), ["key"]).data
    assert local.source_datasets is None and local.license is None
    assert local.task_categories == ["unconditional-image-generation"]


# The Space -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The folder of a Space with a tiny tokenizer."""
    folder = tmp_path_factory.mktemp("space")
    torch.manual_seed(0)
    VQRAEModel(tiny_config()).save_pretrained(folder / "mine")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(folder / "mine")
    (folder / "mine" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Mine\n")
    make_space(folder / "mine", "Tokens", folder / "space")
    return folder / "space"


def test_the_metadata_of_a_space(space):
    card = SpaceCard.load(space / "README.md")
    data = card.data
    assert metadata_load(space / "README.md") == data.to_dict()
    assert data.title == "Tokens" and data.license == "cc-by-4.0" and (space / data.app_file).is_file()
    assert data.sdk == "gradio" and re.fullmatch(r"3\.\d+", data.python_version)
    assert {data.colorFrom, data.colorTo} <= COLOURS and len(data.emoji) == 1 and len(data.short_description) <= 60
    setup = (ROOT / "setup.cfg").read_text()
    gradio = Requirement(re.search(r"demo =\n +(.*)", setup)[1])
    assert gradio.name == "gradio" and Version(data.sdk_version) in gradio.specifier
    assert (
        Version(data.python_version) in Requirement(f"python{re.search('python_requires = (.*)', setup)[1]}").specifier
    )
    required = [Requirement(line).name for line in (space / "requirements.txt").read_text().splitlines()]
    assert {"torch", "transformers", "huggingface-hub"} <= set(required)


def test_a_space_starts_from_its_own_files(space):
    """A new process, with nothing but the folder of the Space and what is installed. (CI installs that anew; what the
    Space's own requirements.txt adds or lacks is compared with setup.cfg above.)"""
    with serving(["app.py"], space) as address, urllib.request.urlopen(f"{address}/config", timeout=60) as page:
        assert "**mine**: an image of 32 x 32 px" in page.read().decode()


def test_a_space_is_of_a_tokenizer_and_in_a_new_folder(space, tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder of a tokenizer"):
        make_space(tmp_path / "nowhere", "Tokens", tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        make_space(space / "checkpoints" / "mine", "Tokens", space)
    assert not list(tmp_path.iterdir())
