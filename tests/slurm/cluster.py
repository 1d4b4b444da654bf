"""A SLURM cluster of one node on this machine, for tests: ``python tests/slurm/cluster.py COMMAND ...`` runs one in it.

Everything is in a folder of its own, on free ports, beside whatever else runs, and is stopped by its process ids.
It needs root and Debian's packages ``slurm-wlm`` and ``munge`` (``.ci/install-slurm``).
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

_ENVIRONMENT = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}

_CONFIG = """\
ClusterName=heterolora
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=20
ReturnToService=2
RebootProgram=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# There is no accounting, as on many small clusters: whether jobs have ended is what squeue says.


class NotReadyError(RuntimeError):
    """A daemon did not come up; its log says why."""


def missing() -> list[str]:
    """Programs that are not installed, and ``root`` if this is another user."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_ENVIRONMENT["PATH"]) is None]
    return lacking + (["root"] if os.geteuid() else [])


@contextmanager
def cluster(cpus: int = 2) -> Iterator[dict[str, str]]:
    """A running cluster; within it, what must be added to the environment of a command so that it is used.

    Raises:
        NotReadyError: if a daemon ends at once, or no node is idle after half a minute.
    """
    folder = Path(tempfile.mkdtemp(prefix="heterolora-slurm-"))
    started: list[subprocess.Popen[bytes]] = []
    environment = {**_ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as out:
            everything = os.environ | environment
            started.append(subprocess.Popen(command, env=everything, stdout=out, stderr=subprocess.STDOUT))

    try:
        folder.chmod(0o755)
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]  # by which slurmd finds its own line
        config = _CONFIG.format(host=host, folder=folder, ports=_free_ports(2), cpus=cpus)
        (folder / "slurm.conf").write_text(config)
        places = (f"--{name}-file={folder}/munge/{name}" for name in ("key", "log", "pid", "seed"))
        start("munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *places)
        _until(lambda: (folder / "munge" / "socket").exists(), folder, started)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        _until(lambda: "idle" in _run(["sinfo", "-h", "-o", "%T"], environment), folder, started)
        yield environment
    finally:
        if (folder / "slurm.conf").exists() and len(started) > 1:
            _run(["scancel", "--full", "--user=root"], environment)
            _until_quietly(lambda: not _run(["squeue", "-h"], environment).strip(), 30)
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def _run(command: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.stdout


def _until(ready: Callable[[], bool], folder: Path, started: Sequence[subprocess.Popen[bytes]]) -> None:
    ended = lambda: [process for process in started if process.poll() is not None]  # noqa: E731
    if not _until_quietly(lambda: ready() or bool(ended()), 30) or ended():
        logs = [*folder.glob("*.out"), *folder.glob("*.log"), folder / "munge" / "log"]
        said = "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists())
        raise NotReadyError(f"the cluster did not start:\n{said}")


def _until_quietly(ready: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (done := ready()) and time.monotonic() < until:
        time.sleep(0.2)
    return done


if __name__ == "__main__":
    if lacking := missing():
        sys.exit(f"cluster: {', '.join(lacking)} missing: sudo .ci/install-slurm")
    with cluster(os.cpu_count() or 1) as here:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | here, check=False).returncode)
