"""The node of prompts for a subject's class, from which a regularization set is rendered."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...pipelines.subjects import regularization_prompts as prompts
from ..sockets import SEED_MAXIMUM, checked, schema, seed_input, show_text
from .inputs import check_model, class_word_input, list_models, model_path, progress_bar

SHIPPED_LIST = "shipped list"
OWN_PROMPTS = "own prompts"
ENDPOINT = "endpoint (environment variables)"


class RegularizationPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditRegularizationPrompts",
            display_name="Regularization Prompts",
            category="subject",
            search_aliases=["regularization", "class images", "prior preservation", "dreambooth", "prompt list"],
            advanced=["first_instruction", "second_instruction", "max_new_tokens", "temperature"],
            description=(
                "Detailed prompts for the subject's class (Liu et al. 2024, section 2.1). Render each "
                "with stock sampling nodes; training with these images keeps the model from forgetting the "
                "class."
            ),
            inputs=[
                class_word_input("Class of the subject, such as 'dog'; every prompt contains it."),
                io.Combo.Input(
                    "source",
                    options=[SHIPPED_LIST, OWN_PROMPTS, ENDPOINT, *list_models()],
                    default=SHIPPED_LIST,
                    tooltip="Source of the prompts. Shipped list: combined from styles, actions, backgrounds and "
                    "views, offline. Own prompts: the lines of own_prompts. Endpoint: an OpenAI-compatible server, "
                    "set by IDENTITY_EDIT_LLM_URL, IDENTITY_EDIT_LLM_MODEL and IDENTITY_EDIT_LLM_KEY. Or a "
                    "transformers language model in a folder in models/LLM.",
                ),
                io.Int.Input(
                    "count",
                    default=100,
                    min=1,
                    max=prompts.MOST_PROMPTS,
                    tooltip="Number of prompts, and so of images to render.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(prompts.KINDS),
                    default=prompts.KINDS[0],
                    tooltip="Kind of subject that the class word names; the shipped list has actions for each kind.",
                ),
                io.String.Input(
                    "first_instruction",
                    default=prompts.INSTRUCTION_TABLE_4,
                    multiline=True,
                    tooltip="Prompt for a language model; {keyword} stands for the class word. Liu et al. 2024, "
                    "table 4. Both instructions are used in turn until there are enough prompts.",
                ),
                io.String.Input(
                    "second_instruction",
                    default=prompts.INSTRUCTION_TABLE_5,
                    multiline=True,
                    tooltip="Second prompt for a language model; Liu et al. 2024, table 5. Leave it empty to use "
                    "only the first.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=prompts.MAX_NEW_TOKENS,
                    min=1,
                    max=32768,
                    tooltip="Maximum length of one answer of a local model, in tokens. 4096 tokens fit 50 prompts.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Sampling temperature of a language model; at 0 it repeats itself. Ignored by the "
                    "shipped list.",
                ),
                seed_input("Prompt seed. Different seeds give different prompts."),
                io.String.Input(
                    "own_prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts for the source own prompts, one per line, each with the class word. They "
                    "repeat from the first if count is larger.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt_list",
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="List of prompts: nodes connected to it run once per prompt.",
                ),
                io.Int.Output(
                    "seed_list",
                    display_name="seeds",
                    is_output_list=True,
                    tooltip="Noise seed of each prompt, for the sampler's seed; without it, all images start from "
                    "the same noise.",
                ),
                io.String.Output("report", tooltip="The prompts and their source."),
            ],
        )

    @classmethod
    def validate_inputs(cls, source: str | None) -> bool | str:
        return source in (SHIPPED_LIST, OWN_PROMPTS, ENDPOINT) or check_model(source)

    @classmethod
    @checked
    def execute(
        cls,
        class_word: str,
        source: str,
        count: int,
        kind: str,
        first_instruction: str,
        second_instruction: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        own_prompts: str = "",
    ) -> io.NodeOutput:
        instructions = (first_instruction, second_instruction)
        options: dict[str, Any] = {"temperature": temperature, "progress": progress_bar()}
        notes: list[str] = []
        if source == SHIPPED_LIST:
            found = prompts.shipped_prompts(class_word, count, seed, kind)
        elif source == OWN_PROMPTS:
            found = prompts.own_prompts(own_prompts, class_word, count)
        elif source == ENDPOINT:
            found, notes = prompts.endpoint_prompts(class_word, count, seed, instructions, **options)
        else:
            path = model_path(source)
            found, notes = prompts.model_prompts(
                path, class_word, count, seed, instructions, max_new_tokens=max_new_tokens, **options
            )
        seeds = [(seed + number) % (SEED_MAXIMUM + 1) for number in range(len(found))]
        report = show_text(cls, "\n".join([f"{len(found)} prompts from {source}.", *notes, *found]))
        return io.NodeOutput(found, seeds, report)


NODES: list[type[io.ComfyNode]] = [RegularizationPrompts]
