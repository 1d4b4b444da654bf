"""Independent random streams, named instead of shared.

Nothing in the project draws from a global generator where the draw could depend on what was drawn before:
a stream is found by the run's seed and by what it is for.
"""

import hashlib


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed that depends on ``seed`` and on every name, and on nothing else."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
