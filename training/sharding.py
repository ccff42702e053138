"""FSDP (torch's `fully_shard`, accelerate's version 2): each process holds a part of every parameter, of its gradient,
of its average and of its state in the optimizer."""

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, StateDictType
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer


def prepare_for_fsdp(model: nn.Module, accelerator, args) -> None:
    """Has accelerate shard a model layer by layer when it prepares it. Under bf16 the forward pass is autocast, as
    without FSDP: FSDP's own policy would round pixels and the quantizer, and bf16 codes are other codes.

    Raises:
        ValueError: an option that does not go with FSDP.
    """
    plugin = accelerator.state.fsdp_plugin
    by_size, whole = plugin.auto_wrap_policy is size_based_auto_wrap_policy, StateDictType.FULL_STATE_DICT
    for option, given, instead in (
        ("fsdp_version: 1", plugin.fsdp_version != 2, "fsdp_version: 2"),
        ("fsdp_auto_wrap_policy: SIZE_BASED_WRAP", by_size, "TRANSFORMER_BASED_WRAP"),
        ("fsdp_state_dict_type: SHARDED_STATE_DICT", plugin.state_dict_type != whole, "FULL_STATE_DICT"),
        ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, "false"),
        ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "false"),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, "false, and --gradient_checkpointing"),
        ("--fp16", accelerator.mixed_precision == "fp16", "--bf16"),
        ("--torch_compile", args.torch_compile, "no compilation"),
        ("--auto_find_batch_size", args.auto_find_batch_size, "--per_device_train_batch_size"),
    ):
        if given:
            raise ValueError(f"{option} is not supported with FSDP: use {instead}, as configs/accelerate_fsdp.yaml.")
    if plugin.transformer_cls_names_to_wrap is None:  # else _no_split_modules, where some name what is not there
        layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
        plugin.transformer_cls_names_to_wrap = sorted(layers)
    plugin.mixed_precision_policy = None
    model.forward = accelerator.autocast()(model.forward)
    model.get_input_embeddings = lambda: None  # accelerate asks for them; the model has none


def rename_sharded(model: nn.Module) -> None:
    """Gives the class that FSDP has made for a model the name of its own, under which it is saved: `auto_map` and the
    modeling code."""
    if isinstance(model, FSDPModule):
        own = type(model).__mro__[2]  # behind the made class and FSDPModule
        type(model).__name__, type(model).__module__ = own.__name__, own.__module__


def reshard(model: nn.Module) -> None:
    """Drops the whole parameters that FSDP keeps after a forward pass without a backward pass: it would go on with them
    whatever is written to the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_whole(model: nn.Module, tensors: dict[str, torch.Tensor], strict: bool = True):
    """`model.load_state_dict` of whole tensors, also where the model is sharded."""
    return set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, strict=strict))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The shard that this process holds; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
