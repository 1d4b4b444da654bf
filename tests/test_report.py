"""What a run leaves for people: whole files, the picture, the table, the peak of memory, lines in the log."""

import io
import json
import logging
import math
import struct
import sys
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.image import imread
from rich.console import Console

from heterolora.allocation import Allocation
from heterolora.callbacks.progress import EpochLog, TerminalBar, track
from heterolora.errors import SettingError
from heterolora.report import memory
from heterolora.report.files import write_json, write_text, write_whole
from heterolora.report.loggers import Csv, Silent, Wandb
from heterolora.report.picture import draw_allocation, rank_grid
from heterolora.report.summary import print_summary, summary_table
from heterolora.space import SearchSpace, survey
from tests.architectures import make_backbone

# -- files ------------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_and_nothing_else(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "größer\n")
    write_text(path, "second\n")
    assert path.read_text(encoding="utf-8") == "second\n"
    assert names(tmp_path) == ["notes.txt"]
    assert path.stat().st_mode & 0o777 == 0o644  # others may read it, unlike a temporary file


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "notes.txt", "größer\n")
    assert (tmp_path / "notes.txt").read_bytes() == "größer\n".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "notes.txt"
    write_text(path, "old")

    def fail(scratch):
        scratch.write_text("half")
        raise error

    with pytest.raises(error):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["notes.txt"]


def test_a_failing_writer_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "notes.txt", lambda scratch: 1 / 0)
    assert names(tmp_path) == []


def test_the_old_file_stays_while_the_new_one_is_written(tmp_path):
    path, seen = tmp_path / "picture.png", []
    write_text(path, "old")

    def write(scratch):
        scratch.write_text("new")
        seen.append((path.read_text(), scratch.parent, scratch.suffix))

    write_whole(path, write)
    assert seen == [("old", tmp_path, ".png")]  # beside it: moved within one file system; same kind for savefig
    assert path.read_text() == "new"


def test_json_is_indented_and_ends_with_a_line_break(tmp_path):
    path = tmp_path / "scores.json"
    write_json(path, {"scores": [1.5, None], "name": "x"})
    text = path.read_text()
    assert json.loads(text) == {"scores": [1.5, None], "name": "x"}
    assert text.endswith("\n")
    assert len(text.splitlines()) > 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_no_json_are_refused(tmp_path, value):
    path = tmp_path / "scores.json"
    write_json(path, {"score": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"score": [value]})
    assert json.loads(path.read_text()) == {"score": 1.0}
    assert names(tmp_path) == ["scores.json"]


def test_objects_that_are_no_json_are_refused(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "scores.json", {"score": torch.ones(1)})
    assert names(tmp_path) == []


# -- the picture ------------------------------------------------------------------------------------------------------

GREY = (0xE6, 0xE6, 0xE6)  # of sites without rank


@pytest.fixture(scope="module")
def space():
    """Three layers of BERT: two LoRA roles and shortcuts of spans 1 to 3."""
    found = survey(make_backbone("bert"))
    include = [{"kind": "lora", "role": "q"}, {"kind": "lora", "role": "down"}, "shortcut"]
    return SearchSpace(include, [], None, [1, 2, 3], False, "kind").resolve(found)


def allocate(space, **ranks):
    """Rank 0 but for the sites given as ``q_0=4``."""
    given = {f"{key[-1]}.{key[:-2]}": rank for key, rank in ranks.items()}
    assert given.keys() <= {site.name for site in space.sites}
    return Allocation({site.name: given.get(site.name, 0) for site in space.sites}, 0, None)


def test_the_grid_has_a_row_for_each_role_and_span(space):
    roles, layers, grid = rank_grid(space, allocate(space, q_0=4, down_2=8, shortcut_ffn_1=2, shortcut_attn_s3_2=16))
    rows = dict(zip(roles, grid, strict=True))
    assert layers == [0, 1, 2]
    assert rows == {
        "q": [4, 0, 0],
        "down": [0, 0, 8],
        "residual_attn": [0, 0, 0],
        "residual_ffn": [0, 0, 0],
        "shortcut_attn": [0, 0, 0],
        "shortcut_ffn": [None, 2, 0],  # none ends in layer 0
        "shortcut_attn_s3": [None, 0, 16],
        "shortcut_ffn_s3": [None, 0, 0],
    }


def test_linear_layers_come_first_and_short_spans_before_long_ones(space):
    roles, _, _ = rank_grid(space, allocate(space))
    assert set(roles[:2]) == {"q", "down"}
    assert set(roles[2:4]) == {"residual_attn", "residual_ffn"}
    assert set(roles[4:6]) == {"shortcut_attn", "shortcut_ffn"}
    assert set(roles[6:]) == {"shortcut_attn_s3", "shortcut_ffn_s3"}


def test_layers_without_a_site_keep_their_column():
    found = survey(make_backbone("bert"))
    middle = SearchSpace([{"kind": "lora", "role": "v"}], [], [1], [1], False, "kind").resolve(found)
    roles, layers, grid = rank_grid(middle, allocate(middle, v_1=3))
    assert (roles, layers, grid) == (["v"], [0, 1, 2], [[None, 3, None]])


def drawn(space, allocation, path):
    """Pixels of the picture."""
    draw_allocation(space, allocation, "a title", path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    pixels = np.round(imread(path)[..., :3] * 255).astype(int)
    assert pixels.shape == (height, width, 3)
    return pixels


def share_of(colour, pixels):
    return (pixels == colour).all(-1).mean()


def test_the_picture_is_a_png_without_scratch_beside_it(space, tmp_path):
    pixels = drawn(space, allocate(space, q_0=4, down_2=8), tmp_path / "allocation.png")
    assert names(tmp_path) == ["allocation.png"]
    assert min(pixels.shape[:2]) > 200


def test_sites_without_rank_are_grey_and_others_are_not(space, tmp_path):
    none = share_of(GREY, drawn(space, allocate(space), tmp_path / "none.png"))
    some = share_of(GREY, drawn(space, allocate(space, q_0=4, q_1=4, q_2=4), tmp_path / "some.png"))
    everywhere = Allocation({site.name: 4 for site in space.sites}, 0, None)
    assert none > 0.3
    assert some == pytest.approx(none * (1 - 3 / len(space.sites)), rel=0.1)  # three cells less
    assert share_of(GREY, drawn(space, everywhere, tmp_path / "all.png")) < 0.01


def test_ranks_that_differ_have_colours_that_differ(space, tmp_path):
    pictures = [
        drawn(space, allocate(space, q_0=8, q_1=low), tmp_path / f"{low}.png") for low in (1, 8)
    ]  # the largest rank, and so the scale, is the same
    assert (pictures[0] != pictures[1]).any(-1).mean() > 0.5 / len(space.sites) * share_of(GREY, pictures[0])


def test_a_failing_picture_keeps_the_old_one(space, tmp_path, monkeypatch):
    path = tmp_path / "allocation.png"
    before = drawn(space, allocate(space), path)

    def fail(self, *args, **options):
        raise MemoryError

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(MemoryError):
        draw_allocation(space, allocate(space, q_0=4), "a title", path)
    assert np.array_equal(np.round(imread(path)[..., :3] * 255).astype(int), before)
    assert names(tmp_path) == ["allocation.png"]


# -- the table --------------------------------------------------------------------------------------------------------


def make_summary(**changes):
    values = {
        "title": "rte, tiny_bert",
        "metrics": {"validation": {"accuracy": 0.51234, "f1": 0.6}, "test": {"accuracy": 0.498761}},
        "collapsed": {"validation": False, "test": False},
        "parameters": {"held": 12345, "active": 2345, "budget": 15000, "unspent": 2655, "head": 770},
        "sites": {"active": 5, "candidates": 40},
        "seconds": {"search": 1.26, "training": 61.0},
        "peak_memory_mib": 1234.5,
        "data": {"note": "official splits"},
        "folder": "outputs/one/run",
    }
    return values | changes


def shown(summary):
    """The table as lines of label and value."""
    out = io.StringIO()
    Console(file=out, width=110).print(summary_table(summary))
    return out.getvalue()


def row(text, label):
    (line,) = [line for line in text.splitlines() if label in line]
    return line.replace("│", " ").split(label, 1)[1].strip()


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("validation accuracy", "0.5123"),
        ("validation f1", "0.6000"),
        ("test accuracy", "0.4988"),
        ("adapter parameters, held", "12,345"),
        ("adapter parameters, active", "2,345"),
        ("budget", "15,000"),
        ("unspent", "2,655"),
        ("head parameters (apart)", "770"),
        ("sites with rank", "5 of 40"),
        ("search", "1.3 s"),
        ("training", "61.0 s"),
        ("peak memory", "1,234 MiB"),
        ("splits", "official splits"),
        ("folder", "outputs/one/run"),
    ],
)
def test_the_table_shows_every_number(label, value):
    assert row(shown(make_summary()), label) == value


def test_the_table_has_its_title_and_no_collapse():
    text = shown(make_summary())
    assert "rte, tiny_bert" in text
    assert "COLLAPSED" not in text


@pytest.mark.parametrize(("collapsed", "other"), [("validation", "test"), ("test", "validation")])
def test_a_collapsed_split_is_shown(collapsed, other):
    text = shown(make_summary(collapsed={collapsed: True, other: False}))
    assert row(text, f"{collapsed} COLLAPSED") == "every example gets (nearly) the same prediction"
    assert f"{other} COLLAPSED" not in text


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_metric_that_is_not_defined_says_so(value):
    text = shown(make_summary(metrics={"validation": {"pearson": 0.5}, "test": {"pearson": value}}))
    assert row(text, "test pearson") == "not defined"
    assert row(text, "validation pearson") == "0.5000"


def test_every_test_split_is_shown():
    metrics = make_summary()["metrics"] | {"test_mismatched": {"accuracy": 0.25}}
    collapsed = {"validation": False, "test": False, "test_mismatched": True}
    text = shown(make_summary(metrics=metrics, collapsed=collapsed))
    assert row(text, "test_mismatched accuracy") == "0.2500"
    assert "test_mismatched COLLAPSED" in text


def test_a_budget_of_sites_has_no_number_of_parameters():
    parameters = {"held": 12, "active": 12, "budget": None, "unspent": None, "head": 7}
    text = shown(make_summary(parameters=parameters))
    assert row(text, "budget") == "counts sites"
    assert "unspent" not in text


def test_the_summary_is_printed_wide_enough_for_a_folder(capsys):
    folder = "outputs/2026-01-01/12-00-00_rotten_tomatoes_spectral_s0/and/one/folder/more"
    print_summary(make_summary(folder=folder))
    assert folder in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["outputs/[old]/run", "outputs/layers=[/1]"])
def test_brackets_in_a_folder_are_no_markup(folder):
    # rich would drop the first and fail on the second, after hours of training
    assert row(shown(make_summary(folder=folder)), "folder") == folder


# -- memory -----------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not memory._STATUS.exists(), reason="needs /proc")


def test_peak_memory_is_that_of_a_process_with_torch():
    assert 50 < memory.peak_mib() < 2**20


@linux
def test_the_peak_grows_and_can_be_reset():
    try:
        memory._RESET.write_text("5")
    except OSError:
        pytest.skip("this system forbids it")
    memory.reset_peak()
    before = memory.peak_mib()
    block = np.ones(200 * 2**20, dtype=np.uint8)
    while_held = memory.peak_mib()
    del block
    after = memory.peak_mib()
    memory.reset_peak()
    assert while_held > before + 150
    assert after == pytest.approx(while_held, abs=20)  # a peak, not the present size
    assert memory.peak_mib() < before + 100


def test_a_system_that_forbids_the_reset_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_RESET", tmp_path)  # a folder cannot be written to
    memory.reset_peak()
    assert memory.peak_mib() > 0


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 2**20)])
def test_without_proc_the_peak_is_that_of_the_process(tmp_path, monkeypatch, platform, unit):
    # getrusage counts in KiB on Linux, in bytes on macOS
    usage = namedtuple("Usage", "ru_maxrss")(300 * unit)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nothing")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    if not torch.cuda.is_available():
        assert memory.peak_mib() == pytest.approx(300)


# -- progress ---------------------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_line_and_no_bar(caplog, capsys):
    with caplog.at_level(logging.INFO):
        assert list(track(iter([1, 2, 3]), "scoring", 3)) == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == ["scoring (3 batches)"]
    assert capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert list(track(iter([1, 2, 3]), "scoring", 3)) == [1, 2, 3]
    assert "scoring" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals_only(monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert TerminalBar().is_enabled is terminal


def make_trainer(state):
    metrics = {
        "validation/accuracy": torch.tensor(0.75),
        "validation/loss": torch.tensor(0.5),
        "train/loss": torch.ones(1),
    }
    values = {"current_epoch": 1, "max_epochs": 3, "global_step": 40, "callback_metrics": metrics}
    return SimpleNamespace(state=SimpleNamespace(fn=state), **values)


def test_each_epoch_is_one_line(caplog):
    with caplog.at_level(logging.INFO):
        EpochLog().on_validation_end(make_trainer(TrainerFn.FITTING), None)
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 2 of 3, step 40: validation/accuracy 0.7500, validation/loss 0.5000"
    ]


def test_an_evaluation_on_its_own_is_no_epoch(caplog):
    with caplog.at_level(logging.INFO):
        EpochLog().on_validation_end(make_trainer(TrainerFn.VALIDATING), None)
    assert not caplog.records


# -- loggers ----------------------------------------------------------------------------------------------------------


def test_csv_goes_to_the_runs_own_folder(tmp_path):
    logger = Csv().open(tmp_path, {}, None)
    assert isinstance(logger, CSVLogger)
    logger.log_metrics({"validation/accuracy": 0.5}, step=3)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,validation/accuracy", "3,0.5"]


def test_no_logger_is_false_for_lightning(tmp_path):
    assert Silent().open(tmp_path, {}, None) is False
    assert names(tmp_path) == []


def test_an_unknown_mode_of_wandb_is_refused():
    with pytest.raises(SettingError) as caught:
        Wandb("project", None, None, "sometimes")
    assert caught.value.setting == "mode"


def test_wandb_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingError, match=r"pip install 'heterolora\[wandb\]'"):
        Wandb("project", None, None, "offline").open(tmp_path, {}, None)
