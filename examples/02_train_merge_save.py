"""The life of an adapter on a small random Llama: attach, train, merge, save, load, detach."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=8, num_key_value_heads=2)).eval()


def main() -> None:
    model = small_llama()
    tokens = torch.randint(256, (4, 32))
    adapter = tp.attach(model, tp.load_spec("lorta", alpha=64))
    print(adapter, end="\n\n")

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    for step in range(41):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss.item():.3f}")

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = model(tokens).logits
        adapter.merge()
        print(f"\nmerged:   the logits differ by {(model(tokens).logits - trained).abs().max().item():.1e}")
        adapter.unmerge()

        adapter.save(folder)
        other = small_llama()
        tp.load(other, folder)
        print(f"reloaded: the logits differ by {(other(tokens).logits - trained).abs().max().item():.1e}")

        adapter.detach()
        base = small_llama()
        same = all(map(torch.equal, model.state_dict().values(), base.state_dict().values()))
        print(f"detached: the model is bit for bit the base: {same}")


if __name__ == "__main__":
    main()
