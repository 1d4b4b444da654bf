"""The plain script that ``train.py`` is compared with: transformers' Trainer and PEFT, nothing of ours.

``python benchmarks/speed/peft_trainer.py --model FOLDER --data DATA/glue/MRPC --out OUT --seed 0`` fine-tunes on
MRPC as tutorials do (fast tokenizer, dynamic padding, an evaluation and a checkpoint each epoch) and writes
``OUT/result.json``.
"""

import argparse
import csv
import hashlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "msr_paraphrase_test.txt"}


def read(path: Path, limit: int | None) -> dict[str, list[Any]]:
    """Sentences and labels of one file of MRPC."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    return {
        "sentence1": [row["#1 String"] for row in rows],
        "sentence2": [row["#2 String"] for row in rows],
        "label": [int(row["Quality"]) for row in rows],
    }


def digest(table: dict[str, list[Any]]) -> str:
    """Of the rows, to prove that others train on the same."""
    lines = zip(table["sentence1"], table["sentence2"], table["label"], strict=True)
    return hashlib.sha256("\n".join(f"{a}\t{b}\t{label}" for a, b, label in lines).encode()).hexdigest()


def accuracy(found: Any) -> dict[str, float]:
    """For the Trainer."""
    return {"accuracy": float((np.argmax(found.predictions, axis=1) == found.label_ids).mean())}


def parse() -> argparse.Namespace:
    """What the command says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--limit", type=int, help="at most so many rows of each split")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--group-by-length", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Fine-tune, evaluate, save."""
    given = parse()
    warnings.filterwarnings("ignore", category=FutureWarning)
    set_seed(given.seed)
    tables = {split: read(given.data / name, given.limit) for split, name in FILES.items()}
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    def tokenise(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(rows["sentence1"], rows["sentence2"], truncation=True, max_length=given.max_length)

    data = {
        split: Dataset.from_dict(table).map(tokenise, batched=True, remove_columns=["sentence1", "sentence2"])
        for split, table in tables.items()
    }
    tokenising = time.perf_counter() - start

    config = AutoConfig.from_pretrained(given.model, num_labels=2)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = AutoModelForSequenceClassification.from_pretrained(given.model, config=config, dtype=torch.float32)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"]
    )  # fmt: skip
    model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        output_dir=str(given.out / "checkpoints"),
        num_train_epochs=given.epochs,
        max_steps=given.max_steps,
        per_device_train_batch_size=given.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=given.lr,
        weight_decay=0.01,
        warmup_steps=0.06,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        seed=given.seed,
        train_sampling_strategy="group_by_length" if given.group_by_length else "random",
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    outcome = trainer.train()
    last = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    tested = trainer.predict(data["test"], metric_key_prefix="test").metrics
    trainer.save_model(str(given.out / "adapter"))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    result = {
        "validation_accuracy": last,
        "test_accuracy": tested["test_accuracy"],
        "training_seconds": outcome.metrics["train_runtime"],
        "tokenising_seconds": tokenising,
        "steps": trainer.state.global_step,
        "held": sum(size for name, size in trained.items() if "lora_" in name),
        "head": sum(size for name, size in trained.items() if "lora_" not in name),
        "rows": {split: len(table["label"]) for split, table in tables.items()},
        "digest": {split: digest(table) for split, table in tables.items()},
        "threads": torch.get_num_threads(),
    }
    (given.out / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
