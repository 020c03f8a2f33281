"""A PEFT model in, private training, an adapter out that PEFT loads: MiniLM on rated reviews.

    python examples/peft_in_out.py [RECORDS] [FOLDER]

`make venv` fetches model and sentences. All records take a few minutes on 2 cores.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.federated.data import load_demo
from ffa_kernels.federated.models import build_minilm_classifier

SENTENCES = Path(__file__).parents[1] / ".cache" / "demo" / "vaderSentiment-3.3.2.tar.gz"
PROMPTS = [["I hate it.", "It broke at once."], ["I love it.", "It works well."]]
EPOCHS, DELTA = 2, 1e-5

base, tokenizer = build_minilm_classifier(2, prompts=PROMPTS)
reviews = load_demo(SENTENCES)["amazon"]
limit = int(sys.argv[1]) if len(sys.argv) > 1 else len(reviews)
folder = sys.argv[2] if len(sys.argv) > 2 else "adapter"
reviews = reviews.take(range(limit))
options = {"padding": "max_length", "truncation": True, "max_length": 40, "return_tensors": "pt"}
tokens = tokenizer(reviews.texts, return_token_type_ids=False, **options)
records = TensorDataset(*tokens.values(), torch.tensor(reviews.labels))

lora = LoraConfig(r=8, lora_alpha=16, target_modules=["value"], modules_to_save=["classifier"])
model = ffa.convert(get_peft_model(base, lora)).train()
engine = ffa.PrivacyEngine()  # a site gives it ledger="ledger.jsonl", which remembers every run
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
    data_loader=DataLoader(records, batch_size=min(64, limit)),
    target_epsilon=8.0,
    target_delta=DELTA,
    epochs=EPOCHS,
    max_grad_norm=1.0,
)
for _ in range(EPOCHS):
    for input_ids, mask, labels in loader:
        F.cross_entropy(model(input_ids, mask).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
ffa.save_adapter(model, folder)

fresh, _ = build_minilm_classifier(2, prompts=PROMPTS)
loaded = PeftModel.from_pretrained(fresh, folder)
with torch.no_grad():
    same = [m.eval()(*records[:8][:2]).logits for m in (model, loaded)]
print(f"epsilon {engine.get_epsilon(DELTA):.3f}; {folder} holds {sorted(loaded.peft_config)}")
print(f"logits differ by at most {(same[0] - same[1]).abs().max():.1e} from PEFT's")
