"""Names of a sweep's folders. ``train.py`` needs this before the config is read, so nothing here needs torch."""

import hashlib

from omegaconf import OmegaConf


def register() -> None:
    """Let configs say ``${short:TEXT}``; every process that composes one has to call this first."""
    OmegaConf.register_new_resolver("short", short, replace=True)


def short(text: object) -> str:
    """Six characters that tell texts apart, whatever is in them: ``job 3`` of a grown sweep is another job."""
    return hashlib.sha256(str(text).encode()).hexdigest()[:6]
