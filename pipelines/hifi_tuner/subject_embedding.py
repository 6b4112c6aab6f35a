"""A subject as learned text embeddings, and prompts with it (Wang et al. 2023, section 3.2).

There are two kinds. "output" is HiFi Tuner's: c_s replaces the last n rows of the text encoder's output for a prompt,
[c, c_s], the input of the network's cross-attention. For SDXL the rows contain both encoders' channels; for a prompt of
several chunks of 77 positions they are the last rows of the last chunk. "word" is textual inversion (Gal et al. 2022),
the paper's baseline: n word vectors per text encoder replace the subject's name in the prompt.

Besides the vectors shared by all timesteps, both kinds may have separate vectors for the timesteps of a DDIM run
(c_s^t, equation 7). The file format is described in `subject_files`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import engine
from ..engine.families.schedule import noise_levels
from ..shared.comfy_types import Clip, Model
from ..shared.conditioning import Conditioning, ordinary_copy, single_embedding
from ..shared.errors import IdentityEditError
from ..subjects.word_vectors import check_word_widths, mark_subject, with_word_vectors
from ..subjects.words import has_word, word_pattern
from ..text.step_embeddings import StepEmbeddings, apply_step_embeddings

OUTPUT, WORD = "output", "word"
KINDS = (OUTPUT, WORD)


@dataclass(frozen=True)
class SubjectEmbedding:
    """A learned subject.

    Attributes:
        kind: OUTPUT or WORD, see the top of this file.
        vectors: the shared vectors c_s [n, C] float32 CPU: "output" with the width of the model's text embeddings, or
            one entry per text encoder ("clip_l", "clip_g", "clip_h") with the width of its word vectors.
        step_vectors: c_s^t for each of N timesteps [N, n, C] float32 CPU, by the same names, or None.
        timesteps: the N timesteps, descending; empty without step vectors.
        class_word: the subject's class, such as "dog"; "" if unknown.
        token: the subject's rare token in prompts, or "". For the kind OUTPUT it is removed from prompts, because c_s
            replaces it; for the kind WORD the vectors are inserted in its place.
        model: tag of the model it was trained on; None for files from other programs.
        training: training metadata.
    """

    kind: str
    vectors: dict[str, torch.Tensor]
    step_vectors: dict[str, torch.Tensor] | None = None
    timesteps: tuple[int, ...] = ()
    class_word: str = ""
    token: str = ""
    model: engine.ModelTag | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise IdentityEditError(f"The kind of a subject is {self.kind!r}; choose {' or '.join(KINDS)}.")
        names = set(self.vectors)
        if not names or (self.kind == OUTPUT) != (names == {OUTPUT}):
            raise IdentityEditError(
                f"A subject of the kind {self.kind} cannot have vectors for {', '.join(sorted(names)) or 'nothing'}; "
                f"train it again."
            )
        steps = self.step_vectors or {}
        if steps and set(steps) != names or len(self.timesteps) != (len(next(iter(steps.values()))) if steps else 0):
            raise IdentityEditError("The subject's step-wise vectors do not match its timesteps; train it again.")
        if any(first <= second for first, second in zip(self.timesteps[:-1], self.timesteps[1:], strict=True)):
            raise IdentityEditError("The timesteps of the subject do not descend; train it again.")
        for name, shared in self.vectors.items():
            each = steps.get(name, shared[None])
            if shared.ndim != 2 or shared.shape[0] < 1 or each.shape[1:] != shared.shape:
                raise IdentityEditError(
                    f"The subject's vectors have the shapes {tuple(shared.shape)} and {tuple(each.shape)} instead of "
                    f"[tokens, channels] and [steps, tokens, channels]; train it again."
                )
            if not bool(torch.isfinite(shared).all() and torch.isfinite(each).all()):
                raise IdentityEditError(
                    f"The subject '{self.name}' contains NaN or infinite values; train it again with a lower learning "
                    f"rate."
                )

    @property
    def name(self) -> str:
        """The subject's name in prompts: token and class word."""
        return f"{self.token} {self.class_word}".strip()

    @property
    def tokens(self) -> int:
        """n, the number of rows or word vectors."""
        return max(int(shared.shape[0]) for shared in self.vectors.values())

    def at_step(self, index: int) -> SubjectEmbedding:
        """A subject with the vectors of timestep `timesteps[index]` as its shared vectors."""
        if self.step_vectors is None:
            return self
        vectors = {name: each[index] for name, each in self.step_vectors.items()}
        return dataclasses.replace(self, vectors=vectors, step_vectors=None, timesteps=())


def subject_conditioning(clip: Clip, subject: SubjectEmbedding, prompt: str) -> Conditioning:
    """Encode a prompt with a subject, like CLIP Text Encode, with the shared vectors.

    Args:
        clip: CLIP of the model.
        subject: the subject.
        prompt: names the subject by its token and class word, or by one of them; optional for the kind OUTPUT.
    """
    if clip is None:
        raise IdentityEditError("There is no CLIP; connect the checkpoint's CLIP.")
    if subject.kind == WORD:
        check_word_widths(clip, subject.vectors)
        marked = mark_subject(clip, subject.token, subject.class_word, subject.tokens, prompt)
        return clip.encode_from_tokens_scheduled(with_word_vectors(marked, subject.vectors))
    conditioning = clip.encode_from_tokens_scheduled(
        clip.tokenize(without_token(prompt, subject.token, subject.class_word))
    )
    rows = subject.vectors[OUTPUT]
    result: Conditioning = []
    for embedding, options in conditioning:
        _check_width(embedding.shape[-1], rows.shape[-1], subject)
        result.append([with_last_rows(embedding, rows), dict(options)])
    return result


def subject_table(model: Model, clip: Clip, subject: SubjectEmbedding, prompt: str) -> StepEmbeddings:
    """The step-wise embeddings [c, c_s^t] of a prompt (Wang et al. 2023, equation 7).

    Each noise level uses the row of the nearest trained timestep. A run with the trained schedule uses each row at its
    own step; other schedules and samplers with intermediate evaluations use the nearest row.

    Args:
        model: MODEL, for the noise levels of the timesteps.
        clip, prompt: see `subject_conditioning`.
        subject: one with step-wise vectors.

    Returns:
        N rows [1, T, C]; with their pooled outputs for the kind WORD in SDXL.

    Raises:
        IdentityEditError: when the subject has no step-wise vectors, or as in `subject_conditioning`.
    """
    if subject.step_vectors is None:
        raise IdentityEditError(
            f"The subject '{subject.name}' has no step-wise embeddings; train it with step-wise updates, or use it "
            f"without a table."
        )
    conditioning = subject_conditioning(clip, subject, prompt)
    embedding, _ = single_embedding(conditioning, "The prompt with the subject")
    pooled = None
    if subject.kind == OUTPUT:
        rows = ordinary_copy(subject.step_vectors[OUTPUT])
        with torch.inference_mode(False), torch.no_grad():
            embeddings = with_last_rows(embedding.expand(len(rows), -1, -1), rows)[:, None]
    else:
        parts = [
            single_embedding(subject_conditioning(clip, subject.at_step(index), prompt), "The prompt with the subject")
            for index in range(len(subject.timesteps))
        ]
        with torch.inference_mode(False), torch.no_grad():
            embeddings = torch.stack([part for part, _ in parts])
            each_pooled = [row for _, row in parts if row is not None]
            pooled = torch.stack(each_pooled) if len(each_pooled) == len(parts) else None
    return StepEmbeddings(sigmas=step_boundaries(model, subject.timesteps), embeddings=embeddings, pooled=pooled)


def step_boundaries(model: Model, timesteps: tuple[int, ...]) -> torch.Tensor:
    """[N + 1] descending sigmas that bound the N rows of `StepEmbeddings`: halfway between the timesteps.

    Raises:
        IdentityEditError: when the model has fewer timesteps.
    """
    sampling = engine.require(model, engine.Capability.DISCRETE_TIMESTEPS).sampling
    if timesteps[0] >= sampling.num_timesteps:
        raise IdentityEditError(
            f"The subject has embeddings up to timestep {timesteps[0]} but the model has {sampling.num_timesteps} "
            f"timesteps; use the model it was trained on."
        )
    halfway = [(first + second) // 2 for first, second in zip(timesteps[:-1], timesteps[1:], strict=True)]
    table = noise_levels(sampling)
    if table.shape[0] == sampling.num_timesteps:
        boundaries = table[[timesteps[0], *halfway]]
    else:  # interpolated between a distilled model's levels, and extrapolated below the lowest, where it is not used
        at = torch.tensor([timesteps[0], *halfway], dtype=torch.float32)
        lowest = float(sampling.timestep(sampling.sigmas[:1]))
        boundaries = sampling.sigma(at).detach().cpu().float() * ((at + 1.0) / (lowest + 1.0)).clamp(max=1.0)
    return torch.cat([boundaries, torch.zeros(1)])


def apply_subject(
    model: Model, clip: Clip, subject: SubjectEmbedding, prompt: str
) -> tuple[Model, Conditioning, str | None]:
    """A model and a CONDITIONING that generate the subject in the prompt's scene.

    Args:
        model: MODEL of the family that the subject was trained on.
        clip, subject, prompt: see `subject_conditioning`.

    Returns:
        a clone of the model with the step-wise embeddings on the positive side (`apply_step_embeddings`: any stock
        sampler and guider), the CONDITIONING with the shared ones for that side, and warnings or None.

    Raises:
        IdentityEditError: for another model family's subject, or as in `subject_conditioning`.
    """
    warnings = [check_model(model, subject)]
    conditioning = subject_conditioning(clip, subject, prompt)
    engine.check_prompt(model, conditioning, "The prompt")
    if subject.kind == OUTPUT:
        warnings.append(reach_warning(clip, without_token(prompt, subject.token, subject.class_word), subject.tokens))
        words = [word for word in (subject.token, subject.class_word) if word]
        if subject.class_word and not any(has_word(prompt, word) for word in words):
            warnings.append(f"The prompt does not name the subject; add '{subject.class_word}' to the prompt.")
    patched = model.clone()
    if subject.step_vectors is not None:
        patched = apply_step_embeddings(model, subject_table(model, clip, subject, prompt), "positive")
    return patched, conditioning, " ".join(warning for warning in warnings if warning) or None


def check_model(model: Model, subject: SubjectEmbedding) -> str | None:
    """Check that a subject can be used with a model.

    Returns:
        a warning if it was trained on another checkpoint, or None.

    Raises:
        IdentityEditError: when the model's text embeddings have another width.
    """
    channels = engine.require(model).text_width
    if subject.kind == OUTPUT:
        _check_width(channels, subject.vectors[OUTPUT].shape[-1], subject)
    if subject.model is None:
        return None
    difference = engine.model_tag(model).difference(subject.model)
    if difference is None:
        return None
    return f"The subject was trained on another checkpoint ({difference}); it may look less like itself."


def reach_warning(clip: Clip, prompt: str, rows: int) -> str | None:
    """A warning if a prompt's words or end token are in the last `rows` positions, which c_s replaces, or None."""
    longest = max(_last_word(chunks[-1]) for chunks in clip.tokenize(prompt, return_word_ids=True).values())
    positions = max(len(chunks[-1]) for chunks in clip.tokenize(prompt).values())
    most = positions - rows - 2  # start and end token
    if longest <= most:
        return None
    return (
        f"The prompt has {longest} tokens in its last {positions} positions, of which the subject uses the last "
        f"{rows}; shorten it to {most}, or words are lost."
    )


def _last_word(chunk: list[tuple[Any, float, int]]) -> int:
    """Position of a chunk's last word; start, end and padding tokens have ComfyUI's word id 0."""
    return max((position for position, (_, _, word) in enumerate(chunk) if word != 0), default=0)


# -- prompts -----------------------------------------------------------------------------------------------------------


def without_token(prompt: str, token: str, class_word: str) -> str:
    """The prompt with only the class word as the subject's name: "a sks cat" and "a sks" become "a cat"."""
    if not token:
        return prompt
    if class_word:
        prompt = re.sub(rf"{word_pattern(token)}\s+(?={word_pattern(class_word)})", "", prompt, flags=re.IGNORECASE)
    return re.sub(word_pattern(token), lambda _: class_word, prompt, flags=re.IGNORECASE)


def with_last_rows(embedding: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[c, c_s]: embeddings [B, T, C] with their last n rows replaced by `rows` [n, C] or [B, n, C].

    Raises:
        IdentityEditError: when there are fewer positions than rows.
    """
    count = rows.shape[-2]
    if count >= embedding.shape[1]:
        raise IdentityEditError(
            f"The subject has {count} rows but the text embedding only {embedding.shape[1]}; use the checkpoint's CLIP."
        )
    rows = rows.to(embedding).expand(embedding.shape[0], -1, -1)
    return torch.cat([embedding[:, :-count], rows], dim=1)


def _check_width(takes: int, has: int, subject: SubjectEmbedding) -> None:
    if takes != has:
        raise IdentityEditError(
            f"The subject '{subject.name}' was trained for text embeddings of {has} channels but this checkpoint has "
            f"{takes}; use a checkpoint of the family it was trained on."
        )
