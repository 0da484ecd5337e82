"""Four tasks in one batch: `task` is a mode of the update, bound for each row when the model is called."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

import tensorpeft as tp


def main() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = BertModel(BertConfig(**size, num_attention_heads=4)).eval()
    adapter = tp.attach(model, tp.load_spec("shared_a", tasks=4))
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.normal_()  # as if trained: otherwise every task's update is still zero

        tokens = torch.randint(100, (6, 12))
        tasks = torch.tensor([0, 3, 1, 1, 2, 0])
        with adapter.tasks(tasks):
            together = model(tokens).last_hidden_state
        for row, task in enumerate(tasks):
            with adapter.tasks(task[None]):
                alone = model(tokens[row][None]).last_hidden_state[0]
            with adapter.disabled():
                base = model(tokens[row][None]).last_hidden_state[0]
            from_alone, from_base = ((together[row] - other).abs().max().item() for other in (alone, base))
            print(
                f"row {row}, task {task}: differs from the base by {from_base:.2f}, from the row run alone by {from_alone:.0e}"
            )


if __name__ == "__main__":
    main()
