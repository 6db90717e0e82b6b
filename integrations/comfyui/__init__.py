"""Nodes for ComfyUI. Put this folder, or a link to it, into ComfyUI's ``custom_nodes``, as any name but "dualparal"."""

if __name__ == "dualparal":  # ComfyUI puts a folder of nodes under its own name where Python looks for the library
    raise ImportError("this folder hides the library of its name: call it comfyui-dualparal")

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
