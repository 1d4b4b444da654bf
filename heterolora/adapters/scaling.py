"""What the product of an adapter's factors is multiplied with: one rule for all sites, in all families."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from heterolora.errors import SettingError
from heterolora.sites import Kind, Site


@dataclass(frozen=True)
class Scaling:
    """The scale of adapters, and their dropout.

    Args:
        scaling: ``constant`` (the same scale whatever the rank), ``alpha_over_r`` (LoRA's own rule) or
            ``alpha_over_sqrt_r`` (rsLoRA, arXiv 2312.03732); under the last two, ``scale`` is alpha.
        scale: the scale, or alpha; one number, or one for each kind of site, e.g. ``{lora: 2.0, shortcut: 1.0}``.
        dropout: probability with which an adapter's input feature is dropped in training.
    """

    scaling: Literal["constant", "alpha_over_r", "alpha_over_sqrt_r"]
    scale: float | Mapping[str, float]
    dropout: float

    def __post_init__(self) -> None:
        scales = self.scale if isinstance(self.scale, Mapping) else {"scale": self.scale}
        if not scales or not all(math.isfinite(value) and value != 0 for value in scales.values()):
            raise SettingError("scale", self.scale, "a finite number other than 0")
        if isinstance(self.scale, Mapping) and (unknown := sorted(self.scale.keys() - set(get_args(Kind)))):
            raise SettingError("scale", unknown, f"no such kinds of site; possible: {list(get_args(Kind))}")
        if not 0 <= self.dropout < 1:
            raise SettingError("dropout", self.dropout, "a probability from 0 up to, not including, 1")

    def scale_at(self, site: Site, rank: int) -> float:
        """Factor of the product of the factors at this site and rank."""
        if isinstance(self.scale, Mapping):
            if site.kind not in self.scale:
                raise SettingError(
                    "adapter.scale", dict(self.scale), f"a scale for sites of kind {site.kind} is missing"
                )
            alpha = self.scale[site.kind]
        else:
            alpha = self.scale
        return alpha / {"constant": 1.0, "alpha_over_r": rank, "alpha_over_sqrt_r": math.sqrt(rank)}[self.scaling]
