"""ComfyUI-IdentityEdit: the entry point through which ComfyUI loads the pack.

It registers the nodes, the folders of the demo checkpoint and of its control network, the model families of the demo
checkpoint, SD2.x with a source picture, the models folder of learned subjects, and the help pages; nothing else.
"""

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .demo_world import family
from .nodes import NODE_CLASSES
from .nodes.subject_embedding import FILE_FOLDER
from .pipelines.engine.edit_model import register_families

WEB_DIRECTORY = "./web"


class IdentityEditExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODE_CLASSES


async def comfy_entrypoint() -> IdentityEditExtension:
    demo_world = Path(__file__).parent / "demo_world"
    folder_paths.add_model_folder_path("checkpoints", str(demo_world / "weights"))
    folder_paths.add_model_folder_path("controlnet", str(demo_world / "control"))
    # Beside those that extra_model_paths.yaml may name; Step-Wise Embedding Loader lists what it can read there.
    folder_paths.add_model_folder_path(FILE_FOLDER, os.path.join(folder_paths.models_dir, FILE_FOLDER))
    family.register()
    register_families()
    return IdentityEditExtension()
