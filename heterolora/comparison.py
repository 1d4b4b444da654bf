"""Runs side by side: means over seeds, and differences from a baseline over pairs of one seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from heterolora.errors import SettingError
from heterolora.results import Result
from heterolora.statistics import Mean, SignFlip, holm, mean, paired_difference, sign_flip


@dataclass(frozen=True)
class Difference:
    """A group against the baseline.

    Attributes:
        mean: of (group - baseline) over the seeds at which both have a value; its n is the number of pairs.
        unpaired: seeds at which only one of the two has a value.
        test: sign-flip test of the difference; None for fewer than 6 pairs.
        p_holm: p corrected with the other comparisons of the section; None without a test and for the primary one.
    """

    mean: Mean
    unpaired: int
    test: SignFlip | None
    p_holm: float | None


@dataclass(frozen=True)
class Row:
    """One group of a section.

    Attributes:
        group: its name.
        mean: of the metric over its runs.
        undefined: runs without a finite value; they are in no mean and in no pair.
        held: fewest and most trainable adapter parameters over all its runs.
        steps: fewest and most optimizer steps.
        unequal: whether its parameters or steps are not those of the others, see ``compare``.
        difference: from the baseline; None without one and for the baseline itself.
    """

    group: str
    mean: Mean
    undefined: int
    held: tuple[int, int]
    steps: tuple[int, int]
    unequal: bool
    difference: Difference | None


@dataclass(frozen=True)
class Section:
    """What is compared only with itself.

    Attributes:
        name: of the section.
        split: whose metric is compared.
        metric: its name.
        baseline: the group that the others are compared with; None without one here.
        primary: the group whose comparison was chosen beforehand; None without one here.
        rows: one of each group, in order of first appearance.
        notes: what a reader must know, one sentence each.
    """

    name: str
    split: str
    metric: str
    baseline: str | None
    primary: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(
    results: Sequence[Result],
    *,
    split: str | None,
    metric: str | None,
    baseline: str | None,
    primary: str | None,
    tolerance: float = 0.01,
    allow_unequal: bool = False,
) -> list[Section]:
    """One section for each ``Result.section`` and in it one row for each group, in order of first appearance.

    Args:
        results: finished runs; at least one.
        split: None: ``test`` if every run has it, else ``validation``.
        metric: None: the first metric of the split, for each section its own.
        baseline: group that the others are compared with, in the sections that have it; None: no differences.
        primary: group whose comparison with the baseline was chosen beforehand: its p is not corrected. All others of
            a section are corrected together by Holm's method.
        tolerance: how far held parameters may lie from those of the baseline's largest run (without a baseline: of the
            section's), as a share of them. Steps must be the same.
        allow_unequal: compare groups with other parameters, steps, data or weights all the same, and mark them.

    Raises:
        SettingError: if a name does not exist, two different runs have one section, group and seed, or parameters,
            steps, data or backbone weights are unequal and that is not allowed.
    """
    if not results:
        raise SettingError("table", "no runs", "at least one finished run")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise SettingError("tolerance", tolerance, "a share of at least 0, e.g. 0.01")
    split = _choose_split(results, split)
    if metric is not None:
        _choose_metric(results, split, metric)
    sections: dict[str, list[Result]] = {}
    for result in results:
        sections.setdefault(result.section, []).append(result)
    _check_names(sections.values(), baseline, primary)
    found = []
    for name, runs in sections.items():
        groups, repeated = _repetitions(runs)
        here, lacking = _roles(groups, baseline, primary)
        budgets = _Budgets(name, here[0], tolerance, allow_unequal)
        chosen = _choose_metric(runs, split, metric)
        rows, marked = _rows(groups, split, chosen, *here, budgets)
        if len(codes := list(dict.fromkeys(run.code for run in runs if run.code))) > 1:
            marked = [*marked, f"runs were made by {len(codes)} versions of the code: {'; '.join(codes)}"]
        found.append(Section(name, split, chosen, *here, rows, (*repeated, *lacking, *marked)))
    return found


def _choose_split(results: Sequence[Result], split: str | None) -> str:
    common = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    chosen = split if split is not None else "test" if "test" in common else "validation"
    if chosen not in common:
        raise SettingError("--split", chosen, f"not a split of every run; possible: {common}")
    return chosen


def _choose_metric(runs: Sequence[Result], split: str, metric: str | None) -> str:
    """The metric, which every run must have (though it need not be defined); None: the first one of the first run."""
    names = list(runs[0].metrics[split])
    if metric is None and not names:
        raise SettingError("--split", split, f"{runs[0].place} has no metric there")
    chosen = names[0] if metric is None else metric
    common = [name for name in names if all(name in run.metrics[split] for run in runs)]
    if chosen not in common:
        raise SettingError("--metric", chosen, f"not a metric of every run in {split}; possible: {common}")
    return chosen


def _check_names(sections: Iterable[Sequence[Result]], baseline: str | None, primary: str | None) -> None:
    groups = [list(dict.fromkeys(run.group for run in runs)) for runs in sections]
    if baseline is None:
        if primary is not None:
            raise SettingError("--primary", primary, "give --baseline, the group that it is compared with")
        return
    if not any(baseline in names for names in groups):
        possible = list(dict.fromkeys(name for names in groups for name in names))
        raise SettingError("--baseline", baseline, f"possible: {possible}")
    others = list(dict.fromkeys(name for names in groups if baseline in names for name in names if name != baseline))
    if primary == baseline:
        raise SettingError("--primary", primary, f"is the baseline; possible: {others}")
    if primary is not None and primary not in others:
        raise SettingError("--primary", primary, f"not in a section with the baseline; possible: {others}")


def _roles(
    groups: Mapping[str, object], baseline: str | None, primary: str | None
) -> tuple[tuple[str | None, str | None], list[str]]:
    """Baseline and primary group as far as the section has them, and notes about what it lacks."""
    if baseline is not None and baseline not in groups:
        return (None, None), [f"no run of the baseline {baseline} here, so no differences"]
    if primary is not None and primary not in groups:
        return (baseline, None), [f"no run of the primary group {primary} here, so every p is corrected"]
    return (baseline, primary), []


def _rows(
    groups: Mapping[str, Mapping[int, Result]],
    split: str,
    metric: str,
    baseline: str | None,
    primary: str | None,
    budgets: "_Budgets",
) -> tuple[tuple[Row, ...], list[str]]:
    held = {group: _span(run.held for run in seeds.values()) for group, seeds in groups.items()}
    steps = {group: _span(run.steps for run in seeds.values()) for group, seeds in groups.items()}
    unequal_held, notes = budgets.held(held)
    unequal_steps, more = budgets.steps(steps)
    unequal_material, others = budgets.material(groups)
    values = {group: _defined(seeds, split, metric) for group, seeds in groups.items()}
    differences = {} if baseline is None else _differences(values, baseline, primary)
    rows = tuple(
        Row(
            group,
            mean(list(values[group].values())),
            len(seeds) - len(values[group]),
            held[group],
            steps[group],
            group in {*unequal_held, *unequal_steps, *unequal_material},
            differences.get(group),
        )
        for group, seeds in groups.items()
    )
    beyond = {group: max(run.beyond for run in seeds.values()) for group, seeds in groups.items()}
    shown = ", ".join(f"{group} (by {most:,})" for group, most in beyond.items() if most)
    return rows, notes + ([f"more is held than the budget allows in {shown}"] if shown else []) + more + others


def _repetitions(runs: Sequence[Result]) -> tuple[dict[str, dict[int, Result]], list[str]]:
    """Group -> seed -> run, and a note about runs that only repeat another one."""
    groups: dict[str, dict[int, Result]] = {}
    repeated = []
    for run in runs:
        seeds = groups.setdefault(run.group, {})
        if run.seed not in seeds:
            seeds[run.seed] = run
            continue
        first = seeds[run.seed]
        if _outcome(first) != _outcome(run):
            raise SettingError(
                "table",
                [first.place, run.place],
                f"two runs of one group and seed ({run.group}, {run.seed}); keep one of them, "
                "or give what differs between them groups of their own",
            )
        repeated.append(run.place)
    notes = [f"counted once, for they repeat another run with the same results: {', '.join(repeated)}"]
    return groups, notes if repeated else []


def _outcome(run: Result) -> tuple[dict[str, dict[str, float | None]], int, int]:
    """What two runs of one seed must share; NaN, which equals nothing, is None."""
    metrics = {
        split: {name: None if value is None or math.isnan(value) else value for name, value in values.items()}
        for split, values in run.metrics.items()
    }
    return metrics, run.held, run.steps


def _span(numbers: Iterable[int]) -> tuple[int, int]:
    ordered = sorted(numbers)
    return ordered[0], ordered[-1]


def _defined(seeds: Mapping[int, Result], split: str, metric: str) -> dict[int, float]:
    """Seed -> value, of the runs that have a finite one."""
    values = {seed: run.metrics[split][metric] for seed, run in seeds.items()}
    return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}


def _differences(
    values: Mapping[str, Mapping[int, float]], baseline: str, primary: str | None
) -> dict[str, Difference]:
    base = values[baseline]
    found = {}
    for group, own in values.items():
        if group == baseline:
            continue
        seeds = sorted(own.keys() & base.keys())  # random sign patterns must not depend on the order of the runs
        a, b = [own[seed] for seed in seeds], [base[seed] for seed in seeds]
        test = sign_flip([x - y for x, y in zip(a, b, strict=True)])
        found[group] = (paired_difference(a, b), len(own.keys() ^ base.keys()), test)
    family = {group: test.p for group, (_, _, test) in found.items() if test is not None and group != primary}
    corrected = dict(zip(family, holm(list(family.values())), strict=True))
    return {group: Difference(*parts, corrected.get(group)) for group, parts in found.items()}


_Spans: TypeAlias = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class _Budgets:
    """Whether the groups of a section may be compared: as many parameters, up to the tolerance, and as many steps."""

    section: str
    baseline: str | None
    tolerance: float
    allow_unequal: bool

    def held(self, spans: _Spans) -> tuple[list[str], list[str]]:
        """Groups to mark, and notes."""
        how = f"differ by more than {_percent(self.tolerance)}"
        far, notes = self._far("held", "held parameters", how, spans, self.tolerance)
        reference = self._reference(spans)
        within = max((_distance(span, reference) for group, span in spans.items() if group not in far), default=0)
        if within:
            at_most, most = _percent(self.tolerance), _percent(within / reference)
            notes.append(f"held parameters are equal within {at_most} (they differ by up to {most})")
        return far, notes

    def steps(self, spans: _Spans) -> tuple[list[str], list[str]]:
        """The same for steps, which must be equal: longer training is another budget."""
        return self._far("steps", "optimizer steps", "differ", spans, 0.0)

    def material(self, groups: Mapping[str, Mapping[int, Result]]) -> tuple[list[str], list[str]]:
        """The same for data and weights: a section is one task and one backbone, whatever they are called."""
        found = {group: sorted({run.material for run in seeds.values()}) for group, seeds in groups.items()}
        reference = found[self.baseline or next(iter(found))][0]
        far = [group for group, digests in found.items() if digests != [reference]]
        if not far:
            return [], []
        if not self.allow_unequal:
            possible = f"runs in {self.section} read other data or weights; give --unequal to compare them all the same"
            raise SettingError("data", found, possible)
        return far, [f"unequal: other data or backbone weights than {reference} in {', '.join(far)}"]

    def _reference(self, spans: _Spans) -> int:
        return max(high for _, high in spans.values()) if self.baseline is None else spans[self.baseline][1]

    def _far(self, setting: str, noun: str, how: str, spans: _Spans, tolerance: float) -> tuple[list[str], list[str]]:
        reference = self._reference(spans)
        far = [group for group, span in spans.items() if _distance(span, reference) > tolerance * reference]
        if not far:
            return [], []
        if not self.allow_unequal:
            given = {group: low if low == high else f"{low} to {high}" for group, (low, high) in spans.items()}
            possible = f"{noun} in {self.section} {how}; give --unequal to compare them all the same"
            raise SettingError(setting, given, possible)
        whose = "the largest" if self.baseline is None else f"those of {self.baseline}"
        return far, [f"unequal: {noun} {how} from {whose} ({reference:,}) in {', '.join(far)}"]


def _distance(span: tuple[int, int], reference: int) -> int:
    return max(abs(end - reference) for end in span)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
