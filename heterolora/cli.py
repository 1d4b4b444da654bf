"""``python -m heterolora sites | evaluate | predict | merge | table | report | wandb``: a backbone, one run, many."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from heterolora.errors import SettingError

DTYPES = ("float32", "float64", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code. Errors that a user can mend are one line on stderr."""
    parser = argparse.ArgumentParser(prog="heterolora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sites = commands.add_parser("sites", help="print the sites, taps and costs of a backbone (no weights are read)")
    sites.add_argument("overrides", nargs="*", help="as for train.py, e.g. model=tiny_llama search_space=lora_qv")
    sites.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sites.set_defaults(run=_sites)

    evaluate = commands.add_parser("evaluate", help="metrics of a finished run, on one of its splits or on a file")
    evaluate.add_argument("folder", metavar="RUN", help="folder of the run")
    evaluate.add_argument("--split", default="test", help="validation, test, ... (default: test)")
    evaluate.add_argument(
        "--file",
        type=Path,
        help="a labelled file instead: .csv, .tsv, .jsonl, .json, .parquet; or one of the task's own",
    )
    evaluate.add_argument("--label", help="its label column (default: as in the run)")
    evaluate.add_argument("--data-root", help="folder with local data sets (default: as in the run)")
    evaluate.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    evaluate.set_defaults(run=_evaluate)

    predict = commands.add_parser("predict", help="predictions of a finished run for new texts, as CSV")
    predict.add_argument("folder", metavar="RUN", help="folder of the run")
    predict.add_argument(
        "--file", type=Path, help="texts: .csv, .tsv, .jsonl, .json or .parquet with the task's columns"
    )
    predict.add_argument(
        "--text", nargs="+", action="append", help="an example: a text, or as many as the task reads (-- before a dash)"
    )
    predict.add_argument("--output", type=Path, help="file for the CSV (default: stdout)")
    predict.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    predict.set_defaults(run=_predict)

    merge = commands.add_parser("merge", help="a plain checkpoint of a finished run, its LoRA folded into the weights")
    merge.add_argument("folder", metavar="RUN", help="folder of the run")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    merge.add_argument("--dtype", choices=DTYPES, help="of its weights (default: as in the run)")
    merge.set_defaults(run=_merge)

    table = commands.add_parser("table", help="compare the runs below a folder: a sweep's, or a tournament's")
    table.add_argument("folder", metavar="DIR", type=Path, help="folder with runs; unfinished ones are left out")
    table.add_argument("--split", help="test, validation, ... (default: test where all runs have it)")
    table.add_argument("--metric", help="e.g. accuracy, loss (default: the task's first)")
    table.add_argument("--baseline", metavar="GROUP", help="compare the others with this group, pair by pair of seeds")
    table.add_argument("--primary", metavar="GROUP", help="the one comparison that was chosen beforehand")
    table.add_argument("--tolerance", type=float, default=0.01, help="share by which parameters may differ (0.01)")
    table.add_argument("--unequal", action="store_true", help="mix unequal parameters and steps, and mark them")
    table.add_argument("--format", choices=["terminal", "csv", "markdown", "latex"], default="terminal")
    table.add_argument("--output", type=Path, help="file for it (default: stdout)")
    table.set_defaults(run=_table)

    report = commands.add_parser("report", help="one HTML page about runs: allocations, scores, curves, a table")
    report.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run, or a folder with runs")
    report.add_argument("--output", type=Path, metavar="FILE.html", help="the page (default: report.html in DIR)")
    report.set_defaults(run=_report)

    wandb = commands.add_parser("wandb", help="the W&B runs that were written offline below a folder")
    wandb.add_argument("folder", metavar="DIR", type=Path, help="a run, a sweep or all outputs")
    wandb.add_argument("--sync", action="store_true", help="upload those that the server does not have")
    wandb.set_defaults(run=_wandb)

    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except SettingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _sites(given: argparse.Namespace) -> None:
    from heterolora.report.sites import print_sites, sites_report
    from heterolora.run import compose
    from heterolora.space import survey

    parts = compose(given.overrides)
    skeleton = parts["model"].skeleton(2)
    space = parts["search_space"].resolve(survey(skeleton.model, skeleton.layout))
    report = sites_report(space, parts["adapter"], parts["budget"].resolve(space))
    if given.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        print_sites(report)


def _evaluate(given: argparse.Namespace) -> None:
    from heterolora.data.module import read_labelled
    from heterolora.loading import load_run
    from heterolora.report.summary import print_metrics

    loaded = load_run(given.folder, given.device, given.data_root)
    if given.file is None:
        table, recorded = loaded.split(given.split), loaded.summary["metrics"].get(given.split, {})
    else:
        table, recorded = read_labelled(given.file, loaded.task, given.label, "--file"), {}
    place = f"split {given.split}" if given.file is None else str(given.file)
    print_metrics(f"{given.folder}: {place}, {len(table)} examples", loaded.evaluate(table), recorded)


def _predict(given: argparse.Namespace) -> None:
    import pandas as pd

    from heterolora.data.module import read_texts
    from heterolora.loading import load_run, texts_table
    from heterolora.report.files import write_whole

    if (given.file is None) == (given.text is None):
        raise SettingError("predict", "--file and --text", "give one of the two")
    _check_output(given.output)
    loaded = load_run(given.folder, given.device)
    if given.file is None:
        table = texts_table(loaded.task, given.text)
    else:
        table = read_texts(given.file, loaded.task, "--file")  # all columns, such as ids, come out again
    found: Any = loaded.predict(table).drop(columns="index")
    found = found.rename(columns={name: _unused(name, [*table, *found]) for name in found if name in table})
    joined = pd.concat([table.reset_index(drop=True), found], axis=1)
    if given.output is None:
        joined.to_csv(sys.stdout, index=False)
    else:
        write_whole(given.output, partial(joined.to_csv, index=False))


def _merge(given: argparse.Namespace) -> None:
    from heterolora.export import ExportError
    from heterolora.loading import load_run
    from heterolora.merge import merge
    from heterolora.report.files import check_new_folder

    check_new_folder(given.out, "OUT")  # before anything is loaded
    try:
        found = merge(load_run(given.folder), given.out, given.dtype)
    except ExportError as error:
        raise SettingError("RUN", given.folder, str(error)) from error
    sys.stdout.write(
        f"{given.out}: {found.folded} LoRA modules folded into {found.dtype} weights; loaded again, its logits differ "
        f"by at most {found.difference:.1e} (the largest is {found.largest:.3g})\n"
    )
    if found.missing:
        sys.stdout.write(
            f"{len(found.missing)} shortcuts cannot be folded and are in {given.out}/shortcuts.safetensors: "
            f'transformers loads the model without them, heterolora.load("{given.out}") with them\n'
        )


def _table(given: argparse.Namespace) -> None:
    from heterolora.report.files import write_text
    from heterolora.tables import FORMATS, TableSettings, table_of

    if given.output is not None and given.format == "terminal":
        raise SettingError("--output", given.output, f"needs --format, one of {list(FORMATS)}")
    _check_output(given.output)
    try:
        settings = TableSettings(
            split=given.split,
            metric=given.metric,
            baseline=given.baseline,
            primary=given.primary,
            tolerance=given.tolerance,
            unequal=given.unequal,
        )
    except SettingError as error:
        raise SettingError(f"--{error.setting}", error.given, error.possible) from None
    table = table_of(given.folder, settings)
    if given.format == "terminal":
        table.show()
    elif given.output is None:
        sys.stdout.write(FORMATS[given.format](table.sections))
    else:
        write_text(given.output, FORMATS[given.format](table.sections))
    if table.missing:
        sys.stderr.write(f"{table.missing}\n")


def _report(given: argparse.Namespace) -> None:
    from heterolora.page.render import write_page

    if given.output is None and len(given.folders) > 1:
        raise SettingError("--output", None, "several folders need the name of a file for their page")
    _check_output(given.output)
    path = given.output or given.folders[0] / "report.html"
    collected = write_page(given.folders, path)
    for note in collected.notes:
        sys.stderr.write(f"{note}\n")
    sys.stdout.write(f"{path}\n")


def _wandb(given: argparse.Namespace) -> None:
    from heterolora.wandb_runs import find_wandb_runs, sync

    runs = find_wandb_runs(given.folder)
    for run in runs:
        state = "synced" if run.synced else "offline"
        sys.stdout.write(f"{state}  {run.id}  {run.group or '-'}  {run.name}  {run.folder}\n")
    if given.sync:
        sync(runs)
    elif any(not run.synced for run in runs):
        sys.stdout.write(f"to upload them: python -m heterolora wandb {given.folder} --sync\n")


def _check_output(path: Path | None) -> None:
    if path is not None and ((path.exists() and not path.is_file()) or not path.parent.is_dir()):
        raise SettingError("--output", path, "needs the name of a file, in a folder that exists")


def _unused(name: str, taken: Sequence[str]) -> str:
    """The name of a column, with as many endings as it takes to be new."""
    while name in taken:
        name += "_of_run"
    return name
