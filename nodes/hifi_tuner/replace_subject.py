"""The node that replaces the subject of an image: one algorithm of the paper, for one kind of sampling."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines.attention_control.prompt_to_prompt import BLEND_START, BLEND_THRESHOLD
from ...pipelines.hifi_tuner import subject_replacement as replacement
from ...pipelines.inversion.inversion import Inversion as InversionData
from ...pipelines.shared.conditioning import Conditioning
from ..idle import blend_idle, first_said, joined, takes_no_part
from ..sockets import Inversion, checked, fraction_input, guidance_scale_input, progress, schema, show_text


class ReplaceSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditReplaceSubject",
            display_name="Replace Subject",
            category="attention control",
            search_aliases=["HiFi Tuner", "subject swap", "personalized subject replacement", "edit sampler"],
            advanced=["subject_tokens", "blend_threshold"],
            description=(
                "Replaces the subject of an image by a learned subject or by a word, without a mask "
                "(Wang et al. 2023, algorithm 3): all other words keep the attention of the image."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model used for the inversion: plain, or from Apply Subject with its step-wise "
                    "embeddings.",
                ),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                Inversion.Input(
                    "inversion", tooltip="Inversion of the image, from Noise Inversion and Null-Text Optimization."
                ),
                io.String.Input(
                    "source_prompt",
                    default="",
                    multiline=True,
                    tooltip="Caption of the image, the same as for the inversion.",
                ),
                io.String.Input(
                    "target_prompt",
                    default="",
                    multiline=True,
                    tooltip="The caption with the subject's word replaced by the new subject's.",
                ),
                io.String.Input(
                    "subject_words",
                    default="",
                    tooltip="Words of the new subject in the target prompt, separated by spaces or commas; they "
                    "keep their own attention. Empty: the words that the source prompt lacks.",
                ),
                io.Int.Input(
                    "subject_tokens",
                    default=replacement.SUBJECT_TOKENS,
                    min=0,
                    max=70,
                    tooltip="Number of learned tokens in the last positions of the connected target; they keep "
                    "their own attention too. 5 in Wang et al. 2023 (section 4). No effect without a target.",
                ),
                guidance_scale_input(
                    0.0,
                    "Guidance scale of the edit. 0 is automatic: the scale that the null-text embeddings "
                    "were optimized for.",
                ),
                fraction_input(
                    "cross_replace_steps",
                    replacement.CROSS_REPLACE_STEPS,
                    "Fraction of the steps, from the first, that use the image's cross-attention. 1 in "
                    "Wang et al. 2023 (algorithm 3); lower gives the subject more freedom.",
                ),
                fraction_input(
                    "self_replace_steps",
                    replacement.SELF_REPLACE_STEPS,
                    "Fraction of the steps, from the first, that use the image's self-attention. 0 in Wang "
                    "et al. 2023 (algorithm 3); higher keeps more of the old subject's shape.",
                ),
                io.Boolean.Input(
                    "local_blend",
                    default=False,
                    tooltip="Local blend of prompt-to-prompt: keeps the image outside both subjects. Not used in "
                    "Wang et al. 2023.",
                ),
                fraction_input(
                    "blend_threshold",
                    BLEND_THRESHOLD,
                    "Local blend: fraction of the subjects' maximum attention above which the image may "
                    "change. 0.3 in the reference implementation of prompt-to-prompt.",
                ),
                io.Conditioning.Input(
                    "target",
                    optional=True,
                    tooltip="Target prompt with the learned subject, from Apply Subject; without it, only "
                    "target_prompt is used.",
                ),
            ],
            outputs=[
                io.Latent.Output("edited", tooltip="Edited image; decode it with the VAE."),
                io.String.Output("report", tooltip="Tokens with their own attention, and model calls."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        inversion: InversionData,
        source_prompt: str,
        target_prompt: str,
        subject_words: str,
        subject_tokens: int,
        guidance_scale: float,
        cross_replace_steps: float,
        self_replace_steps: float,
        local_blend: bool,
        blend_threshold: float,
        target: Conditioning | None = None,
    ) -> io.NodeOutput:
        result = replacement.subject_replacement(
            model,
            clip,
            inversion,
            source_prompt,
            target_prompt,
            target,
            subject_words,
            subject_tokens,
            guidance_scale=guidance_scale or None,
            cross_replace_steps=cross_replace_steps,
            self_replace_steps=self_replace_steps,
            local_blend=local_blend,
            blend_threshold=blend_threshold,
            callback=progress(model, inversion.steps),
        )
        free = ", ".join(map(str, result.free_tokens))
        text = f"Tokens with their own attention: {free}. {result.evaluations} model calls."
        unused = first_said(
            (
                source_prompt == target_prompt and target is None,
                "The source prompt and the target prompt are the same, so nothing is replaced; write the new subject "
                "into the target prompt, or connect target.",
            ),
            (
                takes_no_part(max(cross_replace_steps, self_replace_steps), inversion.steps) and not local_blend,
                "cross_replace_steps and self_replace_steps are 0, so none of the image's attention is kept; raise one "
                "of them.",
            ),
        )
        unused = joined(unused, blend_idle(local_blend, blend_threshold, BLEND_START, inversion.steps))
        return io.NodeOutput({"samples": result.latent}, show_text(cls, text, joined(unused, result.warning)))


NODES: list[type[io.ComfyNode]] = [ReplaceSubject]
