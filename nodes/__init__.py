"""What the user sees: a file or a package of nodes for each technique, and the list of them all."""

from __future__ import annotations

from comfy_api.latest import io

from . import (
    attention_control,
    demo,
    flow_editing,
    hifi_tuner,
    inversion,
    keep_rest,
    lipe,
    mcdm,
    pidiff,
    scores,
    subjects,
    timestep_aware,
    training,
)

NODE_CLASSES: list[type[io.ComfyNode]] = [
    *inversion.NODES,
    *flow_editing.NODES,
    *timestep_aware.NODES,
    *subjects.NODES,
    *training.NODES,
    *lipe.NODES,
    *hifi_tuner.NODES,
    *attention_control.NODES,
    *mcdm.NODES,
    *pidiff.NODES,
    *keep_rest.NODES,
    *scores.NODES,
    *demo.NODES,
]
