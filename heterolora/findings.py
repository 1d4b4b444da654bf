"""What a search leaves in a folder: sites, scores, ranks and a picture; and how its scores are read again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from heterolora.adapters.base import AdapterFamily
from heterolora.allocation import Allocation
from heterolora.errors import SettingError
from heterolora.proxies.base import Score, total
from heterolora.report.files import read_json, write_json, write_whole
from heterolora.report.picture import draw_allocation
from heterolora.space import Space

FORMAT = 2
"""Of ``scores.json``; version 1 held one proxy."""

SITE_COLUMNS = ("site", "kind", "role", "layer", "span", "in", "out", "score", "rank", "parameters")

FILES = ("sites.json", "sites.csv", "scores.json", "allocation.json", "allocation.png")
"""What ``write_findings`` may write."""


@dataclass(frozen=True)
class Scores:
    """Scores of the sites of one search space.

    Attributes:
        proxy: the proxy that the allocation was made with.
        scores: proxy -> site -> one number, or one for each unit of rank, largest first.
        rows: which training examples were looked at, batch by batch.
        backbone: fingerprint of its weights; None: not known.
        model: config node of the model that was looked at; None: not known.
    """

    proxy: str
    scores: Mapping[str, Mapping[str, Score]]
    rows: Sequence[Sequence[int]]
    backbone: str | None
    model: Mapping[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format": FORMAT,
            "proxy": self.proxy,
            "backbone": self.backbone,
            "model": None if self.model is None else dict(self.model),
            "scores": {
                proxy: {name: list(value) if isinstance(value, Sequence) else value for name, value in found.items()}
                for proxy, found in self.scores.items()
            },
            "rows": [list(batch) for batch in self.rows],
        }


def read_scores(path: Path, setting: str) -> Scores:
    """A ``scores.json``.

    Args:
        path: the file.
        setting: what named it, for messages.

    Raises:
        SettingError: if it cannot be read, or holds no scores of ours.
    """
    content = read_json(path, setting)
    if content.get("format") != FORMAT:
        raise SettingError(setting, path, f"holds no scores of format {FORMAT} (its format: {content.get('format')})")
    try:
        scores = {proxy: {site: _score(value) for site, value in of.items()} for proxy, of in content["scores"].items()}
        return Scores(content["proxy"], scores, content["rows"], content["backbone"], content["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SettingError(setting, path, f"its scores are damaged ({type(error).__name__}: {error})") from error


def _score(value: Any) -> Score:
    return [float(unit) for unit in value] if isinstance(value, list) else float(value)


def write_findings(
    folder: Path, space: Space, scores: Scores | None, allocation: Allocation, family: AdapterFamily, title: str
) -> list[list[Any]]:
    """Write ``FILES``, each whole.

    Args:
        folder: it must exist.
        space: the candidates.
        scores: None if the allocator looks at no scores; then there is no ``scores.json``.
        allocation: the ranks.
        family: says what ranks cost.
        title: of the picture.

    Returns:
        The rows of ``sites.csv``, with ``SITE_COLUMNS``.
    """
    write_json(folder / "sites.json", [site.as_dict() for site in space.sites])
    write_json(folder / "allocation.json", allocation.as_dict())
    rows = _site_rows(space, scores, allocation, family)
    table = pd.DataFrame(rows, columns=list(SITE_COLUMNS))
    write_whole(folder / "sites.csv", partial(table.to_csv, index=False))
    if scores is not None:
        write_json(folder / "scores.json", scores.as_dict())
    draw_allocation(space, allocation, title, folder / "allocation.png")
    return rows


def _site_rows(space: Space, scores: Scores | None, allocation: Allocation, family: AdapterFamily) -> list[list[Any]]:
    """One row a site, as ``SITE_COLUMNS``: what it is, its score (summed over units of rank), its rank and its cost."""
    ranks, cost = allocation.ranks, family.cost(space.sites)
    return [
        [
            site.name,
            site.kind,
            site.role,
            site.layer,
            site.span,
            site.in_features,
            site.out_features,
            None if scores is None else float(total(scores.scores[scores.proxy][site.name])),
            ranks[site.name],
            cost({site.name: ranks[site.name]}),
        ]
        for site in space.sites
    ]
