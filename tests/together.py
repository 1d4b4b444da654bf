"""Several processes of one run inside a test: forked, so that they start at once."""

import multiprocessing
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from heterolora.launch import Place
from heterolora.parts import make_parts
from heterolora.processes import joined
from heterolora.quiet import quieten
from heterolora.run import own_choices
from heterolora.training import run_training
from tests.jobs import prepare

PATIENCE = 300


class ProcessFailedError(Exception):
    """What a process raised, by rank."""


def together(size, folder, work, *args):
    """What ``work(processes, *args)`` gives in each of so many processes, by rank."""
    context = multiprocessing.get_context("fork")
    meeting = Path(folder) / "meeting"
    meeting.unlink(missing_ok=True)
    ends, started = [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(theirs, rank, size, meeting, work, args), daemon=True)
        process.start()
        theirs.close()
        ends.append(mine)
        started.append(process)
    found, wrong = [], []
    for rank, end in enumerate(ends):
        try:
            kind, value = end.recv() if end.poll(PATIENCE) else ("error", "still at it")
        except EOFError:
            kind, value = "error", "ended without a word"
        found.append(value)
        wrong += [f"process {rank}: {value}"] if kind == "error" else []
    for process in started:
        process.join(5)
        process.kill()
    if wrong:
        raise ProcessFailedError("\n".join(wrong))
    return found


def _one(end, rank, size, meeting, work, args):
    torch.set_num_threads(1)
    try:
        place = Place(rank, size, rank, size, None, 0, "a test")
        with joined(place, False, dist.FileStore(str(meeting), size)) as processes:
            end.send(("value", work(processes, *args)))
    except BaseException:
        end.send(("error", traceback.format_exc()))


def train_together(size, folder, *overrides, resume=None, watch=None):
    """A run of ``train.py`` in so many processes; the first one's summary, and what ``watch`` gives in each."""
    folder.mkdir(parents=True)
    return together(size, folder.parent, train_in, folder, [f"trainer.devices={size}", *overrides], resume, watch)


def train_in(processes, folder, overrides, resume, watch):
    """One process's part."""
    quieten()
    config = OmegaConf.to_container(prepare(folder, *overrides), resolve=True)
    parts = make_parts(config, own_choices(HydraConfig.get().runtime.choices))
    if watch is not None:
        watch(processes)
    return run_training(parts, config, folder, resume, processes=processes)
