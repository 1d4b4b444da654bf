"""What trained adapters and allocations look like: pure functions of tensors and numbers.

None of them asks what kind a site is; where families are told apart, the caller hands over a label for each site.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from heterolora.errors import SettingError


@dataclass(frozen=True)
class Spectrum:
    """The trained map ``scale * B A`` of one site.

    Attributes:
        values: its singular values, largest first; at most as many as the adapter has rank.
        effective_rank: see ``effective_rank``.
        stable_rank: see ``stable_rank``.
        norm: Frobenius norm.
    """

    values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    norm: float


def spectrum(a: torch.Tensor, b: torch.Tensor, scale: float) -> Spectrum:
    """Everything that is reported of one adapter; arguments as for ``singular_values``."""
    values = tuple(singular_values(a, b, scale).tolist())
    return Spectrum(values, effective_rank(values), stable_rank(values), math.hypot(*values))


def singular_values(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Singular values of ``scale * B A``, without forming the product.

    With ``A^T = Q_A R_A`` and ``B = Q_B R_B`` the product is ``Q_B (R_B R_A^T) Q_A^T``, so that they are those of the
    small core ``R_B R_A^T``.

    Args:
        a: ``[rank, in]``, of any floating dtype, on any device.
        b: ``[out, rank]``.
        scale: factor of the product.

    Returns:
        ``[min(rank, in, out)]`` in float64 on the CPU, largest first.

    Raises:
        SettingError: if the shapes do not fit, or a factor is not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise SettingError("factors", [list(a.shape), list(b.shape)], "A [rank, in] and B [out, rank]")
    down, up = (factor.detach().to("cpu", torch.float64) for factor in (a, b))
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise SettingError("factors", "NaN or infinite", "finite numbers")
    core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
    values: torch.Tensor = torch.linalg.svdvals(core)
    return values * abs(scale)


def effective_rank(values: Sequence[float]) -> float:
    """``exp(-sum p ln p)`` with ``p = values / sum(values)`` (Roy and Vetterli 2007): how many directions are used.

    Args:
        values: singular values, in any order.

    Returns:
        From 1 (one direction) to their number (all alike); 0 if all are 0, or there are none.

    Raises:
        SettingError: if a value is negative or not finite.
    """
    shares = _shares("values", values)
    return math.exp(_entropy(shares)) if shares else 0.0


def stable_rank(values: Sequence[float]) -> float:
    """Squared Frobenius norm over squared spectral norm: from 1 to the rank, and little moved by small values.

    Args:
        values: singular values, in any order.

    Returns:
        0 if all are 0, or there are none.

    Raises:
        SettingError: if a value is negative or not finite.
    """
    _check("values", values)
    largest = max(values, default=0.0)
    return math.fsum((value / largest) ** 2 for value in values) if largest else 0.0


def gini(amounts: Sequence[float]) -> float:
    """Gini coefficient: mean absolute difference of all pairs over twice the mean.

    Args:
        amounts: what each place gets, places that get nothing included.

    Returns:
        0 if all get the same, (n - 1) / n if one of n gets everything; NaN if nothing is given to anybody.

    Raises:
        SettingError: if an amount is negative or not finite.
    """
    _check("amounts", amounts)
    whole, n = math.fsum(amounts), len(amounts)
    if not whole:
        return math.nan
    weighted = math.fsum((2 * place - n - 1) * amount for place, amount in enumerate(sorted(amounts), 1))
    return weighted / (n * whole)


def evenness(amounts: Sequence[float]) -> float:
    """Shannon entropy of the shares over its largest possible value, ``ln n`` (Pielou's evenness).

    Args:
        amounts: what each place gets, places that get nothing included.

    Returns:
        1 if all get the same, 0 if one gets everything; NaN if nothing is given, or if there is one place alone.

    Raises:
        SettingError: if an amount is negative or not finite.
    """
    shares = _shares("amounts", amounts)
    return _entropy(shares) / math.log(len(amounts)) if shares and len(amounts) > 1 else math.nan


def site_frequency(
    decisions: Sequence[Mapping[str, int]], durations: Sequence[float] | None = None
) -> dict[str, float]:
    """How often each site was switched on in the course of a dynamic run.

    Args:
        decisions: site -> rank, one mapping for each decision.
        durations: how long each decision was in force, in any unit; None: all as long.

    Returns:
        Site -> share from 0 to 1, in order of first appearance; a site that a decision does not name had no rank.

    Raises:
        SettingError: if there is no decision, or the durations do not fit.
    """
    weights = [1.0] * len(decisions) if durations is None else list(durations)
    if len(weights) != len(decisions):
        raise SettingError("durations", weights, f"one for each of {len(decisions)} decisions")
    _check("durations", weights)
    whole = math.fsum(weights)
    if not whole:
        raise SettingError("decisions", len(decisions), "at least one decision that was in force for some time")
    names = dict.fromkeys(name for ranks in decisions for name in ranks)
    return {
        name: math.fsum(weight for ranks, weight in zip(decisions, weights, strict=True) if ranks.get(name, 0)) / whole
        for name in names
    }


def shares_by_label(
    decisions: Sequence[Mapping[str, int]], units: Mapping[str, int], labels: Mapping[str, str]
) -> dict[str, list[float]]:
    """Which share of the parameters lies at the sites of each label, decision by decision.

    Args:
        decisions: site -> rank, one mapping for each decision.
        units: site -> parameters of one unit of rank.
        labels: site -> its family or group, e.g. the search space's ``groups``.

    Returns:
        Label -> one share for each decision, which add up to 1; NaN where a decision gives no rank to any site.

    Raises:
        SettingError: if a site has no unit or no label.
    """
    if missing := sorted({name for ranks in decisions for name in ranks} - (units.keys() & labels.keys())):
        raise SettingError("sites", missing, "no cost or no label is known of these")
    found: dict[str, list[float]] = {label: [] for label in dict.fromkeys(labels.values())}
    for ranks in decisions:
        spent = dict.fromkeys(found, 0)
        for name, rank in ranks.items():
            spent[labels[name]] += rank * units[name]
        whole = sum(spent.values())
        for label, parameters in spent.items():
            found[label].append(parameters / whole if whole else math.nan)
    return found


def _shares(name: str, amounts: Sequence[float]) -> list[float]:
    """Each over their sum; empty if the sum is 0."""
    _check(name, amounts)
    largest = max(amounts, default=0.0)
    if not largest:
        return []
    scaled = [amount / largest for amount in amounts]  # sums of very large or very small numbers stay finite
    whole = math.fsum(scaled)
    return [amount / whole for amount in scaled]


def _entropy(shares: Sequence[float]) -> float:
    return -math.fsum(share * math.log(share) for share in shares if share)


def _check(name: str, amounts: Sequence[float]) -> None:
    if wrong := [amount for amount in amounts if not (math.isfinite(amount) and amount >= 0)]:
        raise SettingError(name, wrong[:3], "finite numbers of at least 0")
