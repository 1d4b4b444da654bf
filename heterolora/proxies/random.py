"""The control that prefers by chance."""

import random
from dataclasses import dataclass

from heterolora.proxies.evidence import Evidence, Statistic
from heterolora.seeds import derive


@dataclass(frozen=True)
class Random:
    """A uniform draw in (0, 1) for each site, from the run's seed and the site's name."""

    control = True
    remedy = ""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """None: it looks at nothing."""
        return ()

    def score(self, evidence: Evidence) -> dict[str, float]:
        """The draws; those of one site do not depend on which other sites there are."""
        return {
            site.name: random.Random(derive(evidence.seed, "random", site.name)).random() for site in evidence.sites
        }
