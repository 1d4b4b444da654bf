"""How well scores agree with what training found: from the rows of the table and the scores to one tidy frame.

Pure functions. A result is a ``cost`` throughout, so less is better: the validation loss, or minus the accuracy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats  # type: ignore[import-untyped]

from heterolora.allocators.base import GainRule
from heterolora.errors import SettingError
from heterolora.proxies.base import Score, total
from heterolora.sites import Site
from heterolora.statistics import Estimate, holm, mean, rank_correlation, top_overlap

Scores: TypeAlias = Mapping[str, Mapping[int, Mapping[str, Score]]]
"""Proxy -> seed of the scoring -> site -> score. A proxy without usable scores has no seeds."""

Metric: TypeAlias = Literal["validation_loss", "validation_accuracy"]
Vector: TypeAlias = npt.NDArray[np.float64]
Kind: TypeAlias = Literal["spearman", "kendall"]

KINDS: tuple[Kind, Kind] = ("spearman", "kendall")

RULE = GainRule("harmonic", 384, "none")
"""How scores become values of units of rank; a list says so itself, and units beyond its end count 0."""

MULTI = ("uniform", "random", "proxy")
"""Families of allocations to several sites."""

BASELINE = "all linears"
"""The uniform placement that allocations made by proxies are compared with."""

FEWEST_SITES = 5
FEWEST_ALLOCATIONS = 10
PERMUTATIONS = 9_999

WHERE: Mapping[str, tuple[str, ...]] = {"lora": ("lora",), "shortcut": ("shortcut",), "all": ("lora", "shortcut")}
"""Columns of sites, and the kinds of site in them."""


@dataclass(frozen=True)
class Finding:
    """One number of the judgement.

    Attributes:
        part: ``sites``, ``ceiling``, ``allocations``, ``regret``, ``made`` or ``stability``.
        where: ``lora``, ``shortcut``, ``all``, or a budget in parameters.
        proxy: None where the number is of no proxy.
        allocator: what made ranks of the scores; None but for ``made``.
        measure: what the number is.
        value: None where it is not defined; the note says why.
        low: lower end of its 95 % interval; None without one.
        high: upper end.
        p: permutation p-value, not corrected.
        p_holm: corrected over the proxies of this part, place and measure.
        n: sites, allocations or seeds that it was made from.
        left_out: sites or allocations without it, for they have no score.
        note: what a reader must know.
    """

    part: str
    where: str
    proxy: str | None
    allocator: str | None
    measure: str
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    n: int
    left_out: int
    note: str


COLUMNS = tuple(Finding.__annotations__)


def judge(
    rows: pd.DataFrame, scores: Scores, sites: Sequence[Site], metric: Metric = "validation_loss"
) -> pd.DataFrame:
    """Everything that rows and scores say of each other, one number a row, with the columns of ``Finding``.

    Args:
        rows: as ``make.read_table`` gives them; parts of the table may be missing.
        scores: of the proxies that are judged.
        sites: of the table.
        metric: the result.

    Raises:
        SettingError: if a row's result is no finite number, or its ranks cannot be read.
    """
    table = prepared(rows, metric)
    parts = [
        of_sites(table, scores, sites),
        ceiling(table, sites),
        of_allocations(table, scores, sites),
        made(table, list(scores)),
        stability(scores),
    ]
    found = [finding for part in parts for finding in part]
    return pd.DataFrame([asdict(finding) for finding in found], columns=list(COLUMNS)).astype(
        {"value": "float64", "low": "float64", "high": "float64", "p": "float64", "p_holm": "float64"}
    )


def ranks_of(text: str) -> dict[str, int]:
    """Site -> rank, of a row's ``ranks``: ``0.q:5 1.up:2``.

    Raises:
        SettingError: if it is anything else.
    """
    pairs = [item.rpartition(":") for item in text.split()]
    if not pairs or not all(site and rank.isdecimal() and int(rank) for site, _, rank in pairs):
        raise SettingError("ranks", text, "site:rank, separated by spaces")
    ranks = {site: int(rank) for site, _, rank in pairs}
    if len(ranks) < len(pairs):
        raise SettingError("ranks", text, "each site once")
    return ranks


def order_of_proxies(frame: pd.DataFrame, proxies: Sequence[str]) -> list[str]:
    """Best agreement at LoRA sites first; those without one last, by name."""
    chosen = frame[(frame["part"] == "sites") & (frame["where"] == "lora") & (frame["measure"] == "spearman")]
    value = dict(zip(chosen["proxy"], chosen["value"], strict=True))
    known = {proxy: value[proxy] for proxy in proxies if proxy in value and not math.isnan(value[proxy])}
    return sorted(proxies, key=lambda proxy: (-known.get(proxy, -math.inf), proxy))


def prepared(rows: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Rows with their ``value`` and ``cost``, and ``allocation``: the ranks as text, the same for the same ranks.

    Raises:
        SettingError: if a row's result is no finite number, or its ranks cannot be read.
    """
    values = rows[metric].astype("float64")
    if not np.isfinite(values).all():
        bad = rows["key"][~np.isfinite(values)].tolist()
        raise SettingError(metric, bad[:3], "a finite number in every row")
    same = [" ".join(f"{site}:{rank}" for site, rank in sorted(ranks_of(text).items())) for text in rows["ranks"]]
    signed = values if metric == "validation_loss" else -values
    return rows.assign(value=values, cost=signed, allocation=pd.Series(same, rows.index, dtype="object"))


def levelled(rows: pd.DataFrame) -> dict[str, float]:
    """Cost of each allocation, the mean over the seeds that it was trained with.

    Some allocations were trained with more seeds than others, and a seed shifts all results. So before the mean each
    seed's results are moved by the mean difference between it and the seed with most results, over the allocations
    that both have; without such allocations they stay. Where all have the same seeds this changes no order.
    """
    if rows.empty:
        return {}
    by_seed = rows.pivot_table(index="allocation", columns="seed", values="cost", aggfunc="mean")
    reference = by_seed[by_seed.count().idxmax()]
    offsets = by_seed.sub(reference, axis=0).mean().fillna(0.0)
    means = by_seed.sub(offsets, axis=1).mean(axis=1)
    return {str(allocation): float(cost) for allocation, cost in means.items()}


# -- correlations -----------------------------------------------------------------------------------------------------


def permutation_p(x: Sequence[float] | Vector, y: Sequence[float] | Vector) -> float:
    """Two-sided permutation p of Spearman's rho of 0, from ``PERMUTATIONS`` random pairings (all, where fewer exist).

    Args:
        x: finite numbers, not all equal.
        y: as many, not all equal.
    """
    first, second = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (x, y))

    def product(values: Vector, axis: int) -> Vector:
        return np.asarray((values * second).sum(axis=axis))

    found = stats.permutation_test(
        (first,), product, permutation_type="pairings", n_resamples=PERMUTATIONS, vectorized=True, random_state=0
    )
    return float(found.pvalue)


def averaged(by_seed: Sequence[Sequence[float]]) -> Vector:
    """One number an item from several score seeds: the mean of its ranks, for the sizes of scores vary with the seed.

    Within a seed the least number has rank 1, and equal numbers share their mean rank.
    """
    if not by_seed:
        return np.zeros(0)
    return np.asarray(np.mean([stats.rankdata(values) for values in by_seed], axis=0))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _finding(part: str, where: str, proxy: str | None, measure: str, estimate: Estimate, **more: object) -> Finding:
    numbers = {name: _defined(getattr(estimate, name)) for name in ("value", "low", "high")}
    rest = {"allocator": None, "p": None, "p_holm": None, "left_out": 0, "note": ""} | more
    return Finding(part=part, where=where, proxy=proxy, measure=measure, n=estimate.n, **numbers, **rest)  # type: ignore[arg-type]


def _none(n: int) -> Estimate:
    return Estimate(math.nan, math.nan, math.nan, n)


def _both(part: str, where: str, proxy: str | None, x: Vector, y: Vector, left_out: int, fewest: int) -> list[Finding]:
    """Spearman with its p, and Kendall."""
    note = ""
    if x.size < fewest:
        note = f"fewer than {fewest}"
    elif np.ptp(x) == 0:
        note = "equal scores"
    elif np.ptp(y) == 0:
        note = "equal results"
    if note:
        empty = _none(x.size)
        return [_finding(part, where, proxy, kind, empty, left_out=left_out, note=note) for kind in KINDS]
    p = permutation_p(x, y)
    return [
        _finding(
            part,
            where,
            proxy,
            kind,
            rank_correlation(x.tolist(), y.tolist(), kind),
            p=p if kind == "spearman" else None,
            left_out=left_out,
        )
        for kind in KINDS
    ]


def _corrected(findings: Sequence[Finding]) -> list[Finding]:
    """With Holm's p over all that have one."""
    tested = [index for index, finding in enumerate(findings) if finding.p is not None]
    ps = dict(zip(tested, holm([findings[index].p or 0.0 for index in tested]), strict=True))
    return [Finding(**asdict(finding) | {"p_holm": ps.get(index)}) for index, finding in enumerate(findings)]


# -- the parts --------------------------------------------------------------------------------------------------------


def of_sites(table: pd.DataFrame, scores: Scores, sites: Sequence[Site]) -> list[Finding]:
    """Score of a site against minus the cost of training it alone, for LoRA sites, shortcuts and all.

    A score that is a list counts as the sum of as many units as the rank that was trained.
    """
    truth: dict[str, tuple[int, float]] = {}
    for allocation, cost in levelled(table[table["family"] == "alone"]).items():
        ((site, rank),) = ranks_of(allocation).items()
        truth[site] = rank, cost
    found = []
    for where, kinds in WHERE.items():
        names = [site.name for site in sites if site.kind in kinds and site.name in truth]
        benefit = np.array([-truth[name][1] for name in names])
        column: list[Finding] = []
        for proxy, by_seed in scores.items():
            lacking = [name for name in names if not by_seed or any(name not in given for given in by_seed.values())]
            if lacking:  # a part of the column would be another question
                note = f"no score at {len(lacking)} of {len(names)} sites"
                empty = _none(len(names) - len(lacking))
                column += [
                    _finding("sites", where, proxy, kind, empty, left_out=len(lacking), note=note) for kind in KINDS
                ]
                continue
            said = averaged([[_worth(given[name], truth[name][0]) for name in names] for given in by_seed.values()])
            column += _both("sites", where, proxy, said, benefit, 0, FEWEST_SITES)
        found += _corrected(column)
    return found


def _worth(score: Score, rank: int) -> float:
    return math.fsum(score[:rank]) if isinstance(score, Sequence) else score


def ceiling(table: pd.DataFrame, sites: Sequence[Site]) -> list[Finding]:
    """Results of one training seed against those of another, and what that allows.

    With agreement r between single seeds, whoever knew each site's expected result would reach about
    sqrt(k r / (1 + (k - 1) r)) against the mean over k seeds (Spearman and Brown): ``attainable``.
    """
    alone = table[table["family"] == "alone"]
    kind_of = {site.name: site.kind for site in sites}
    by_seed: dict[int, dict[str, float]] = {}
    for seed, text, cost in zip(alone["seed"], alone["ranks"], alone["cost"], strict=True):
        by_seed.setdefault(int(seed), {})[next(iter(ranks_of(text)))] = float(cost)
    found = []
    for where, kinds in WHERE.items():
        pairs = []
        for one, other in combinations(sorted(by_seed), 2):
            shared = [name for name in by_seed[one] if name in by_seed[other] and kind_of.get(name) in kinds]
            if len(shared) < FEWEST_SITES:
                continue
            first, second = ([by_seed[seed][name] for name in shared] for seed in (one, other))
            estimate = rank_correlation(first, second, "spearman")
            pairs.append(estimate.value)
            note = f"seed {one} against seed {other}"
            found.append(_finding("ceiling", where, None, "spearman", estimate, note=note))
        if pairs and (r := float(np.mean(pairs))) > 0:  # not so for NaN
            k = len(by_seed)
            limit = Estimate(math.sqrt(k * r / (1 + (k - 1) * r)), math.nan, math.nan, k)
            found.append(_finding("ceiling", where, None, "attainable", limit, note=f"against the mean of {k} seeds"))
    return found


def budgets_of(table: pd.DataFrame) -> dict[int, int]:
    """Budget -> number of different allocations to several sites."""
    several = table[table["family"].isin(MULTI)]
    budgets = sorted(set(map(int, several["budget"].tolist())))
    return {budget: several.loc[several["budget"] == budget, "allocation"].nunique() for budget in budgets}


def of_allocations(table: pd.DataFrame, scores: Scores, sites: Sequence[Site]) -> list[Finding]:
    """Predicted value of whole allocations against minus their cost, and what choosing by it would lose.

    Entries with the same ranks are one allocation. The prediction is the sum of the values of all units that it holds,
    by ``RULE``. ``regret`` is the cost of the allocation that is predicted best (the mean of those, if several are)
    minus the least cost at the budget.
    """
    found: list[Finding] = []
    for budget, count in budgets_of(table).items():
        if count < FEWEST_ALLOCATIONS:
            continue
        rows = table[table["family"].isin(MULTI) & (table["budget"] == budget)]
        costs, where = levelled(rows), str(budget)
        called = _called(rows)
        least = min(costs.values())
        best = min(costs, key=costs.__getitem__)
        column: list[Finding] = []
        for proxy, by_seed in scores.items():
            chosen, predicted = _predicted(list(costs), by_seed, sites)
            left_out = len(costs) - len(chosen)
            benefit = np.array([-costs[allocation] for allocation in chosen])
            column += _both("allocations", where, proxy, predicted, benefit, left_out, FEWEST_ALLOCATIONS)
            if column[-1].note:
                regret, note = _none(len(chosen)), column[-1].note
            else:
                top = [chosen[index] for index in np.flatnonzero(predicted == predicted.max())]
                cost = float(np.mean([costs[allocation] for allocation in top]))
                regret = Estimate(cost - least, math.nan, math.nan, len(chosen))
                note = "chooses " + (called[top[0]] if len(top) == 1 else f"among {len(top)} that it finds equal")
            found.append(_finding("regret", where, proxy, "regret", regret, left_out=left_out, note=note))
        found += _corrected(column)
        blind = Estimate(float(np.mean(list(costs.values()))) - least, math.nan, math.nan, len(costs))
        found.append(_finding("regret", where, None, "regret", blind, note=f"a random choice; best is {called[best]}"))
    return found


def _called(rows: pd.DataFrame) -> dict[str, str]:
    """What each allocation is called: all entries that have its ranks."""
    names: dict[str, set[str]] = {}
    for allocation, family, name in zip(rows["allocation"], rows["family"], rows["name"], strict=True):
        names.setdefault(allocation, set()).add(f"{family} {name}")
    return {allocation: ", ".join(sorted(found)) for allocation, found in names.items()}


def _predicted(
    allocations: Sequence[str], by_seed: Mapping[int, Mapping[str, Score]], sites: Sequence[Site]
) -> tuple[list[str], Vector]:
    """Allocations all of whose sites have scores, and their predicted values, averaged over score seeds."""
    scored = [site for site in sites if by_seed and all(site.name in given for given in by_seed.values())]
    names = {site.name for site in scored}
    chosen = [allocation for allocation in allocations if ranks_of(allocation).keys() <= names]
    if not chosen:
        return [], np.zeros(0)
    values = []
    for given in by_seed.values():
        gains = RULE.gains(given, scored, {})
        values.append(
            [math.fsum(g for site, rank in ranks_of(text).items() for g in gains[site][:rank]) for text in chosen]
        )
    return chosen, averaged(values)


def made(table: pd.DataFrame, proxies: Sequence[str]) -> list[Finding]:
    """What proxy and allocator made, as trained: its result, and how far that is from ``BASELINE`` and from the best.

    Differences are between runs of one budget and seed, in the unit of the metric (``minus_uniform``), or as a cost
    (``regret``); the mean over the training seeds.
    """
    several = table[table["family"].isin(MULTI)]
    least: dict[tuple[int, int], float] = {}
    uniform: dict[tuple[int, int], float] = {}
    methods: dict[tuple[int, str, str], dict[int, tuple[float, float]]] = {}
    for row in several.to_dict("records"):
        budget, seed, cost = int(row["budget"]), int(row["seed"]), float(row["cost"])
        least[budget, seed] = min(cost, least.get((budget, seed), math.inf))
        if (row["family"], row["name"]) == ("uniform", BASELINE):
            uniform[budget, seed] = float(row["value"])
        if row["family"] == "proxy":
            proxy, allocator = _method(row["name"], proxies)
            methods.setdefault((budget, allocator, proxy), {})[seed] = (float(row["value"]), cost)
    found = []
    for (budget, allocator, proxy), results in sorted(methods.items()):
        numbers = {
            "result": [value for value, _ in results.values()],
            "minus_uniform": [
                value - uniform[budget, seed] for seed, (value, _) in results.items() if (budget, seed) in uniform
            ],
            "regret": [cost - least[budget, seed] for seed, (_, cost) in results.items()],
        }
        for measure, given in numbers.items():
            note = "" if given else f"no uniform {BASELINE} of its budget and seed"
            found.append(_finding("made", str(budget), proxy, measure, mean(given), allocator=allocator, note=note))
    return found


def _method(name: str, proxies: Sequence[str]) -> tuple[str, str]:
    """Proxy and allocator of ``<proxy>_<allocator>``, in which both may hold underscores."""
    known = [proxy for proxy in proxies if name.startswith(f"{proxy}_")]
    proxy = max(known, key=len) if known else name.rpartition("_")[0]
    return proxy, name[len(proxy) + 1 :]


def stability(scores: Scores) -> list[Finding]:
    """How alike the scores of different seeds are: mean over the pairs of seeds of Spearman and of ``top_overlap``.

    A score that is a list counts as its sum. ``sites`` is how many have a score with every seed.
    """
    found = []
    for proxy, by_seed in scores.items():
        names = [name for name in next(iter(by_seed.values()), {}) if all(name in given for given in by_seed.values())]
        values = [np.array([total(given[name]) for name in names]) for given in by_seed.values()]
        pairs = list(combinations(values, 2))
        n, equal = len(pairs), any(np.ptp(value) == 0 for value in values if value.size)
        rho, overlap = math.nan, math.nan
        note = "fewer than two seeds" if not pairs else "equal scores" if equal else ""
        if names and not note:
            rho = float(np.mean([stats.spearmanr(one, other).statistic for one, other in pairs]))
            overlap = float(np.mean([top_overlap(one.tolist(), other.tolist()) for one, other in pairs]))
        for measure, value in (("spearman", rho), ("top_overlap", overlap), ("sites", float(len(names)))):
            about = "" if measure == "sites" else note
            estimate = Estimate(value, math.nan, math.nan, n)
            found.append(_finding("stability", "all", proxy, measure, estimate, note=about))
    return found
