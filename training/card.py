"""The model card of a run: what was trained, how, and which weights the files hold."""

from pathlib import Path

from huggingface_hub import ModelCardData

from eval.files import write_whole


SIMVQ = "[SimVQ](https://huggingface.co/papers/2411.02038)"

TEXT = """
# {name}

A discrete image tokenizer ({method}) for {size} px images: {encoder}, {codes:,} codes of width {width}, and a {decoder}
decoder.

```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
```

## Weights

{weights}

## Training

{steps:,} steps of {batch} images, learning rate {rate:g}, encoder {frozen}{stage}. Held-out images after it:

| metric | value |
| --- | --- |
{metrics}
"""


def model_card(name: str, trainer) -> str:
    """The text of README.md, from what the trainer did and last measured.

    Args:
        name: of the model, a folder or a hub repository.
        trainer: a [`VQRAETrainer`] after training.
    """
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    config = model.config
    method, encoder, decoder = SIMVQ, "a convolutional encoder", "convolutional"
    if config.model_type == "vqrae":
        vision = config.encoder_config
        method, decoder = f"[VQRAE](https://huggingface.co/papers/2511.23386) with {SIMVQ}", "ViT"
        encoder = f"a vision encoder ({vision.model_type}, width {vision.hidden_size})"
    measured = next((entry for entry in reversed(trainer.state.log_history) if "eval_psnr" in entry), {})
    names = ("psnr", "ssim", "codebook_utilization", "codebook_perplexity", "codebook_tokens")
    if trainer.ema:
        weights = (
            f"`model.safetensors` holds the moving average of the weights (decay {args.ema_decay:g}), of which the "
            "numbers below are. `raw_weights.safetensors` holds the trained weights at the last step, of those "
            "parameters that were trained: `model.load_state_dict(load_file(...), strict=False)`."
        )
    else:
        weights = "`model.safetensors` holds the trained weights at the last step; no average was kept."
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=[config.model_type, "simvq", "image-tokenizer"],
    )
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    text = TEXT.format(
        name=name,
        method=method,
        encoder=encoder,
        decoder=decoder,
        codes=config.codebook_size,
        width=config.latent_size,
        size=config.image_size,
        weights=weights,
        steps=trainer.state.global_step,
        batch=batch,
        rate=args.learning_rate,
        frozen="frozen" if config.freeze_encoder else "trained",
        stage=f", distillation weight {args.distillation_weight:g}" if trainer.teacher else "",
        metrics="\n".join(f"| {x} | {measured['eval_' + x]:.6g} |" for x in names if f"eval_{x}" in measured),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def write_card(name: str, trainer, folder: str | Path) -> None:
    """Writes README.md."""
    write_whole(Path(folder) / "README.md", lambda file: file.write_text(model_card(name, trainer)))
