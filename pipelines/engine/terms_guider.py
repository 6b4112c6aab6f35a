"""A guider whose rule is a function of any number of conditionings' estimates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch

from ..conditioning import Conditioning

POSITIVE, NEGATIVE = "positive", "negative"
"""Names that ComfyUI gives a meaning: control networks of the positive side that are meant for all reach the others."""

Combine = Callable[[dict[str, torch.Tensor]], torch.Tensor]
_KEY = "identity_edit_terms"


class TermsGuider(comfy.samplers.CFGGuider):
    """Evaluates several conditionings in as few calls as memory allows and combines what the network says.

    ComfyUI's `calc_cond_batch` puts into one call what has the same shapes and fits into the free memory. Functions of
    other nodes that run after the guidance ("post CFG") run after this one too; those that take the rule's place
    ("sampler_cfg_function", as RescaleCFG) do not, since the rule is this guider's own.

    Attributes:
        evaluations: network evaluations of the last run, one for each conditioning and step.
        calls: calls of the network in which they were made.
    """

    def __init__(self, model: Any, conditionings: dict[str, Conditioning | None], combine: Combine) -> None:
        """
        Args:
            model: MODEL; a clone is used.
            conditionings: by name, in an order that never changes, POSITIVE and NEGATIVE first: attention patches know
                sides by their number. None is not evaluated.
            combine: gives the guided estimate of z_0 from those of the conditionings [B, C, H, W] by name.
        """
        super().__init__(model.clone())
        self._names = list(conditionings)
        self._combine = combine
        self.evaluations = 0
        self.calls = 0
        marked = {}
        for name, conditioning in conditionings.items():
            if conditioning is not None:
                kind = {} if name == POSITIVE else {"prompt_type": NEGATIVE}
                marked[name] = [[embedding, {**options, **kind}] for embedding, options in conditioning]
        self.inner_set_conds(marked)

    def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """ComfyUI's, with the count of evaluations for this run."""
        self.evaluations = self.calls = 0
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        self.model_patcher.remove_wrappers_with_key(kind, _KEY)
        self.model_patcher.add_wrapper_with_key(kind, _KEY, self._count)
        try:
            return super().sample(*args, **kwargs)
        finally:
            self.model_patcher.remove_wrappers_with_key(kind, _KEY)  # it holds this guider, which holds the model
            logging.info("IdentityEdit: %s network evaluations in %s calls", self.evaluations, self.calls)

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> torch.Tensor:
        """Called by ComfyUI inside the PREDICT_NOISE wrappers; x and result [B, C, H, W], timestep [B] sigmas."""
        options = model_options or {}
        conds = [self.conds.get(name) for name in self._names]
        outputs = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        estimates = {
            name: output for name, cond, output in zip(self._names, conds, outputs, strict=True) if cond is not None
        }
        result = self._combine(estimates)
        for function in options.get("sampler_post_cfg_function", []):
            result = function(
                {
                    "denoised": result,
                    "cond": self.conds.get(POSITIVE),
                    "uncond": self.conds.get(NEGATIVE),
                    "cond_scale": 1.0,
                    "model": self.inner_model,
                    "uncond_denoised": estimates.get(NEGATIVE, result),
                    "cond_denoised": estimates.get(POSITIVE, result),
                    "sigma": timestep,
                    "model_options": options,
                    "input": x,
                }
            )
        return result

    def _count(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """APPLY_MODEL wrapper: a batch of several conditionings counts as so many evaluations."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict) and "cond_or_uncond" in value:
                self.evaluations += len(value["cond_or_uncond"])
                self.calls += 1
                break
        return executor(*args, **kwargs)
