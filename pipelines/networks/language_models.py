"""Local language models from a folder in transformers format, prompted with one question at a time.

Nothing is downloaded and no code from the folder is executed: local files only, safetensors only, no remote code. A
model is loaded for one node's run and freed afterwards, because sampling needs the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.host import stop_if_interrupted, supports_bfloat16
from ..shared.errors import IdentityEditError, first_line
from ..shared.images import to_pillow
from .model_folders import CONFIG, check_preprocessor, loaded, read_config

IMAGE_AND_TEXT = "image-text-to-text"
TEXT = "text-generation"
_MEMORY = 1.2
"""Requested memory, as a multiple of the weights' size, to leave room for the KV cache."""


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model, from `load_language_model`.

    Attributes:
        network: the transformers model, in evaluation mode on `device`.
        processor: its processor (images and text) or tokenizer (text).
        path: its folder.
        device: compute device.
    """

    network: Any
    processor: Any
    path: str
    device: torch.device

    @property
    def follows_instructions(self) -> bool:
        """Whether the model answers an instruction, as its processor tells: by a chat template, by an image token for
        the prompt (LLaVA 1.5), or by a tokenizer for instructions (InstructBLIP). A plain captioner, such as BLIP and
        BLIP-2, only continues a text."""
        processor = self.processor
        has_template = getattr(processor, "chat_template", None) is not None
        return has_template or self._prompt_token is not None or hasattr(processor, "qformer_tokenizer")

    @property
    def _prompt_token(self) -> str | None:
        """The token that stands for the image in the prompt; None if the processor inserts its own query tokens."""
        token = getattr(self.processor, "image_token", None)
        return token if isinstance(token, str) and not hasattr(self.processor, "num_query_tokens") else None

    def ask(
        self, question: str, image: torch.Tensor | None = None, *, max_new_tokens: int, temperature: float, seed: int
    ) -> str:
        """The model's answer.

        Args:
            question: the prompt, formatted with the model's chat template if it has one.
            image: [height, width, 3], 0 to 1, for models of the kind IMAGE_AND_TEXT.
            max_new_tokens: maximum length of the answer.
            temperature: 0 is greedy decoding; above 0 tokens are sampled with the seed.
            seed: 0 to 2^64 - 1.

        Raises:
            IdentityEditError: when the model cannot answer, or memory runs out.
        """
        from transformers import StoppingCriteriaList

        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0.0 else {"do_sample": False}
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            inputs = self._inputs(question, image)
            with torch.random.fork_rng(devices=cuda):  # transformers draws from torch's global generator
                torch.manual_seed(seed)
                answer = self.network.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    stopping_criteria=StoppingCriteriaList([_stop_when_interrupted]),
                    **sampling,
                )
        except torch.cuda.OutOfMemoryError as error:
            raise IdentityEditError(
                f"Memory ran out while {self.path} answered; choose a smaller model or a smaller max_new_tokens."
            ) from error
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise IdentityEditError(
                f"The model in {self.path} cannot answer ({first_line(error)}); choose another model."
            ) from error
        prompt = inputs.get("input_ids")
        # Decoder-only models return the prompt before the answer, encoder-decoders do not.
        if prompt is not None and torch.equal(answer[:, : prompt.shape[1]], prompt):
            answer = answer[:, prompt.shape[1] :]
        return str(self.processor.batch_decode(answer, skip_special_tokens=True)[0]).strip()

    def _inputs(self, question: str, image: torch.Tensor | None) -> Any:
        """The model's inputs, with batch size 1 and on its device."""
        has_template = getattr(self.processor, "chat_template", None) is not None
        if image is None:
            if has_template:
                message = [{"role": "user", "content": question}]
                question = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            inputs = self.processor(question, return_tensors="pt", add_special_tokens=not has_template)
            return inputs.to(self.device)
        pillow = to_pillow(image)
        if has_template:
            content = [{"type": "image", "image": pillow}, {"type": "text", "text": question}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            if self._prompt_token is not None:  # the prompt of LLaVA 1.5, whose older folders have no template
                question = f"USER: {self._prompt_token}\n{question} ASSISTANT:"
            inputs = self.processor(images=pillow, text=question or None, return_tensors="pt")
        return inputs.to(self.device, dtype=self.network.dtype)  # casts only floating-point tensors


@contextmanager
def load_language_model(path: str, kind: str) -> Iterator[LanguageModel]:
    """Load a model from a folder, and free its memory at the end.

    Args:
        path: a folder with config.json, *.safetensors, and the files of the tokenizer and, for images, the processor.
        kind: IMAGE_AND_TEXT or TEXT, as in transformers' pipelines.

    Raises:
        IdentityEditError: when the folder is missing, incomplete, or contains another kind of model.
    """
    is_visual = kind == IMAGE_AND_TEXT
    processor_file = " and preprocessor_config.json" if is_visual else ""
    read_config(path, f"{CONFIG}, the weights (*.safetensors), the tokenizer's files{processor_file}")
    if is_visual:
        check_preprocessor(path)

    def load() -> tuple[Any, Any]:
        import transformers

        network_class = transformers.AutoModelForImageTextToText if is_visual else transformers.AutoModelForCausalLM
        processor_class = transformers.AutoProcessor if is_visual else transformers.AutoTokenizer
        processor = processor_class.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if is_visual and not hasattr(processor, "image_processor"):
            # AutoProcessor falls back to the tokenizer.
            raise OSError("it has no processor for images with text")
        network = network_class.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, use_safetensors=True, torch_dtype="auto"
        )
        return network, processor

    with loaded(path, load, f" for {kind}", _MEMORY, _dtype) as (network, processor, device):
        yield LanguageModel(network, processor, path, device)


def _dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Compute dtype: as stored, but bfloat16 for float16 on a CPU, and float16 where bfloat16 is not supported."""
    if device.type == "cpu" and stored == torch.float16:
        return torch.bfloat16
    if device.type != "cpu" and stored == torch.bfloat16 and not supports_bfloat16(device):
        return torch.float16
    return stored


def _stop_when_interrupted(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A transformers stopping criterion, called after every token; it raises ComfyUI's interruption exception."""
    stop_if_interrupted()
    return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
