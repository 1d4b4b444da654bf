"""Find an allocation and fine-tune under it: ``python train.py task=mrpc proxy=snip seed=0,1 -m``."""

import os
import sys

import hydra
from omegaconf import DictConfig

from heterolora.launch import arguments
from heterolora.names import register


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """One run; returns the task's first metric on the validation split."""
    from heterolora.run import train  # after the config is read: torch takes seconds

    return train(cfg)


if __name__ == "__main__":
    register()
    sys.argv[1:] = arguments(sys.argv[1:], os.environ)
    main()
