"""What an experiment does to a run that no key of the recipe asks for; and optimizers of other libraries in its loop.

A variant turns the `Run` of a trial into another one, in a process of its own. None of them is for users: lion, sgd
and soap are baselines, update_norm is a rule that the paper tried and left, shards_alone is the mistake that experiment
1 plants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import distmuon
from distmuon.integrations.heads import QKClip
from launch.run import Run


class RecipeFace:
    """What the recipe's loop asks of an optimizer beside torch's contract; one process. For `class Rival(RecipeFace,
    torch.optim.X)`."""

    param_groups: list[dict[str, Any]]
    overflow = False

    def set_requires_gradient_sync(self, _: bool) -> None:
        """There is nobody to synchronize with."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        grads = [param for group in self.param_groups for param in group["params"]]
        self._norm = nn.utils.clip_grad_norm_(grads, max_norm)
        return self._norm

    def telemetry(self) -> None:
        return None

    def metrics(self) -> dict[str, Any]:
        known: dict[str, Any] = {"skipped_steps": 0, "stage_ms": {}, "bytes": {}, "calls": {}, "ns_matrices": 0}
        return {**known, "state_bytes": 0, "grad_norm": float(self._norm)}

    def report(self, full: bool = False) -> str:
        return f"{type(self).__mro__[2].__name__} for all parameters"


class Rival(Run):
    """A run whose optimizer is another library's, on all parameters, with the recipe's lr and weight decay."""

    make: Callable[..., torch.optim.Optimizer]
    extra: dict[str, Any]

    def optimizer(self, **_: Any) -> Any:
        given = self.config.optimizer
        params = [{"params": list(self.model.parameters()), "rule": self.trainer}]
        return self.make(params, lr=given.lr, weight_decay=given.weight_decay, **self.extra)


def _rival(run: Run, cls: type, **extra: Any) -> Run:
    found = Rival(**vars(run))
    found.make, found.extra = type("Adapted", (RecipeFace, cls), {}), extra
    return found


def sgd(run: Run) -> Run:
    """SGD with Nesterov's momentum; its weight decay is part of the gradient, as torch has it."""
    return _rival(run, torch.optim.SGD, momentum=0.9, nesterov=True)


def lion(run: Run) -> Run:
    from pytorch_optimizer import Lion

    return _rival(run, Lion, betas=(0.9, 0.95))


def soap(run: Run) -> Run:
    from pytorch_optimizer import SOAP

    return _rival(run, SOAP, betas=(0.95, 0.95), precondition_frequency=10)


class Clipped(Run):
    """A run with QK-clip."""

    threshold = 30.0

    def optimizer(self, **options: Any) -> distmuon.DistMuon:
        made = super().optimizer(**options)
        QKClip(self.model, made, threshold=self.threshold)
        return made


def qk_clip(run: Run) -> Run:
    """QK-clip at a threshold that small models reach."""
    return Clipped(**vars(run))


def update_norm(run: Run) -> Run:
    """Scale each polar factor to the RMS that an exact one has: "Update Norm" of the paper's table 1."""
    from distmuon.step.bucket import Bucket

    plain = Bucket._orthogonalize

    def normalized(bucket: Bucket, key: Any, stack: Tensor, step: Any) -> Tensor:
        polar = plain(bucket, key, stack, step)
        rms = polar.float().square().mean(dim=(1, 2), keepdim=True).sqrt()
        return (polar / (rms * math.sqrt(max(polar.shape[1:])))).to(polar.dtype)

    setattr(Bucket, "_orthogonalize", normalized)  # noqa: B010  (mypy forbids the assignment)
    return run


def shards_alone(run: Run) -> Run:
    """Orthogonalize each of four shards by rows by itself, as if local tensors were matrices."""
    from distmuon.step import bucket

    whole = bucket.orthogonalize  # type: ignore[attr-defined]

    def alone(stack: Tensor, **how: Any) -> Tensor:
        shards = stack.chunk(4, dim=1)
        # the caller scales by the shape of the whole
        scales = [math.sqrt(max(shard.shape[1:]) / max(stack.shape[1:])) for shard in shards]
        return torch.cat([whole(shard.contiguous(), **how) * scale for shard, scale in zip(shards, scales)], dim=1)

    setattr(bucket, "orthogonalize", alone)  # noqa: B010  (mypy forbids the assignment)
    return run


def plain(run: Run) -> Run:
    return run


VARIANTS: dict[str, Callable[[Run], Run]] = {
    "": plain,
    "sgd": sgd,
    "lion": lion,
    "soap": soap,
    "qk_clip": qk_clip,
    "update_norm": update_norm,
    "shards_alone": shards_alone,
}
