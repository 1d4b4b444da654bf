"""The model card of an exported adapter: what it is, what it was measured at, how it is loaded, what it lacks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from heterolora.sites import Site


@dataclass(frozen=True)
class Origin:
    """The run that an adapter comes from, as far as its card tells of it.

    Attributes:
        title: of the run.
        task: name of the task.
        text: text columns of the model's inputs, one tuple for each input of an example.
        max_length: tokens after which inputs were cut.
        labels: names of the classes, in the order of the logits; None: a number, or a score for each input.
        metrics: split -> metric -> value, None where it is not defined.
        collapsed: splits on which (nearly) the same was predicted for every example.
        note: which data the splits are.
        seed: of the run.
        model: the config's node: ``path``, ``gguf_file``, ``dtype`` where it has them.
        allocation: content of ``allocation.json``.
        versions: package -> version.
    """

    title: str
    task: str
    text: Sequence[Sequence[str]]
    max_length: int
    labels: Sequence[str] | None
    metrics: Mapping[str, Mapping[str, float | None]]
    collapsed: Sequence[str]
    note: str
    seed: int
    model: Mapping[str, Any]
    allocation: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what its check found.

    Attributes:
        modules: path of a linear layer -> rank, of what PEFT loads.
        sites: site name -> rank, of the same.
        missing: site name -> rank, of what is in ``shortcuts.safetensors`` alone.
        saved: paths of the modules that are stored whole: the head.
        parameters: trained parameters of the adapters that PEFT loads, and of all.
        fold_scale: whether the weights hold ``scale * B``.
        difference: largest difference between PEFT's logits and ours; None: there is nothing that PEFT could load.
        largest: largest logit, for comparison.
        dtype: of the backbone, in which they were computed.
        shared: path of a module -> others that hold its very weight, which a merge would change, too.
    """

    modules: Mapping[str, int]
    sites: Mapping[str, int]
    missing: Mapping[str, int]
    saved: Sequence[str]
    parameters: tuple[int, int]
    fold_scale: bool
    difference: float | None
    largest: float | None
    dtype: str
    shared: Mapping[str, Sequence[str]]


def hub_id(path: str | None) -> str | None:
    """The path, if it is an id on the hub and no folder or package."""
    if path is None or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) or Path(path).exists():
        return None
    return path


def model_card(sites: Sequence[Site], found: Exported, settings: Mapping[str, Any], origin: Origin | None) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        sites: the candidates, in order.
        found: what was exported.
        settings: arguments of ``from_pretrained`` that make the backbone as it was: ``num_labels``, ``pad_token_id``.
        origin: the run; None: the model was made by hand.
    """
    parts = [
        _front(origin, found),
        f"# {origin.title if origin else 'LoRA adapter with a rank of its own at each site'}\n",
        _summary(found, origin),
        *([_metrics(origin)] if origin and origin.metrics else []),
        "## Ranks\n\n" + _rank_table(sites, {**found.sites, **found.missing}),
        "## Loading it\n\n" + _loading(found, settings, origin),
        "## Limits\n\n" + _limits(found, origin),
        *(["## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in origin.versions.items()) + "\n"] if origin else []),
    ]
    return "\n".join(parts)


def _front(origin: Origin | None, found: Exported) -> str:
    base = hub_id(origin.model.get("path")) if origin else None
    values: dict[str, Any] = {"library_name": "peft" if found.modules else "heterolora"}
    if base is not None:
        values |= {"base_model": base, "base_model_relation": "adapter"}
    values |= {"pipeline_tag": "text-classification", "tags": ["heterolora", "lora"]}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _summary(found: Exported, origin: Origin | None) -> str:
    lines = []
    if origin is not None:
        provenance = origin.allocation.get("provenance", {})
        base = origin.model.get("path") or f"a random {origin.model.get('model_type', 'model')} for tests"
        lines += [
            f"- base model: `{base}`, weights with SHA-256 `{provenance.get('backbone', '?')}`",
            f"- task: {origin.task}, reads {_inputs(origin)}, at most {origin.max_length} tokens",
            f"- classes, in the order of the logits: {', '.join(f'`{x}`' for x in origin.labels)}"
            if origin.labels
            else "- one number for each input",
            f"- budget: {_number(origin.allocation['budget'])}, spent {_number(origin.allocation['spent'])} parameters",
        ]
    lines.append(f"- adapter parameters that PEFT loads: {found.parameters[0]:,} of {found.parameters[1]:,} held")
    lines.append(f"- LoRA modules: {len(found.modules)}; head stored whole: {', '.join(found.saved) or 'none'}")
    return "\n".join(lines) + "\n"


def _inputs(origin: Origin) -> str:
    return " or ".join(" and ".join(f"`{column}`" for column in columns) for columns in origin.text)


def _number(value: int | None) -> str:
    return "a number of sites" if value is None else f"{value:,}"


def _metrics(origin: Origin) -> str:
    rows = [
        f"| {split} | {name} | {'not defined' if value is None else f'{value:.4f}'} |"
        for split, values in origin.metrics.items()
        for name, value in values.items()
    ]
    head = f"## Measured\n\nSeed {origin.seed}, one run. Splits: {origin.note}.\n"
    whole = "These are of the whole model, shortcuts included where it has any.\n"
    if origin.collapsed:
        splits = " and ".join(origin.collapsed)
        whole += f"\n**The model gives (nearly) the same prediction for every example of {splits}.**\n"
    return "\n".join([head + whole, "| split | metric | value |", "|---|---|---|", *rows]) + "\n"


def _rank_table(sites: Sequence[Site], ranks: Mapping[str, int]) -> str:
    """Layers down, roles across; empty where there is no candidate."""
    streams = list(dict.fromkeys(site.stream for site in sites))
    tables = []
    for stream in streams:
        own = [site for site in sites if site.stream == stream]
        labels = list(dict.fromkeys(site.label for site in own))
        cells = {(site.layer, site.label): str(ranks.get(site.name, 0)) for site in own}
        rows = [
            f"| {layer} | " + " | ".join(cells.get((layer, label), "") for label in labels) + " |"
            for layer in sorted({site.layer for site in own})
        ]
        tables.append("\n".join([f"| layer | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|", *rows]) + "\n")
    return "\n".join(tables)


def _loading(found: Exported, settings: Mapping[str, Any], origin: Origin | None) -> str:
    node = origin.model if origin else {}
    base, where = str(node.get("path") or "BASE_MODEL"), ""
    if base.startswith("package:"):
        package, _, folder = base.removeprefix("package:").partition("/")
        base, where = "BASE_MODEL", f"# BASE_MODEL: the folder {folder} of the Python package {package}\n"
    more = {key: node[key] for key in ("gguf_file", "dtype") if node.get(key) not in (None, "float32")}
    arguments = ", ".join(f"{key}={value!r}" for key, value in {**settings, **more}.items())
    text = ""
    if found.modules:
        text += (
            "With PEFT (padding goes to the right):\n\n```python\n"
            "from peft import PeftModel\nfrom transformers import AutoModelForSequenceClassification\n\n"
            f'{where}base = AutoModelForSequenceClassification.from_pretrained("{base}", {arguments})\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()\n```\n\n'
        )
    whole = "" if not found.missing else ", shortcuts included"
    call = 'heterolora.load("THIS_FOLDER")' if origin else 'heterolora.from_peft(model, "THIS_FOLDER")'
    return text + (
        f"With heterolora{whole}; base models with other weights are refused:\n\n```python\n"
        f"import heterolora{'' if origin else '.peft_in'}\n\nmodel = {call}\n```\n"
    )


def _limits(found: Exported, origin: Origin | None) -> str:
    lines = []
    if found.missing:
        lines.append(
            f"- PEFT has no place for shortcuts between points of the residual stream: {len(found.missing)} of them "
            f"({found.parameters[1] - found.parameters[0]:,} parameters) are in `shortcuts.safetensors` alone. "
            "**What PEFT loads is another function than the one that was trained and measured.**"
        )
    if found.difference is not None:
        against = "the model with its shortcuts switched off" if found.missing else "the model"
        lines.append(
            f"- Checked when written: logits of PEFT {version('peft')} differ from those of {against} by at most "
            f"{found.difference:.1e} (largest logit {found.largest:.3g}, one batch, {found.dtype})."
        )
    for module, others in found.shared.items():
        lines.append(
            f"- **Do not merge with PEFT** (`merge_and_unload`): the weight of `{module}` is that of "
            f"{', '.join(f'`{other}`' for other in others)}, too, and the merged model is another function."
        )
    if found.dtype not in ("float32", "float64"):
        lines.append(
            f"- The head was trained in float32 on a {found.dtype} base model. PEFT loads it in {found.dtype}, which "
            "rounds it; the file holds all digits."
        )
    if found.modules and found.fold_scale:
        lines.append("- The scale is part of `lora_B`, so that readers that know `r` and `lora_alpha` alone are right.")
    elif found.modules:
        lines.append("- The scale is in `alpha_pattern` and `lora_alpha`: readers that ignore patterns are wrong.")
    if origin is not None:
        lines.append("- One training run on one task; nothing is known about other data.")
    return "\n".join(lines) + "\n"
