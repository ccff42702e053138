"""Options of train_hf.py: those of a file and those of flags, and which of them would have no effect."""

import dataclasses
import json
from pathlib import Path

from eval.files import read_fields
from training.parser import TrainingParser, is_adversarial


SECRET = {"token", "password", "secret", "key"}  # last words of the names of options that nobody else may read


def is_secret(name: str) -> bool:
    """Whether the value of an option must not be written down."""
    return name.split("_")[-1] in SECRET


# what a training can lower where its memory does not suffice
BATCH_SIZES = "--per_device_train_batch_size and --per_device_eval_batch_size"
BATCH_SIZES += " (--gradient_accumulation_steps makes up for it)"


def parse(kinds: tuple[type, ...], arguments: list[str], description: str) -> tuple[tuple, dict, set[str]]:
    """Options of a JSON or YAML file, if the first argument names one, and of the flags behind it, which override them.

    Args:
        kinds: dataclasses.
        arguments: of the command line.
        description: for `--help`.

    Returns:
        An instance of each kind; the options that were given, by name, as JSON holds them; and the names of those that
        flags have given.

    Raises:
        ValueError: the file is no mapping of options, or an option cannot have its value.
        SystemExit: an option is unknown or has no such value, which was said.
    """
    parser, in_file = TrainingParser(kinds, description), []
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        path, *arguments = arguments
        in_file = _file_as_flags(path)
        parser.refuse_unknown(in_file, where=f"{path}: ")
    *parsed, unknown = parser.parse_args_into_dataclasses(
        in_file + arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"There is no option {' '.join(unknown)}: --help lists them.")
    values = {name: value for options in parsed for name, value in vars(options).items()}
    names = [_names(flags, values) for flags in (in_file, arguments)]
    given = {name: values[name] for name in values if name in names[0] | names[1]}
    return tuple(parsed), json.loads(json.dumps(given, default=str)), names[1]


def _names(flags: list[str], known: dict) -> set[str]:
    """Of the options in `--name value`, `--name=value` and `--no-name`."""
    words = {flag.removeprefix("--").split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    return {word if word in known else word.removeprefix("no_") for word in words}


def _file_as_flags(path: str) -> list[str]:
    """The options of a file as flags. Names that begin with an underscore are remarks."""
    flags = []
    for name, value in read_fields(Path(path)).items():
        if name.startswith("_"):
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
            flags.append(f"--{name}={text}")  # a value may begin with a dash
    return flags


# What would have no effect -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Without:
    """Options that have no effect in a mode.

    Args:
        names: of the options.
        mode: whether this run is in the mode.
        because: why they have none, a clause.
        of: the options that decide about the mode. What a file says beside them is no mistake where a flag overrides
            one of these: `recipe.json --gan_weight 0`.
    """

    names: str
    mode: bool
    because: str
    of: str = ""


def refuse_without_effect(given: dict, by_flags: set[str], rules: list[Without]) -> None:
    """What was asked for and would be ignored is an error. An option that is off (0, false) asks for nothing.

    Args:
        given, by_flags: see `parse`.
        rules: of this run.

    Raises:
        ValueError: options that have no effect, each with the reason.
    """
    found = {}
    for rule in rules:
        for name in rule.names.split() if rule.mode else ():
            overridden = name not in by_flags and not by_flags.isdisjoint(rule.of.split())
            if given.get(name) and not overridden:
                found.setdefault(name, rule.because)
    if found:
        raise ValueError("\n".join(f"--{name} has no effect: {because}." for name, because in found.items()))


def rules_of_data(data) -> list[Without]:
    """Args: data: `DataArguments` of train_hf.py."""
    try:
        train, held_out = data.train_source, data.eval_source
    except ValueError:  # which is said when they are opened
        return []
    here = f"{data.train_data} is on this disk, not a dataset of the hub"
    are_files = f"{data.train_data} is files of images on this disk"
    return [
        Without("holdout group_separator", bool(data.eval_data), "--eval_data names the held-out images", "eval_data"),
        Without(
            "holdout group_separator",
            train.has_splits and not data.eval_data,
            f"{data.train_data} has a split to hold out (--eval_split)",
            "train_data eval_data",
        ),
        Without(
            "group_separator",
            not train.images,
            f"{data.train_data} is not files of images, whose names tell groups",
            "train_data eval_data",
        ),
        Without("streaming", bool(train.images), are_files, "train_data"),
        Without("streaming", train.kind == "saved", f"{data.train_data} is read as it is used anyway", "train_data"),
        Without("train_split", not train.has_splits, f"{data.train_data}, on this disk, has no splits", "train_data"),
        Without(
            "eval_split",
            not held_out.has_splits,
            "the held-out images are on this disk, without splits",
            "train_data eval_data",
        ),
        Without("image_column", bool(train.images and held_out.images), are_files, "train_data eval_data"),
        Without(
            "dataset_config_name dataset_revision",
            "hub" not in (train.kind, held_out.kind),
            here,
            "train_data eval_data",
        ),
        Without("shuffle_buffer", not data.streaming, "it is of --streaming", "streaming train_data"),
    ]


def rules_of_model(model) -> list[Without]:
    """Args: model: `ModelArguments` of train_hf.py."""
    config, name = model.model_config or {}, model.encoder_name_or_path or model.model_name_or_path
    return [
        Without(
            "codebook_init",
            bool(model.model_name_or_path),
            "the codes are those of --model_name_or_path",
            "model_name_or_path",
        ),
        Without(
            "codebook_init",
            "codebook_init" in config or not config.get("use_simvq", True),
            "--model_config decides about the codes",
            "model_config",
        ),
        Without(
            "revision",
            name is None or Path(name).exists(),
            "the model is not of the hub",
            "encoder_name_or_path model_name_or_path model_config",
        ),
    ]


def rules_of_encoder(is_frozen: bool) -> list[Without]:
    """Those that are known when the model is there."""
    frozen = "the encoder is frozen, --stage 2 trains it"
    of = "stage model_config model_name_or_path encoder_name_or_path"
    return [Without("distillation_weight encoder_learning_rate", is_frozen, frozen, of)]


def rules_of_training(args) -> list[Without]:
    """Args: args: `VQRAETrainingArguments`."""
    adversarial = {field.name for field in dataclasses.fields(args) if is_adversarial(field.name)} - {"gan_weight"}
    has_perceptual = args.lpips_weight or args.convnext_weight
    return [
        Without(" ".join(sorted(adversarial)), not args.gan_weight, "there is no GAN (--gan_weight)", "gan_weight"),
        Without(
            "discriminator_name_or_path",
            args.discriminator != "dino",
            f"the discriminator is {args.discriminator} (--discriminator dino)",
            "discriminator",
        ),
        Without(
            "discriminator_cutout",
            not args.discriminator_augment,
            "it is a part of --discriminator_augment",
            "discriminator_augment",
        ),
        Without(
            "discriminator_warmup_steps",
            args.discriminator_lr_scheduler_type == "constant",
            "--discriminator_lr_scheduler_type constant has no warm-up, constant_with_warmup has",
            "discriminator_lr_scheduler_type",
        ),
        Without("lpips_network", not args.lpips_weight, "LPIPS is off (--lpips_weight)", "lpips_weight"),
        Without(
            "perceptual_weights perceptual_optional",
            not has_perceptual,
            "LPIPS and ConvNeXt-S are off (--lpips_weight, --convnext_weight)",
            "lpips_weight convnext_weight",
        ),
        Without(
            "quantizer_lr_multiplier vq_weight",
            bool(args.token_passes),
            "with --token_passes the quantizer is not trained",
            "token_passes",
        ),
        *rules_of_trainer(args),
        Without("label_names label_smoothing_factor", True, "images have no labels"),
    ]


def rules_of_trainer(args) -> list[Without]:
    """Those of transformers' own options. Args: args: `TrainingArguments`."""
    return [
        Without(
            "warmup_steps",
            args.lr_scheduler_type == "constant",
            "--lr_scheduler_type constant has no warm-up, constant_with_warmup has",
            "lr_scheduler_type",
        ),
        Without("num_train_epochs", args.max_steps > 0, "--max_steps decides when training ends", "max_steps"),
        *(
            Without(
                f"{what}_steps",
                getattr(args, f"{what}_strategy") != "steps",
                f"--{what}_strategy is {getattr(args, f'{what}_strategy').value}, not steps",
                f"{what}_strategy",
            )
            for what in ("eval", "save", "logging")
        ),
        Without("eval_delay", args.eval_strategy == "no", "--eval_strategy is no", "eval_strategy"),
        Without("save_total_limit", args.save_strategy == "no", "--save_strategy is no", "save_strategy"),
        Without(
            "hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision",
            not args.push_to_hub,
            "nothing is pushed (--push_to_hub)",
            "push_to_hub",
        ),
        Without("do_predict", True, "this script trains, and then evaluates"),
    ]
