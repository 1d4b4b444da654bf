"""Folders as runs and searches leave them, without any training."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from heterolora.adapters.lora import LoRA
from heterolora.allocation import Allocation
from heterolora.findings import Scores
from heterolora.history import HISTORY, Decision, append_decision
from heterolora.report.files import write_json
from heterolora.space import Space
from tests.architectures import make_backbone
from tests.conftest import adapt
from tests.surroundings import ALONE

FAMILY = LoRA("constant", 2.0, 0.0)
ADAPTER = {"_target_": "heterolora.adapters.lora.LoRA", "scaling": "constant", "scale": 2.0, "dropout": 0.0}


def tiny_space() -> Space:
    """LoRA and shortcut sites of a tiny bert; layer 0 has no ``shortcut_ffn``."""
    return adapt(make_backbone("bert"), spans=(1, 2)).space


def ranks_of(space: Space, seed: int = 0) -> dict[str, int]:
    """Some of everything from 0 to 4."""
    generator = torch.Generator().manual_seed(seed)
    return {site.name: int(torch.randint(0, 5, (1,), generator=generator)) for site in space.sites}


def scores_of(space: Space, seed: int = 0) -> dict[str, float]:
    generator = torch.Generator().manual_seed(100 + seed)
    return {site.name: float(10 ** torch.randn(1, generator=generator).item()) for site in space.sites}


def write_search(
    folder: Path, space: Space, ranks: dict[str, int], scores: dict, proxy: str, budget: int | None
) -> int:
    """Sites, scores and allocation; what the ranks cost."""
    folder.mkdir(parents=True, exist_ok=True)
    spent = FAMILY.cost(space.sites)(ranks)
    write_json(folder / "sites.json", [site.as_dict() for site in space.sites])
    write_json(folder / "scores.json", Scores(proxy, scores, [[0, 1]], None, None).as_dict())
    write_json(folder / "allocation.json", Allocation(ranks, spent, budget, {"adapter": ADAPTER}).as_dict())
    return spent


def write_run(
    folder: Path,
    space: Space,
    *,
    proxy: str = "snip",
    seed: int = 0,
    accuracy: float = 0.75,
    ranks: dict[str, int] | None = None,
    title: str | None = None,
    state: str = "finished",
    **status: object,
) -> Path:
    """A run of ``train.py`` on made-up sentences."""
    ranks = ranks_of(space) if ranks is None else ranks
    spent = write_search(folder, space, ranks, {proxy: scores_of(space, seed)}, proxy, 10_000)
    write_json(folder / "status.json", {"state": state, "overrides": [f"proxy={proxy}", f"seed={seed}"], **status})
    config = {"seed": seed, "proxy": {"_target_": f"heterolora.proxies.{proxy}"}, "adapter": ADAPTER}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    curves = ["epoch,step,test/accuracy,test/loss,train/loss_epoch,validation/accuracy,validation/loss"]
    curves += [f"{n},{10 * n + 9},,,{0.7 - 0.1 * n},," for n in range(3)]
    curves += [f"{n},{10 * n + 9},,,,{accuracy - 0.1 + 0.05 * n},{0.7 - 0.05 * n}" for n in range(3)]
    (folder / "metrics.csv").write_text("\n".join([*curves, f"3,30,{accuracy},0.5,,,"]) + "\n")
    if state != "finished":
        return folder
    factors = {}
    for site in space.sites:
        if ranks[site.name]:
            adapter = FAMILY.probe(site, ranks[site.name], 0.1, seed, ALONE)
            factors |= {f"adapter.{site.name}.A": adapter.A.detach(), f"adapter.{site.name}.B": adapter.B.detach()}
    save_file(factors, folder / "adapter.safetensors")
    metrics = {"accuracy": accuracy, "loss": 0.5}
    summary = {
        "title": title or f"reviews: tiny_bert, {proxy}, seed {seed}",
        "choices": {"task": "reviews", "model": "tiny_bert", "proxy": proxy},
        "seed": seed,
        "metrics": {"validation": metrics, "test": metrics},
        "collapsed": {"validation": False, "test": False},
        "parameters": {"held": spent, "active": spent, "budget": 10_000},
        "seconds": {"search": 1.5, "training": 10.0 + seed},
        "peak_memory_mib": 500.0,
        "data": {"sha256": "d" * 64},
        "steps": 30,
        "backbone": "b" * 64,
        "versions": {"torch": "2"},
    }
    write_json(folder / "summary.json", summary)
    return folder


def write_history(folder: Path, space: Space, count: int = 4) -> list[Decision]:
    """Decisions every 10 steps, each with other ranks; ``0.k`` never gets any."""
    decisions = []
    for number in range(count):
        ranks = ranks_of(space, 50 + number) | {"0.k": 0, "0.q": 1 + number % 2}
        decisions.append(Decision(10 * number, scores_of(space, number), ranks, f"every 10 steps <{number}>"))
        append_decision(folder / HISTORY, decisions[-1])
    return decisions


def change_json(path: Path, **changes: object) -> None:
    """Other values for some keys of a JSON file."""
    write_json(path, json.loads(path.read_text()) | changes)
