"""What every proxy says of the table's sites: ``python -m benchmarks.allocation_table.scores`` fills what is missing.

One file for each proxy and seed in ``scores/``. The seed changes the scored batches, the random factors, the head and
its warm-up, just as it does in the runs of the table.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.allocation_table.make import SETTINGS
from heterolora.build import build
from heterolora.callbacks.progress import track
from heterolora.data.module import TextData
from heterolora.errors import SettingError
from heterolora.lit import LitAdapted
from heterolora.model import AdaptedModel
from heterolora.provenance import code_version, versions
from heterolora.proxies.base import DegenerateScores, Proxy, Score, check_scores, needs_trained
from heterolora.proxies.evidence import Evidence, Statistic
from heterolora.quiet import quieten
from heterolora.report.files import write_text
from heterolora.run import composer
from heterolora.scoring import score_all
from heterolora.space import survey
from heterolora.tasks.measure import FirstMetric
from heterolora.tournament import merged

_log = logging.getLogger(__name__)

HERE = Path(__file__).parent
FOLDER = HERE / "scores"

SEEDS = (0, 1, 2)
UNITS = 16
"""Values that are kept of a score that is a list, the largest ones."""

WEIGHTS_ONLY = "search_space=lora_all"
"""Where proxies of frozen weights score; they refuse shortcuts."""

TRAINED = "probe.adapter_warmup_steps=32"
"""What proxies of trained adapters need; 32 steps, as in the paper."""


@dataclass(frozen=True)
class Scored:
    """What one proxy says with one seed.

    Attributes:
        scores: site -> number, or the first ``UNITS`` values of its units of rank; empty where there is a reason.
        reason: why there are no scores (they rank nothing, or the proxy refuses the model); None: there are.
    """

    scores: Mapping[str, Score]
    reason: str | None


def names_of_proxies() -> list[str]:
    """Every option of ``conf/proxy``."""
    return [path.stem for path in sorted((HERE.parents[1] / "conf" / "proxy").glob("*.yaml"))]


def place(folder: Path, proxy: str, seed: int) -> Path:
    """The file of one proxy and seed."""
    return folder / f"{proxy}_s{seed}.json"


def read(path: Path) -> Scored:
    """A file of scores."""
    content = json.loads(path.read_text())
    return Scored(content["scores"], content["reason"])


def complete(
    proxies: Sequence[str], seeds: Sequence[int] = SEEDS, folder: Path = FOLDER, force: bool = False
) -> dict[str, dict[int, Scored]]:
    """Scores by proxy and seed; what no file holds is computed first, by all proxies of a seed together.

    A file made with other settings of proxy, probe or table counts as missing.

    Args:
        proxies: options of ``conf/proxy``.
        seeds: of the scoring, at least one.
        folder: holds the files.
        force: compute all of them again.

    Raises:
        SettingError: if a proxy does not exist.
    """
    folder.mkdir(exist_ok=True)
    with composer() as compose:
        configs = {}
        for name in proxies:
            config = compose(merged(SETTINGS, [f"seed={seeds[0]}", f"proxy={name}"]))[0]
            if needs_trained(build(config["proxy"], "proxy")):
                config = compose(merged(SETTINGS, [f"seed={seeds[0]}", f"proxy={name}", TRAINED]))[0]
            configs[name] = config
        for seed in seeds:
            missing = {
                name: config for name, config in configs.items() if force or not _is_current(folder, name, seed, config)
            }
            if not missing:
                continue
            _log.info("seed %d: scoring by %s", seed, ", ".join(missing))
            made = {"commit": code_version(), "versions": versions()}
            for needed, guards in _by_needs(missing):
                found = _score(compose(merged(SETTINGS, [f"seed={seed}", *needed]))[0], guards)
                for name, guard in guards.items():
                    content = {"proxy": name, "seed": seed, **_identity(missing[name]), **made, "reason": guard.reason}
                    kept = {} if guard.reason else {site: _rounded(score) for site, score in found[name].items()}
                    write_text(place(folder, name, seed), _as_json({**content, "scores": kept}))
    return {name: {seed: read(place(folder, name, seed)) for seed in seeds} for name in proxies}


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What scores depend on, besides the seed and the code."""
    probe = config["probe"]
    if not probe["adapter_warmup_steps"]:  # as before there was such a thing
        probe = {key: value for key, value in probe.items() if not key.startswith("adapter_warmup")}
    return {"node": config["proxy"], "probe": probe, "settings": list(SETTINGS)}


def _is_current(folder: Path, proxy: str, seed: int, config: Mapping[str, Any]) -> bool:
    path = place(folder, proxy, seed)
    if not path.exists():
        return False
    stored, now = json.loads(path.read_text()), _identity(config)
    if {key: stored.get(key) for key in now} == now:
        return True
    _log.info("%s was made with other settings", path.name)
    return False


def _rounded(score: Score) -> Score:
    """Eight digits: the last ones of single precision say nothing, and would differ between machines."""
    if isinstance(score, Sequence):
        return [float(f"{value:.8g}") for value in score[:UNITS]]
    return float(f"{score:.8g}")


def _as_json(content: Mapping[str, Any]) -> str:
    """One line for each entry, and for each site."""
    lines = [f' "{key}": {json.dumps(value, allow_nan=False)}' for key, value in content.items() if key != "scores"]
    sites = [f'  "{name}": {json.dumps(value, allow_nan=False)}' for name, value in content["scores"].items()]
    inner = "{\n" + ",\n".join(sites) + "\n }" if sites else "{}"
    return "{\n" + ",\n".join([*lines, f' "scores": {inner}']) + "\n}\n"


# -- scoring ----------------------------------------------------------------------------------------------------------


class _Guard:
    """A proxy whose refusal is kept instead of raised, so that it ends no pass that others share."""

    control = True
    remedy = ""

    def __init__(self, name: str, proxy: Proxy) -> None:
        self.name = name
        self.proxy = proxy
        self.needs_weights = bool(getattr(proxy, "needs_weights", False))
        self.needs_trained = needs_trained(proxy)
        self.reason: str | None = None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return self.proxy.statistics

    def score(self, evidence: Evidence) -> Mapping[str, Score]:
        sites = [site.name for site in evidence.sites]
        try:
            scores = self.proxy.score(evidence)
            check_scores(self.name, self.proxy, scores, sites)
        except (DegenerateScores, SettingError) as error:
            self.reason = str(error)
            return dict.fromkeys(sites, 0.0)
        return scores


def _by_needs(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[list[str], dict[str, _Guard]]]:
    """Overrides -> proxies that score with them: those of frozen weights refuse shortcuts, some need adapters."""
    guards = {name: _Guard(name, build(config["proxy"], "proxy")) for name, config in configs.items()}
    groups: dict[tuple[str, ...], dict[str, _Guard]] = {}
    for name, guard in guards.items():
        needed = (WEIGHTS_ONLY,) * guard.needs_weights + (TRAINED,) * guard.needs_trained
        groups.setdefault(needed, {})[name] = guard
    for overrides in sorted(groups):
        yield list(overrides), groups[overrides]


def _score(config: Mapping[str, Any], guards: Mapping[str, _Guard]) -> dict[str, Mapping[str, Score]]:
    """As a run of this config would score before training."""
    nodes = ("model", "task", "data", "search_space", "adapter", "probe", "optimizer", "trainer")
    parts = {node: build(config[node], node) for node in nodes}
    probe, seed, threads = parts["probe"], config["seed"], torch.get_num_threads()
    torch.set_num_threads(parts["trainer"].threads or threads)
    try:
        L.seed_everything(seed, verbose=False)
        splits, _, task = parts["data"].splits(parts["task"])
        backbone = parts["model"].load(task.outputs, seed)
        space = parts["search_space"].resolve(survey(backbone.model, backbone.layout))
        model = AdaptedModel(backbone.model, space, parts["adapter"], backbone.head)
        data = TextData(splits, task, backbone.tokenizer, backbone.positions, parts["data"], seed)
        lit = LitAdapted(model, task, parts["optimizer"], seed, {})
        batches, _ = data.scoring_batches(probe.batches)
        return score_all(
            model,
            lit.scalar_loss,
            batches,
            data.warmup_batches(),
            proxies=guards,
            probe=probe,
            seed=seed,
            track=track,
            measure=FirstMetric(task),
        ).scores
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PROXY", help="options of conf/proxy (default: all)")
    parser.add_argument("--force", action="store_true", help="compute all of them again")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    quieten()
    proxies = names_of_proxies()
    if unknown := sorted(set(given.only or []) - set(proxies)):
        raise SettingError("--only", unknown, f"possible: {proxies}")
    found = complete(given.only or proxies, force=given.force)
    for name, seeds in found.items():
        reasons = sorted({scored.reason for scored in seeds.values() if scored.reason})
        sites = len(next(iter(seeds.values())).scores)
        _log.info("%s: %s", name, "; ".join(reasons) or f"{sites} sites, seeds {list(seeds)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
