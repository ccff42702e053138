"""The model card of a run: what was trained, from what, on what, how, and which weights the files hold. Nothing is in
it that the run did not do."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from eval.files import write_whole
from eval.results import weights_file_hash
from reading.sources import is_on_hub, public_name
from reading.wording import counted
from training.options import is_secret


RECIPE = "training_recipe.json"
# the hub's own example for images
WIDGET = [
    {
        "src": "https://huggingface.co/datasets/mishig/sample_images/resolve/main/tiger.jpg",
        "example_title": "Tiger",
    }
]

USAGE = """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{repository}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{repository}", trust_remote_code=True)
pixels = processor(Image.open("image.jpg"), return_tensors="pt").pixel_values

with torch.no_grad():
    encoded = model.encode(pixels)
    features = encoded.last_hidden_state  # continuous
    tokens = encoded.image_tokens  # (1, h, w), integers below {codes}
    image = processor.postprocess(model.decode(tokens).decoded_pixel_values)[0]  # PIL
```"""

TEXT = """
# {name}

A discrete image tokenizer ({method}) for {size} px images: {encoder}, {codes:,} codes of width {width}, and a {decoder}
decoder. One image of {size} px becomes {tokens} tokens.

{usage}
{picture}
## Weights

{weights}

## Training

{training}

{measured}
{notes}
## Limits

{limits}

## Licences

{licences}
"""


@dataclass
class Provenance:
    """Where a model comes from, as far as the Trainer does not know.

    Args:
        encoder: `--encoder_name_or_path`, if the run began with one.
        parent: `--model_name_or_path`, if it went on with a model.
        train_data: name or path of the training images.
        num_train_images: how many, where that is known.
        recipe: all options that were given, by name.
        license: of the resulting weights, as the hub writes it ("apache-2.0"); of the parent, where not given.
        notes: Markdown for the card, `--card_notes`.
        hub: `revision` and `token` with which `encoder` or `parent` is read from the hub. Never written anywhere.
    """

    encoder: str | None = None
    parent: str | None = None
    train_data: str | None = None
    num_train_images: int | None = None
    recipe: dict = field(default_factory=dict)
    license: str | None = None
    notes: str | None = None
    hub: dict = field(default_factory=dict, repr=False)


def model_card(name: str, trainer, provenance: Provenance) -> ModelCard:
    """README.md, from what the trainer did and last measured.

    Args:
        name: of the model, a folder or a hub repository.
        trainer: a [`VQRAETrainer`], in training or after it.
        provenance: see [`Provenance`].
    """
    config = trainer.accelerator.unwrap_model(trainer.model).config
    parent = _metadata(provenance.parent, provenance.hub)
    encoder_license = _metadata(provenance.encoder, provenance.hub).get("license")
    simvq = "[SimVQ](https://huggingface.co/papers/2411.02038)"
    if config.model_type == "vqrae":
        vision = config.encoder_config
        encoder = f"a vision encoder ({vision.model_type}, width {vision.hidden_size})"
        method, decoder = f"[VQRAE](https://huggingface.co/papers/2511.23386) with {simvq}", "ViT"
    else:
        method, encoder, decoder = simvq, "a convolutional encoder", "convolutional"
    on_hub = [x for x in (provenance.encoder, provenance.parent) if x and is_on_hub(x)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=[config.model_type, "simvq", "image-tokenizer"],
        license=provenance.license or parent.get("license"),
        base_model=on_hub[0] if on_hub else parent.get("base_model"),
        datasets=_named_datasets(provenance, parent),
        widget=WIDGET,
    )
    pictures = [file for file in trainer.card_files() if file.suffix == ".png"]
    picture = "\nHeld-out images: originals, reconstructions"
    picture += " by the trained weights, by their average" if trainer.ema else ""
    picture += f".\n\n![held-out images]({pictures[0].as_posix()})\n" if pictures else ""
    text = TEXT.format(
        name=name.split("/")[-1],
        usage=usage(name, config),
        method=method,
        encoder=encoder,
        decoder=decoder,
        size=config.image_size,
        codes=config.codebook_size,
        width=config.latent_size,
        tokens=(config.image_size // config.decoder_patch_size) ** 2,
        picture=picture if pictures else "",
        weights=_weights(trainer),
        training=_training(trainer, config, provenance),
        measured=_measured(trainer.state.log_history),
        notes=f"\n{provenance.notes.strip()}\n" if provenance.notes else "",
        limits=_limits(trainer, config, provenance),
        licences=_licences(data.license, provenance, encoder_license),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def usage(name: str, config) -> str:
    """The code that every card shows: images to features and tokens, and back.

    Args:
        name: a folder or a hub repository.
        config: of the model.
    """
    return USAGE.format(repository=name, codes=config.codebook_size)


def write_card(name: str, trainer, provenance: Provenance, folder: str | Path) -> None:
    """Writes README.md, and the recipe that it names."""
    folder = Path(folder)
    if provenance.recipe:
        write_recipe(provenance, folder)
    card = model_card(name, trainer, provenance)
    if (folder / "README.md").exists():  # numbers of an evaluation stay as long as the weights do
        own = weights_file_hash(folder)
        kept = [
            entry
            for entry in ModelCard.load(folder / "README.md").data.eval_results or []
            if (entry.metric_args or {}).get("model_sha256") == own
        ]
        if kept:
            card.data.model_name, card.data.eval_results = name.split("/")[-1], kept
    write_whole(folder / "README.md", lambda file: file.write_text(str(card)))


def write_recipe(provenance: Provenance, folder: str | Path) -> list[str]:
    """Writes the options of a run that begins or goes on; tells those that differ from the ones it had before.

    Returns:
        One line for each that differs; none for a new run.
    """
    path, own = Path(folder) / RECIPE, json.loads(_recipe(provenance))
    before = json.loads(path.read_text()) if path.exists() else own
    write_whole(path, lambda file: file.write_text(_recipe(provenance)))
    names = sorted(before.keys() | own.keys())
    return [f"{n}: {before.get(n)} before, {own.get(n)} now" for n in names if before.get(n) != own.get(n)]


def public_options(given: dict) -> dict:
    """What others may read of the options of a run: no secrets, and of paths on this machine the last part alone."""
    return {
        name: public_name(value) if isinstance(value, str) else value
        for name, value in given.items()
        if not is_secret(name)
    }


def _recipe(provenance: Provenance) -> str:
    return json.dumps(public_options(provenance.recipe), indent=2, sort_keys=True) + "\n"


def _metadata(name_or_path: str | None, hub: dict) -> dict:
    """Of a model's card, where there is one to be had."""
    if name_or_path is None:
        return {}
    try:
        card = Path(name_or_path, "README.md")
        if not Path(name_or_path).is_dir():
            card = hf_hub_download(name_or_path, "README.md", **hub)
        return ModelCard.load(card).data.to_dict()
    except (OSError, ValueError):  # no card, no network
        return {}


def _named_datasets(provenance: Provenance, parent: dict) -> list[str] | None:
    """Those of the hub; a local folder's name says nothing to others."""
    own = [provenance.train_data] if provenance.train_data and is_on_hub(provenance.train_data) else []
    return sorted({*own, *(parent.get("datasets") or [])}) or None


def _weights(trainer) -> str:
    if not trainer.ema:
        return "`model.safetensors` holds the trained weights at the last step; no average was kept."
    return (
        f"`model.safetensors` holds the moving average of the weights (decay {trainer.args.ema_decay:g}), of which the "
        "held-out numbers below are. `raw_weights.safetensors` holds the trained weights at the last step, of those "
        "parameters that were trained: `model.load_state_dict(load_file(...), strict=False)`."
    )


def _training(trainer, config, provenance: Provenance) -> str:
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    of = f" of {counted(provenance.num_train_images, 'image')}" if provenance.num_train_images else ""
    start = "random weights"
    if provenance.parent:
        start = f"the tokenizer `{public_name(provenance.parent)}`"
    elif provenance.encoder:
        start = f"the encoder `{public_name(provenance.encoder)}`"
    lines = [
        f"{counted(trainer.state.global_step, 'step')} of {counted(batch, 'random crop')}{of}, begun with "
        f"{start}; peak learning rate {args.learning_rate:g}, encoder "
        f"{'frozen' if config.freeze_encoder else 'trained'}, seed {args.seed}."
    ]
    speeds = [entry["images_per_second"] for entry in trainer.state.log_history if "images_per_second" in entry]
    if speeds:  # not the time of this process, which may have gone on with a run
        minutes = trainer.state.global_step * batch * sum(1 / speed for speed in speeds) / len(speeds) / 60
        without = ", without the tokens" if args.token_passes else ""
        lines.append(f"The steps took {counted(round(minutes), 'minute')} on {_hardware(args)}{without}.")
    if args.token_passes:
        lines.append(
            f"The decoder alone was trained, on tokens computed once (crops of each image: {args.token_passes})."
        )
    weights = {"l1": args.l1_weight, "l2": args.l2_weight, "gradients": args.gradient_weight}
    weights |= {f"LPIPS ({args.lpips_network})": args.lpips_weight}
    weights |= {"ConvNeXt-S": args.convnext_weight, "codebook": args.vq_weight}
    weights |= {"distillation": args.distillation_weight if trainer.teacher else 0}
    weights |= {f"GAN ({args.discriminator})": args.gan_weight}
    lines.append("Losses: " + ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight) + ".")
    if config.codebook_init_latents:
        lines.append(f"The codes began as k-means centroids of {config.codebook_init_latents:,} latents.")
    if fit := getattr(config, "latents_fit", None):
        lines.append(
            f"Fused latents (encoder layers {config.encoder_layers}, pixel weight {config.pixel_weight:g}) were fitted "
            f"to {fit['images']:,} crops, {fit['tokens']:,} tokens: {config.codebook_dim} directions keep "
            f"{fit['variance_kept']:.1%} of the variance, and the first layers predict pixels with "
            f"{fit['pixels_psnr']:.1f} dB."
        )
    if provenance.recipe:
        digest = hashlib.sha256(_recipe(provenance).encode()).hexdigest()
        lines.append(f"All options: `{RECIPE}` (SHA-256 `{digest}`).")
    if before := _training_of(provenance.parent):
        lines.append(f"\nBefore that, `{public_name(provenance.parent)}`: {before}")
    return "\n".join(lines)


def _training_of(parent: str | None) -> str:
    """The first paragraphs under "Training" of a parent's card, if it is a folder with one."""
    path = Path(parent or "", "README.md")
    if not parent or not path.is_file():
        return ""
    section = ModelCard.load(path).text.partition("\n## Training\n")[2].partition("\n## ")[0]
    return section.partition("\nHeld-out images after")[0].partition("\nIn training, the latest")[0].strip()


def _hardware(args) -> str:
    if args.device.type == "cpu":
        return f"{torch.get_num_threads()} CPU threads"
    return f"{args.world_size} x {torch.cuda.get_device_name() if args.device.type == 'cuda' else args.device.type}"


def _measured(history: list[dict]) -> str:
    lines = []
    held_out = next((entry for entry in reversed(history) if "eval_psnr" in entry), None)
    if held_out:
        names = ("psnr", "ssim", "codebook_utilization", "codebook_perplexity", "codebook_tokens")
        lines += [f"Held-out images after step {held_out['step']:,}:", "", "| metric | value |", "| --- | ---: |"]
        lines += [f"| {name} | {held_out['eval_' + name]:.6g} |" for name in names]
    usage = next((entry for entry in reversed(history) if "codebook_perplexity" in entry), None)
    if usage:
        share, perplexity = usage["codebook_utilization"], usage["codebook_perplexity"]
        of = f"In training, the latest {usage['codebook_tokens']:,} tokens used {share:.1%} of the codes"
        lines += ["", f"{of} (perplexity {perplexity:,.0f})."]
    return "\n".join(lines).strip() or "Nothing was measured yet."


def _limits(trainer, config, provenance: Provenance) -> str:
    lines = ["- rFID and LPIPS are in the metadata of this card if `eval/reconstruction.py` was run, else nowhere."]
    if provenance.num_train_images:
        lines.append(
            f"- Trained on {counted(provenance.num_train_images, 'image')}; on others expect less than on those."
        )
    lines.append(f"- Trained at {config.image_size} px. Other sizes work, without having been trained.")
    lines.append("- One run with one seed.")
    return "\n".join(lines)


def _licences(license: str | None, provenance: Provenance, encoder_license: str | None) -> str:
    lines = ["- The Python files: Apache-2.0."]
    lines.append(f"- The weights: {license or 'no licence was given (`--license`)'}.")
    if provenance.encoder:
        of = encoder_license or "not stated where this card was written"
        lines.append(f"- The encoder they began with, `{public_name(provenance.encoder)}`: {of}.")
    lines.append("- Weights may be bound by the licence of the images they were trained on.")
    return "\n".join(lines)
