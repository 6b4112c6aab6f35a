"""Datasets of generated pairs: plan and generation (Chen et al. 2024, section 3.2 and supplement 1.1).

Which edit, subject, pose and noise a pair has depends on the seed and the pair's number alone, so that any part of a
dataset can be made anywhere, in any order, and again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import engine
from ..engine.host import stock_noise
from ..networks.image_encoders import encoder_of_clip_vision
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError
from ..shared.images import matched_images
from ..shared.parsing import as_range
from .identity_words import IdentityWords, identity_conditioning, identity_vectors
from .pair_folder import PairFolder
from .pair_guidance import GUIDANCE_SCALE, SHARED_WEIGHT, SOURCE_WEIGHT, TARGET_WEIGHT, doubled, halves, pair_guider

SUBJECT = "{subject}"
NAME_MARK = "|"
SHARED_PROMPT = f"the same {SUBJECT} on the left and right"
EDITS = f"""\
santa costume: a {SUBJECT}, normal costume -> a {SUBJECT}, Santa Claus costume
flower costume: a {SUBJECT}, normal costume -> a {SUBJECT}, cute flower costume
sheep costume: a {SUBJECT}, normal costume -> a {SUBJECT}, cute white sheep costume
royal costume: a {SUBJECT}, normal costume -> a {SUBJECT}, traditional golden palace costume"""
"""p, and p_a -> p_b, of Chen et al. 2024, supplement 1.1; their expressions are angry, shocked, laughing and crying."""
SUBJECTS = "man\nwoman"
VALIDATION_SHARE = 0.05
ATTEMPTS = 4

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Edit:
    """One editing direction: its name, and the prompts p_a and p_b with "{subject}" in them."""

    name: str
    source: str
    target: str


@dataclass(frozen=True)
class PairSettings:
    """Settings of a dataset.

    Attributes:
        count: N pairs.
        edits: each gets as many pairs as the others, within one.
        subjects: [X]; one is drawn for each pair, or that of its identity image where there are as many. "words |
            name" is drawn by the words and called by the name in the dataset, so that the edits are not learned for
            people of that description alone.
        shared_prompt: p, with "{subject}" in it.
        negative_prompt: of the classifier-free guidance.
        seed: of all draws.
        width, height: of one image in pixels, multiples of 8 (of 16 for Flux.2).
        validation_share: share of the pairs (of the identity images, where there are any) that are for validation.
        guidance_scale, shared_weight, source_weight, target_weight: see `pair_guidance.pair_guider`.
        smallest_similarity: cosine similarity of the two images' CLIP image embeddings below which a pair is not
            kept; 0 keeps all.
        attempts: noises that are tried for a pair until one passes.
    """

    count: int
    edits: tuple[Edit, ...]
    subjects: tuple[str, ...]
    shared_prompt: str = SHARED_PROMPT
    negative_prompt: str = ""
    seed: int = 0
    width: int = 512
    height: int = 512
    validation_share: float = VALIDATION_SHARE
    guidance_scale: float = GUIDANCE_SCALE
    shared_weight: float = SHARED_WEIGHT
    source_weight: float = SOURCE_WEIGHT
    target_weight: float = TARGET_WEIGHT
    smallest_similarity: float = 0.0
    attempts: int = ATTEMPTS

    def __post_init__(self) -> None:
        if self.count < 1:
            raise IdentityEditError(f"count is {self.count}; choose 1 or more.")
        if not self.subjects:
            raise IdentityEditError("subjects is empty; write one per line, such as 'man' and 'woman'.")
        for subject in self.subjects:
            if not all(part.strip() for part in subject.split(NAME_MARK)) or subject.count(NAME_MARK) > 1:
                raise IdentityEditError(f"The subject '{subject}' cannot be read; write 'words' or 'words | name'.")
        if not self.edits:
            raise IdentityEditError("edits is empty; write one per line, as 'name: source prompt -> target prompt'.")
        names = [edit.name for edit in self.edits]
        if len(set(names)) != len(names):
            raise IdentityEditError(f"Two edits are called {max(names, key=names.count)}; give each its own name.")
        if not 0.0 <= self.validation_share < 1.0:
            raise IdentityEditError(f"validation_share is {self.validation_share}; choose a share from 0 to below 1.")
        if self.attempts < 1:
            raise IdentityEditError(f"attempts is {self.attempts}; choose 1 or more.")


@dataclass(frozen=True)
class PairPlan:
    """Plan of one pair: the prompts that draw it, and the prompts recorded in the dataset. `identity` and `pose` are
    image numbers, or None."""

    number: int
    edit: str
    subject: str
    split: str
    shared_prompt: str
    drawn_source_prompt: str
    drawn_target_prompt: str
    source_prompt: str
    target_prompt: str
    identity: int | None
    pose: int | None


@dataclass(frozen=True)
class Identities:
    """People of the pairs: an identity encoder, features [M, N, C] of M portraits, and the class word in front of which
    the words are inserted ("" for the subject itself)."""

    words: IdentityWords
    features: torch.Tensor
    class_word: str = ""


@dataclass(frozen=True)
class Poses:
    """A ControlNet and pose images [K, H, W, 3]; both halves of a pair get the same pose."""

    control_net: Any
    images: torch.Tensor
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0


@dataclass
class PairsMade:
    """Result of a run: new pairs, existing pairs, rejected pairs, and model calls."""

    made: int = 0
    present: int = 0
    rejected: int = 0
    evaluations: int = 0


def parse_edits(text: str) -> tuple[Edit, ...]:
    """Parse edits, one per line: "name: source prompt -> target prompt". Empty lines and those after # are ignored.

    Raises:
        IdentityEditError: naming the line that cannot be read.
    """
    edits = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, prompts = line.partition(":")
        source, arrow, target = prompts.partition("->")
        if not (colon and arrow and name.strip() and source.strip() and target.strip()):
            raise IdentityEditError(f"The edit '{line}' cannot be read; write 'name: source prompt -> target prompt'.")
        edits.append(Edit(name.strip(), source.strip(), target.strip()))
    return tuple(edits)


def parse_part(text: str, count: int) -> range:
    """The pairs of a shard: "" is all of them, "12" one, "100-199" those from 100 to 199, both inclusive.

    Raises:
        IdentityEditError: when it names no part of `count` pairs.
    """
    if not text.strip():
        return range(count)
    ends = as_range(text)
    if ends is None or not ends[0] <= ends[1] < count:
        raise IdentityEditError(
            f"part is '{text}'; write a pair's number or two with a dash between them, from 0 to {count - 1}."
        )
    return range(ends[0], ends[1] + 1)


def plan(settings: PairSettings, number: int, identities: int = 0, poses: int = 0) -> PairPlan:
    """The plan of pair `number`, drawn from the given numbers of identity images and poses."""
    generator = random.Random(f"pair {settings.seed} {number}")
    edit = settings.edits[number % len(settings.edits)]
    identity = generator.randrange(identities) if identities else None
    pose = generator.randrange(poses) if poses else None
    subject = generator.choice(settings.subjects)
    if identity is not None and len(settings.subjects) == identities:
        subject = settings.subjects[identity]
    # Nobody is in both splits.
    of_split = f"pair {number}" if identity is None else f"identity {identity}"
    is_validation = random.Random(f"split {settings.seed} {of_split}").random() < settings.validation_share

    subject, bar, name = (part.strip() for part in subject.partition(NAME_MARK))

    def filled(prompt: str, subject: str) -> str:
        return " ".join(prompt.replace(SUBJECT, subject).split())

    return PairPlan(
        number=number,
        edit=edit.name,
        subject=subject,
        split=VALIDATION if is_validation else TRAIN,
        shared_prompt=filled(settings.shared_prompt, subject),
        drawn_source_prompt=filled(edit.source, subject),
        drawn_target_prompt=filled(edit.target, subject),
        source_prompt=filled(edit.source, name if bar else subject),
        target_prompt=filled(edit.target, name if bar else subject),
        identity=identity,
        pose=pose,
    )


def noise_seed(settings: PairSettings, number: int, attempt: int) -> int:
    """The seed of a pair's noise, different for each attempt."""
    digest = hashlib.sha256(f"noise {settings.seed} {number} {attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generate_pairs(
    model: Any,
    clip: Any,
    vae: Any,
    sampler: Any,
    sigmas: torch.Tensor,
    folder: PairFolder,
    settings: PairSettings,
    *,
    identities: Identities | None = None,
    poses: Poses | None = None,
    clip_vision: Any | None = None,
    numbers: Iterable[int] | None = None,
    progress: Callable[[int, int, torch.Tensor | None], None] | None = None,
) -> PairsMade:
    """Generate the missing pairs.

    Args:
        model, clip, vae: of a checkpoint that draws such images.
        sampler, sigmas: ComfyUI's SAMPLER and SIGMAS.
        folder: where they go.
        settings: what is made.
        identities, poses: what the pairs are conditioned on, beside their prompts.
        clip_vision: CLIP_VISION for `settings.smallest_similarity`.
        numbers: which pairs to make; all of them by default.
        progress: called after every pair with how many are done, of how many, and the pair side by side [H, 2W, 3].

    Raises:
        IdentityEditError: when an input cannot be used, or a pair cannot be written; what was made is kept.
    """
    if settings.smallest_similarity > 0.0 and clip_vision is None:
        raise IdentityEditError(
            "smallest_similarity is above 0 but there is no clip_vision; connect one, or set it to 0."
        )
    pixels = engine.pixels_per_latent_pixel(model)
    for name, size in (("width", settings.width), ("height", settings.height)):
        if size < pixels or size % pixels:
            raise IdentityEditError(f"{name} is {size}; choose a multiple of {pixels}.")
    wanted = list(numbers if numbers is not None else range(settings.count))
    folder.claim(_description(model, sigmas, settings, identities, poses))
    finished, rejected = folder.finished(), folder.rejected()
    done = PairsMade(present=sum(number in finished for number in wanted))
    done.rejected = sum(number in rejected for number in wanted)
    counts = (
        0 if identities is None else len(identities.features),
        0 if poses is None else len(poses.images),
    )
    encode = _encoder(clip, identities)
    draw = partial(_draw, model, vae, sampler, sigmas, settings)
    features = None if clip_vision is None else encoder_of_clip_vision(clip_vision)
    try:
        for place, number in enumerate(wanted):
            image = None
            if number not in finished and number not in rejected:
                pair = plan(settings, number, *counts)
                shown = pair.shared_prompt, pair.drawn_source_prompt, pair.drawn_target_prompt
                prompts = [*(encode(prompt, pair) for prompt in shown), encode(settings.negative_prompt)]
                if poses is not None and pair.pose is not None:
                    prompts = with_pose(poses, pair.pose, vae, prompts)
                guider = pair_guider(
                    model,
                    *prompts,
                    guidance_scale=settings.guidance_scale,
                    shared_weight=settings.shared_weight,
                    source_weight=settings.source_weight,
                    target_weight=settings.target_weight,
                )
                source, target, facts = _make(settings, pair, partial(draw, guider), features)
                done.evaluations += guider.evaluations
                if settings.smallest_similarity == 0.0 or facts["similarity"] >= settings.smallest_similarity:
                    done.made += folder.add(number, source, target, facts)
                else:
                    folder.reject(number, facts)
                    done.rejected += 1
                image = torch.cat([source, target], dim=1)
            if progress is not None:
                progress(place + 1, len(wanted), image)
    except BaseException:
        with contextlib.suppress(IdentityEditError):  # the index can be made again; what stopped the run is said
            folder.write_index()
        raise
    folder.write_index()
    return done


def _encoder(clip: Any, identities: Identities | None) -> Callable[..., Conditioning]:
    """A function that encodes a prompt: with a pair's identity words, or plain (once per prompt)."""
    texts: dict[str, Conditioning] = {}
    words = None if identities is None else identity_vectors(identities.words, identities.features)

    def encode(prompt: str, pair: PairPlan | None = None) -> Conditioning:
        if identities is not None and words is not None and pair is not None and pair.identity is not None:
            vectors = {name: each[pair.identity : pair.identity + 1] for name, each in words.items()}
            return identity_conditioning(clip, vectors, prompt, identities.class_word or pair.subject)
        if prompt not in texts:
            texts[prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return texts[prompt]

    return encode


def _draw(
    model: Any,
    vae: Any,
    sampler: Any,
    sigmas: torch.Tensor,
    settings: PairSettings,
    guider: engine.CombiningGuider,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target [H, W, 3] from the noise of a seed."""
    pixels = engine.pixels_per_latent_pixel(model)
    height, width = settings.height // pixels, 2 * (settings.width // pixels)
    frames = (1,) if engine.has_frames(model) else ()
    latent = torch.zeros(1, engine.latent_channels(model), *frames, height, width)
    noise = stock_noise(latent, seed)
    sampled = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)
    decoded = vae.decode(sampled)
    source, target = halves(decoded.flatten(0, -4), 2, "The pair")  # a VAE with frames returns [1, 1, H, W, 3]
    return source[0], target[0]


def _make(
    settings: PairSettings,
    pair: PairPlan,
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    features: Callable[[list[torch.Tensor]], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The first attempt that passes the similarity check, or the last one: source and target [H, W, 3], and the
    description."""
    similarity = None
    for attempt in range(settings.attempts if settings.smallest_similarity > 0.0 else 1):
        seed = noise_seed(settings, pair.number, attempt)
        source, target = draw(seed)
        if features is not None:
            first, second = torch.nn.functional.normalize(features([source, target]), dim=-1)
            similarity = round(float(first @ second), 4)
            if similarity >= settings.smallest_similarity:
                break
    facts = {name: value for name, value in dataclasses.asdict(pair).items() if name != "number"}
    facts |= {"seed": seed, "attempt": attempt, "similarity": similarity}
    return source, target, {**facts, "smallest_similarity": settings.smallest_similarity}


def save_pairs(
    folder: PairFolder,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    source_prompt: str,
    target_prompt: str,
    edit: str,
    validation_share: float = VALIDATION_SHARE,
) -> list[int]:
    """Add pairs that were made elsewhere under the next free numbers.

    Args:
        folder: the dataset.
        source, target: as `images.matched_images` takes them.
        source_prompt, target_prompt: p_a and p_b.
        edit: its name.
        validation_share: share of the pairs that is for validation, drawn from their numbers.

    Returns:
        the numbers.

    Raises:
        IdentityEditError: when the images do not belong together, or cannot be written.
    """
    source, target, _ = matched_images(source, target, ("source", "target"))
    used = {*folder.finished(), *folder.rejected()}
    numbers = []
    for before, after in zip(source, target, strict=True):
        number = max(used, default=-1) + 1
        while True:
            is_validation = random.Random(f"split {number}").random() < validation_share
            facts = {
                "edit": edit,
                "split": VALIDATION if is_validation else TRAIN,
                "source_prompt": source_prompt,
                "target_prompt": target_prompt,
            }
            if folder.add(number, before, after, facts):
                break
            number += 1  # another process took it
        used.add(number)
        numbers.append(number)
    folder.write_index()
    return numbers


def with_pose(poses: Poses, number: int, vae: Any, conditionings: list[Conditioning]) -> list[Conditioning]:
    """The conditionings with a pose on both halves, as ComfyUI's Apply ControlNet does it, by one ControlNet for
    all of them, so that they are still evaluated in one call."""
    hint = doubled(poses.images[number : number + 1, ..., :3]).movedim(-1, 1)
    control = poses.control_net.copy().set_cond_hint(
        hint, poses.strength, (poses.start_percent, poses.end_percent), vae=vae
    )
    return [
        [[embedding, {**options, "control": control, "control_apply_to_uncond": False}] for embedding, options in each]
        for each in conditionings
    ]


def _description(
    model: Any, sigmas: torch.Tensor, settings: PairSettings, identities: Identities | None, poses: Poses | None
) -> dict[str, Any]:
    """The dataset's description; it contains the model as a hash of its tag."""
    weights = ", ".join(f"{weight:.3g}" for weight in engine.model_tag(model).weights)
    found: dict[str, Any] = {
        **dataclasses.asdict(settings),
        "model": hashlib.sha256(weights.encode()).hexdigest()[:16],
        "sigmas": [round(float(sigma), 4) for sigma in sigmas],
    }
    found["identity_words"] = None
    if identities is not None:
        found["identity_words"] = {
            "training": identities.words.training.get("run"),
            "images": len(identities.features),
            "class_word": identities.class_word,
        }
    found["poses"] = None
    if poses is not None:
        found["poses"] = {
            "images": len(poses.images),
            "strength": poses.strength,
            "start_percent": poses.start_percent,
            "end_percent": poses.end_percent,
        }
    return found
