"""Find where rank should go, without fine-tuning: ``python search.py task=mrpc 'proxies=[snip,spectral]'``."""

import hydra
from omegaconf import DictConfig

from heterolora.names import register


@hydra.main(version_base="1.3", config_path="conf", config_name="search")
def main(cfg: DictConfig) -> None:
    """One search, in the folder that Hydra made for it."""
    from heterolora.run import search  # after the config is read: torch takes seconds

    search(cfg)


if __name__ == "__main__":
    register()
    main()
