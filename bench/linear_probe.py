"""What the adapters must beat: a private linear probe on the demo's frozen features.

The same four sites, split, federation and epsilon as the demo, with a budget of its own: only the
head is trained, on features that are computed once. The noise is secret and new in each repeat.

    python bench/linear_probe.py path/to/vaderSentiment-3.3.2.tar.gz
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ffa_kernels.federated import report
from ffa_kernels.federated.data import Records, load_demo, train_test_split
from ffa_kernels.federated.models import build_minilm_classifier
from ffa_kernels.privacy import PrivacyEngine, noise_multiplier_for

RESULT = Path(__file__).parent / "results" / "linear_probe.json"


@dataclass(frozen=True)
class Settings:
    """Of the probe; `scale` multiplies the unit features so that weight and bias learn alike."""

    target_epsilon: float = 6.0
    target_delta: float = 1e-5
    rounds: int = 8
    local_steps: int = 5
    sample_rate: float = 0.1
    max_grad_norm: float = 6.0
    scale: float = 12.0
    lr: float = 0.5
    weights: str = "records"
    test_fraction: float = 0.2
    split_seed: int = 0
    max_length: int = 40
    repeats: int = 5


Site = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sdist", help="the source distribution of vaderSentiment 3.3.2")
    settings = Settings()
    sites = featurise(parser.parse_args().sdist, settings)
    runs = [train(sites, settings) for _ in range(settings.repeats)]
    accuracies = [accuracy for accuracy, _ in runs]
    result = {
        "what": "private linear probe on frozen mean-pooled MiniLM-L6 features, budget of its own",
        "settings": asdict(settings),
        "train_records": {name: len(train[1]) for name, (train, _) in sites.items()},
        "test_records": sum(len(test[1]) for _, test in sites.values()),
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_stdev": statistics.stdev(accuracies),
        "accuracies": accuracies,
        "epsilon": max(epsilon for _, epsilon in runs),
        "environment": report.environment(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"accuracy {result['accuracy_mean']:.4f} +- {result['accuracy_stdev']:.4f} at epsilon "
        f"{result['epsilon']:.3f} a site, over {settings.repeats} repeats"
    )


@torch.no_grad()
def featurise(sdist: str, settings: Settings) -> dict[str, Site]:
    """For each site, ((features (n, 384), labels (n,)) for training, the same held out)."""
    model, tokenizer = build_minilm_classifier(2)
    model.eval()

    def of(records: Records) -> tuple[Tensor, Tensor]:
        features = torch.empty(len(records), model.classifier.in_features)
        order = sorted(range(len(records)), key=lambda i: len(records.texts[i]))
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            inputs = tokenizer(
                records.take(chosen).texts,
                padding=True,
                truncation=True,
                max_length=settings.max_length,
                return_tensors="pt",
            )
            features[chosen] = model.features(model.pooled(**inputs)) * settings.scale
        return features, torch.tensor(records.labels)

    sites = {}
    for name, records in load_demo(sdist).items():
        train, test = train_test_split(records, settings.test_fraction, settings.split_seed)
        sites[name] = (of(train), of(test))
    return sites


def train(sites: dict[str, Site], settings: Settings) -> tuple[float, float]:
    """(held-out accuracy pooled over the sites, largest epsilon of any site) of one federation."""
    width = next(iter(sites.values()))[0][0].shape[1]
    average = nn.Linear(width, 2)
    for parameter in average.parameters():
        nn.init.zeros_(parameter)
    steps = settings.rounds * settings.local_steps
    local = {}
    for name, (data, _) in sites.items():
        own, records = copy.deepcopy(average), len(data[1])
        batch_size = round(settings.sample_rate * records)
        engine = PrivacyEngine()
        noise = noise_multiplier_for(
            settings.target_epsilon, settings.target_delta, batch_size / records, steps
        )
        head, optimizer, loader = engine.make_private(
            module=own,
            optimizer=torch.optim.SGD(own.parameters(), lr=settings.lr),
            data_loader=DataLoader(TensorDataset(*data), batch_size=batch_size),
            noise_multiplier=noise,
            max_grad_norm=settings.max_grad_norm,
        )
        local[name] = (engine, head, optimizer, loader, records)

    total = sum(records for *_, records in local.values())
    for _ in range(settings.rounds):
        summed = {name: torch.zeros_like(t) for name, t in average.state_dict().items()}
        for _, head, optimizer, loader, records in local.values():
            head.load_state_dict(average.state_dict())
            done = 0
            while done < settings.local_steps:
                for x, y in loader:
                    F.cross_entropy(head(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
                    if done == settings.local_steps:
                        break
            for name, tensor in head.state_dict().items():
                summed[name] += tensor * (records / total)
        average.load_state_dict(summed)

    right = 0
    with torch.no_grad():
        for _, (x, y) in sites.values():
            right += int((average(x).argmax(dim=1) == y).sum())
    tested = sum(len(test[1]) for _, test in sites.values())
    return right / tested, max(e.get_epsilon(settings.target_delta) for e, *_ in local.values())


if __name__ == "__main__":
    main()
