"""Registration of the pack with ComfyUI, which calls `comfy_entrypoint`.

It registers the nodes; the folders of the demo world's weights; the demo world's model families and SD2.x with a source
image; and the models folders of learned subjects, style attentions, W+ encoders, face and background networks, image
encoders and weights for scores. Nothing else.
"""

import logging
import os
import re
from importlib import metadata
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io
from comfyui_version import __version__ as comfyui_version

from .demo_world import family
from .nodes import NODE_CLASSES
from .nodes.hifi_tuner.subject_embedding import FILE_FOLDER
from .nodes.pidiff.face import MODEL_FOLDERS
from .nodes.pidiff.style_attention import FILE_FOLDER as STYLE_FOLDER
from .nodes.pidiff.w_plus import ENCODER_FOLDER
from .nodes.scores import ENCODER_FOLDER as ENCODERS
from .nodes.scores import MODEL_FOLDERS as SCORE_FOLDERS
from .pipelines.engine.edit_model import register_families
from .pipelines.shared.errors import for_console


class IdentityEditExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODE_CLASSES


def warn_of_another_copy() -> None:
    """Log a warning if the pack is installed twice: ComfyUI silently uses the nodes of the copy loaded last."""
    here = Path(__file__).parent
    for folder in map(Path, folder_paths.get_folder_paths("checkpoints")):
        other = folder.parent.parent
        if folder.parts[-2:] == ("demo_world", "weights") and other != here:
            text = f"ComfyUI-IdentityEdit is loaded twice, from {other} and from {here}: remove one of them."
            logging.warning(for_console(text))


def versions() -> str:
    """The versions that a bug report needs, in one line."""
    text = (Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    ours = found[1] if found else "of an unknown version"
    return f"ComfyUI-IdentityEdit {ours} on ComfyUI {comfyui_version}, torch {metadata.version('torch')}"


async def comfy_entrypoint() -> IdentityEditExtension:
    logging.info(versions())
    warn_of_another_copy()
    demo_world = Path(__file__).parent / "demo_world"
    folder_paths.add_model_folder_path("checkpoints", str(demo_world / "weights"))
    folder_paths.add_model_folder_path("diffusion_models", str(demo_world / "diffusion_models"))
    folder_paths.add_model_folder_path("controlnet", str(demo_world / "control"))
    # Beside those that extra_model_paths.yaml may name; Step-Wise Embedding Loader lists what it can read there.
    folder_paths.add_model_folder_path(FILE_FOLDER, os.path.join(folder_paths.models_dir, FILE_FOLDER))
    for folder in (STYLE_FOLDER, ENCODER_FOLDER, ENCODERS, *MODEL_FOLDERS, *SCORE_FOLDERS):
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
    # What Save W+ Encoder writes, as ComfyUI does with its own output/checkpoints.
    folder_paths.add_model_folder_path(
        ENCODER_FOLDER, os.path.join(folder_paths.get_output_directory(), ENCODER_FOLDER)
    )
    # After the user's own folders, as the first of a kind is where users are told to put their files.
    folder_paths.add_model_folder_path(ENCODER_FOLDER, str(demo_world / "w_plus"))
    folder_paths.add_model_folder_path(STYLE_FOLDER, str(demo_world / "style_attention"))
    folder_paths.add_model_folder_path(ENCODERS, str(demo_world / "scoring"))
    family.register()
    register_families()
    return IdentityEditExtension()
