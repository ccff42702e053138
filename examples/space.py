#!/usr/bin/env python
"""Makes the folder of a Hugging Face Space: the page of app.py with a tokenizer.

    python -m examples.space --output_dir runs/space

The folder is complete: the page, the code it needs, the example images, the tokenizer, requirements.txt, and a
README.md that tells the hub how to start it. docs/demo.md tells how to put it there.
"""

import configparser
import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCardData

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_folder_whole
from reading.models import MODELS


ROOT = Path(__file__).resolve().parents[1]
GRADIO = "6.31.0"  # with which the page is tested in a browser
BOX = ROOT / "checkpoints" / "vqrae-dinov2-small"
GENERATOR = ROOT / "checkpoints" / "emoji-llama"  # of the tokenizer in the box
CODE = ("app.py", "*_simvq*.py", "LICENSE", "reading/*.py", "eval/*.py", "eval/*/*.py", "generation/*.py")
CODE += ("examples/CREDITS.md", "examples/images/*")
WEIGHTS = ("README.md", "*.json", "model*.safetensors")

parser = CommandParser(__doc__)
parser.add_argument(
    "--model_name_or_path",
    type=Path,
    default=BOX,
    help="Folder of the tokenizer that the page shows (default: checkpoints/vqrae-dinov2-small).",
)
parser.add_argument("--title", default="Image tokenizer", help="Title of the Space (default: Image tokenizer).")
parser.add_argument("--output_dir", required=True, type=Path, help="A new folder.")


def readme(title: str, license: str | None) -> str:
    """README.md, whose metadata is the configuration of the Space.

    Args:
        title: of the Space.
        license: of the tokenizer, as the hub writes it.
    """
    data = SpaceCardData(
        title=title,
        emoji="🧩",
        colorFrom="indigo",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version="3.11",
        app_file="app.py",
        license=license,
        short_description="An image as tokens, and back",
        tags=["image-tokenizer", "simvq"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nAn image becomes tokens, and the tokens an image again.\n"


def requirements() -> str:
    """requirements.txt: what setup.cfg says. The hub adds Gradio itself, of the version in README.md."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"].strip() + "\n"


def make_space(model: Path, title: str, output: Path) -> None:
    """Writes the folder, whole or not at all.

    Args:
        model: folder of a tokenizer.
        title: of the Space.
        output: a new folder.

    Raises:
        ValueError: there is no tokenizer of this repository, or something is in the way.
    """
    config = model / "config.json"
    kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    if kind not in MODELS or not (model / "preprocessor_config.json").is_file():
        raise ValueError(
            f"--model_name_or_path: {model} is no folder of a tokenizer ({', '.join(MODELS)}) with its image processor."
        )
    if output.exists():
        raise ValueError(f"--output_dir: {output} is there already: name a new folder, or remove it.")
    card = model / "README.md"
    license = ModelCard.load(card).data.license if card.is_file() else None

    def write(folder: Path) -> None:
        files = {file: file.relative_to(ROOT) for pattern in CODE for file in ROOT.glob(pattern)}
        for shown in (model, GENERATOR) if model.resolve() == BOX else (model,):
            name = Path("checkpoints") / shown.resolve().name
            files |= {file: name / file.name for pattern in WEIGHTS for file in shown.glob(pattern)}
        for file, place in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / place)
        (folder / "README.md").write_text(readme(title, license))
        (folder / "requirements.txt").write_text(requirements())

    write_folder_whole(output, write)


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    make_space(args.model_name_or_path, args.title, args.output_dir)
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file()) / 1e6
    print(f"A Space of {size:.0f} MB: {args.output_dir}. To try it here: cd {args.output_dir} && python app.py")


if __name__ == "__main__":
    main()
