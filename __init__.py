"""ComfyUI-IdentityEdit: the entry point through which ComfyUI loads the pack.

It registers the nodes, the folder and the model families of the demo checkpoint, SD2.x with a source picture, and the
help pages; nothing else.
"""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .demo_world import family
from .nodes import NODE_CLASSES
from .pipelines.engine.edit_model import register_families

WEB_DIRECTORY = "./web"


class IdentityEditExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODE_CLASSES


async def comfy_entrypoint() -> IdentityEditExtension:
    folder_paths.add_model_folder_path("checkpoints", str(Path(__file__).parent / "demo_world" / "weights"))
    family.register()
    register_families()
    return IdentityEditExtension()
