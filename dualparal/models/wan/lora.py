"""Names that LoRA files have for the parts of a Wan transformer."""

from __future__ import annotations

from collections.abc import Iterable

from dualparal.models.wan.names import original_name


def lora_modules(tensors: Iterable[str]) -> dict[str, str]:
    """The module that each name in a LoRA file means: diffusers' and the original name, dots or underscores between.

    Args:
        tensors: names of the transformer's tensors.
    """
    found = {}
    for tensor in tensors:
        module = tensor.removesuffix(".weight").removesuffix(".bias")
        for name in (module, original_name(module)):
            found[name] = found[name.replace(".", "_")] = module
    return found
