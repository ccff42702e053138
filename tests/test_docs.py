"""The code in the documentation runs."""

import configparser
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from test_loading import ROOT, run

from configuration_simvq import OLDEST_TRANSFORMERS
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import find_images


def blocks(path: str, language: str = "python") -> list[str]:
    """Code blocks of a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), flags=re.M | re.S)


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "examples" / "CREDITS.md"]
DOCUMENTS += [card for card in ROOT.glob("*/*/README.md") if card.parts[-3] != "runs"]  # those are a user's


def test_all_documents_are_looked_at():
    names = {str(document.relative_to(ROOT)) for document in DOCUMENTS}
    assert {"README.md", "docs/evaluation.md", "eval/rfid/README.md"} <= names
    assert "checkpoints/vqrae-dinov2-small/README.md" in names


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document):
    """Files, modules that are run, tests, and links with their anchors."""
    text = document.read_text()
    rooms = "checkpoints|configs|docs|eval|examples|benchmarks|convert|generation|reading|training"
    named = set(re.findall(rf"(?<![\w/])(?:{rooms})/[\w/.-]*\.(?:json|md|py|png|jpg|txt|yaml)", text))
    named |= set(re.findall(r"(?<![\w/])tests/\w+\.py", text))
    named |= {f"{module.replace('.', '/')}.py" for module in re.findall(rf"-m ((?:{rooms})(?:\.\w+)+)", text)}
    assert not [name for name in named if not (ROOT / name).exists()]
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))
    assert not [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            linked = (document.parent / file).resolve() if file else document
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_downstream_snippets(tmp_path, image_folder):
    torch.manual_seed(0)
    VQRAEModel(tiny_config(codebook_dim=8, encoder_layers=[1, 2])).save_pretrained(tmp_path / "my-tokenizer")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "my-tokenizer")
    image_folder.rename(tmp_path / "my_images")
    code = blocks("docs/downstream.md")
    assert len(code) == 9
    checks = """
assert features.shape == (2, 16, 64) and inputs_embeds.shape == (2, 16 + 3, 64)
assert all(parameter.grad is not None for parameter in tower.projector.parameters())
assert torch.tensor(features_of_images).shape == (2, 1, 16, 32)
ids = to_ids(tokens)
assert ids.shape == (2, 18) and ids.max() == end == vocabulary - 1 and ids[:, 1:-1].min() >= words
assert tokenized[0]["grid"] == [4, 4] and len(tokenized) == 12 and len(tokenized[0]["tokens"]) == 16
assert (reconstruct(pixels) - pixels).abs().max() < 1
"""
    run("\n".join(code) + checks, tmp_path, HF_HOME=str(tmp_path / "home"))
    assert (tmp_path / "my-fine-tuned" / "model.safetensors").exists()


@pytest.mark.parametrize("block", range(2))
def test_readme_snippets(block, tmp_path, monkeypatch):
    """Those under "Use it", with a tiny model in place of the checkpoint."""
    torch.manual_seed(0)
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "checkpoints" / "vqrae-dinov2-small")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "checkpoints" / "vqrae-dinov2-small")
    (tmp_path / "examples" / "images").mkdir(parents=True)
    image = Image.open(find_images(ROOT / "examples" / "images")[0]).convert("RGB")
    image.save(tmp_path / "examples" / "images" / "astronaut.jpg")
    run(blocks("README.md")[block], tmp_path, PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "home"))


def test_the_readme_is_short_and_every_page_is_on_the_map():
    assert len((ROOT / "README.md").read_text().split()) <= 1200
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"^\| \[.*?\]\((.*?)\)", (ROOT / "docs" / "index.md").read_text(), flags=re.M))


def test_the_oldest_versions_are_those_of_setup_cfg():
    """With which the workflow runs the tests, too."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = [Requirement(line) for line in setup["options"]["install_requires"].split("\n") if line]
    lower = {r.name: next(iter(r.specifier)).version for r in required if r.specifier}
    lines = [line for line in (ROOT / ".github" / "oldest.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    del pinned["torchao"]  # of the tests alone
    assert pinned == lower
    assert Version(lower["transformers"]) == Version(OLDEST_TRANSFORMERS)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run" in workflow and "/.github/oldest.txt" in workflow


def test_the_version_is_one():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert re.search(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1] == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
