"""Whether a hub of models and data sets can be asked at all, found out in seconds instead of minutes of retries."""

import os
import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies


@cache
def hub_reachable() -> bool:
    """True if the hub's host accepts connections, or a proxy is configured that may know the way."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if {"http", "https", "all"} & getproxies().keys():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection(
            (host.hostname or "", host.port or (80 if host.scheme == "http" else 443)), timeout=5
        ):
            return True
    except OSError:
        return False
