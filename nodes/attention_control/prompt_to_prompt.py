"""The node that edits an image by editing its prompt, with the attention of the source image.

It outputs a MODEL and the target's CONDITIONING instead of sampling: every stock sampler, scheduler, guider and preview
works with it, ControlNet and LoRA compose, and a real image uses the same graph with an inversion connected.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines import engine
from ...pipelines.attention_control import prompt_to_prompt as control
from ...pipelines.inversion.inversion import Inversion as InversionData
from ..idle import blend_idle, first_said, takes_no_part
from ..sockets import ClipOfAnyFamily, Inversion, checked, fraction_input, schema, show_warnings

_ANY = 1000
"""Assumed number of steps of a run without an inversion."""


class PromptToPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditPromptToPrompt",
            display_name="Prompt-to-Prompt",
            category="attention control",
            search_aliases=[
                "p2p",
                "prompt2prompt",
                "attention control",
                "word swap",
                "prompt editing",
                "attention re-weighting",
            ],
            advanced=["self_attention_grid", "blend_threshold", "blend_start"],
            description=(
                "Edits an image by editing its prompt (Hertz et al. 2023): replace, add or re-weight "
                "words while the rest of the image stays. Works on images from any stock sampler, and on real "
                "images by their inversion."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model: Stable Diffusion, Flux, Chroma, Qwen-Image, Lumina 2, Z-Image, AuraFlow or "
                    "HiDream. In flow models, the target takes the source's queries and keys of the image (Shin et al. "
                    "2025). Apply nodes that change the prompt per step before this one.",
                ),
                ClipOfAnyFamily("clip", tooltip="The text encoders of the same checkpoint."),
                io.String.Input(
                    "source_prompt",
                    default="",
                    multiline=True,
                    tooltip="Prompt of the original image; for a real image, the prompt of its inversion.",
                ),
                io.String.Input(
                    "target_prompt",
                    default="",
                    multiline=True,
                    tooltip="The source prompt with words replaced (replace) or added (refine). To only re-weight "
                    "words, repeat the source prompt.",
                ),
                io.Combo.Input(
                    "edit",
                    options=list(control.EDITS),
                    default=control.REPLACE,
                    tooltip="Type of edit. Replace swaps word for word: a new word takes over the attention of the "
                    "word in its place. Refine is for added or removed words: new words keep their own attention. "
                    "Ignored by flow models.",
                ),
                fraction_input(
                    "cross_replace_steps",
                    control.CROSS_REPLACE_STEPS,
                    "Fraction of the steps, from the first, that use the source's cross-attention: larger "
                    "keeps more of the image. 0.8 in the notebook of Hertz et al. 2023. Ignored by flow models.",
                ),
                fraction_input(
                    "self_replace_steps",
                    control.SELF_REPLACE_STEPS,
                    "Fraction of the steps, from the first, that use the source's self-attention: larger "
                    "keeps more of the shapes. 0.4 in the notebook of Hertz et al. 2023. In flow models, the source's "
                    "queries and keys of the image; 0.2 in Shin et al. 2025.",
                ),
                io.Combo.Input(
                    "self_attention_grid",
                    options=list(control.FACTORS),
                    default=control.FACTORS[0],
                    tooltip="Minimum downsampling of a layer's grid, relative to the latent, for its "
                    "self-attention to be replaced. Automatic is 4 at 512x512 (grids of at most 16x16, as in the "
                    "reference implementation) and above, and less for small images. Ignored by flow models.",
                ),
                io.String.Input(
                    "reweight",
                    default="",
                    tooltip="Attention weights of words in the target prompt, such as: fluffy: 2, hat: 0.5. Below "
                    "1 weakens, below 0 inverts. Empty: none. Not possible with flow models.",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    tooltip="Local blend: words of either prompt, such as: cat, dog. The image changes only where "
                    "it attends to these words. Empty: everywhere.",
                ),
                fraction_input(
                    "blend_threshold",
                    control.BLEND_THRESHOLD,
                    "Local blend: fraction of the words' maximum attention above which the image may "
                    "change; lower changes a larger area. 0.3 in the reference implementation.",
                ),
                fraction_input(
                    "blend_start",
                    control.BLEND_START,
                    "Local blend: fraction of the steps, from the first, before it starts, in which the "
                    "words find their place. 0.2 in the reference implementation.",
                ),
                Inversion.Input(
                    "inversion",
                    optional=True,
                    tooltip="Inversion of a real image, best from Null-Text Optimization, whose embeddings then "
                    "are the negative. Sample from its latent with its sigmas, on flow models from its noise. Without "
                    "it, each latent is sampled as source and as target.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "controlled_model",
                    display_name="model",
                    tooltip="Model for a stock sampler without added noise, such as euler or dpmpp_2m. Without an "
                    "inversion, the result is the source images followed by the target images.",
                ),
                io.Conditioning.Output("positive", tooltip="Target prompt, for the sampler's positive input."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        source_prompt: str,
        target_prompt: str,
        edit: str,
        cross_replace_steps: float,
        self_replace_steps: float,
        self_attention_grid: str,
        reweight: str,
        blend_words: str,
        blend_threshold: float,
        blend_start: float,
        inversion: InversionData | None = None,
    ) -> io.NodeOutput:
        settings = control.ControlSettings(
            cross_replace_steps, self_replace_steps, self_attention_grid, blend_threshold, blend_start
        )
        controlled, positive = control.prompt_to_prompt(
            model,
            clip,
            source_prompt,
            target_prompt,
            edit,
            control.parse_reweight(reweight),
            blend_words,
            settings,
            inversion,
        )
        steps = _ANY if inversion is None else inversion.steps
        factors = control.parse_reweight(reweight)
        replaced = max(cross_replace_steps, self_replace_steps)
        idle, remedy = "cross_replace_steps and self_replace_steps are 0", "raise one of them"
        if engine.is_joint(model):
            replaced, idle, remedy = self_replace_steps, "self_replace_steps is 0", "raise it"
        show_warnings(
            cls,
            first_said(
                (
                    source_prompt == target_prompt and all(factor == 1.0 for factor in factors.values()),
                    "The source prompt and the target prompt are the same and no word is re-weighted, so nothing is "
                    "edited; change the target prompt, or set weights in reweight.",
                ),
                (
                    takes_no_part(replaced, steps) and not blend_words.strip(),
                    f"{idle}, so the target prompt is sampled as without this node; {remedy}.",
                ),
                (
                    bool(factors) and takes_no_part(cross_replace_steps, steps),
                    "reweight has no effect while cross_replace_steps is 0; raise it.",
                ),
            ),
            blend_idle(bool(blend_words.strip()), blend_threshold, blend_start, steps),
            first_said(
                *(
                    (factor == 1.0, f"The weight 1 for {word!r} in reweight has no effect; choose another weight.")
                    for word, factor in factors.items()
                )
            ),
        )
        return io.NodeOutput(controlled, positive)


NODES: list[type[io.ComfyNode]] = [PromptToPrompt]
