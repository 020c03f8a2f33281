"""Private fine-tuning with a loop of one's own: MiniLM learns the sentiment of reviews.

    python examples/own_loop.py [RECORDS]

`make venv` fetches model and sentences. All records take a few minutes on 2 cores.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.federated.data import load_demo, train_test_split
from ffa_kernels.federated.models import build_minilm_classifier

SENTENCES = Path(__file__).parents[1] / ".cache" / "demo" / "vaderSentiment-3.3.2.tar.gz"
PROMPTS = [["I hate it.", "It broke at once."], ["I love it.", "It works well."]]
EPOCHS, DELTA = 3, 1e-5


def encoded(sentences):
    options = {"padding": "max_length", "truncation": True, "max_length": 40}
    tokens = tokenizer(sentences.texts, return_token_type_ids=False, return_tensors="pt", **options)
    return TensorDataset(*tokens.values(), torch.tensor(sentences.labels))


@torch.no_grad()
def accuracy(records):
    model.eval()
    right = [model(x, mask).logits.argmax(1) == y for x, mask, y in DataLoader(records, 64)]
    return torch.cat(right).float().mean()


model, tokenizer = build_minilm_classifier(2, prompts=PROMPTS)
train, test = train_test_split(load_demo(SENTENCES)["amazon"], 0.2)
limit = int(sys.argv[1]) if len(sys.argv) > 1 else len(train)
train, test = encoded(train.take(range(limit))), encoded(test.take(range(min(limit, len(test)))))
ffa.convert(model, r=8, alpha=16, target_modules=["value"], modules_to_save=["classifier"])
engine = ffa.PrivacyEngine()  # a site gives it ledger="ledger.jsonl", which remembers every run
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
    data_loader=DataLoader(train, batch_size=min(64, limit)),
    target_epsilon=8.0,
    target_delta=DELTA,
    epochs=EPOCHS,
    max_grad_norm=1.0,
)
for _ in range(EPOCHS):
    print(f"accuracy {accuracy(test):.3f}, epsilon {engine.get_epsilon(DELTA):.3f}")
    model.train()
    for input_ids, mask, labels in loader:
        F.cross_entropy(model(input_ids, mask).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
print(f"accuracy {accuracy(test):.3f}, epsilon {engine.get_epsilon(DELTA):.3f}: {engine.stats}")
