"""A loop of one's own with autocast: moods of sentences on MiniLM, and the three calls that an adapter needs.

python examples/trainers/bare_loop.py
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

import svdpeft

GLAD = ("What a lovely day.", "I enjoyed every minute.", "She sang with joy.", "This is the best gift ever.")
SAD = ("What a dreadful day.", "I regret every minute.", "She wept in grief.", "This is the worst loss ever.")
PEAK, STEPS = 3e-3, 12


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = svdpeft.models.load("minilm-l6", num_classes=2)
    model = loaded.model.to(device)
    batch = loaded.processor([*GLAD, *SAD], return_tensors="pt", padding=True).to(device)
    labels = torch.tensor([0] * len(GLAD) + [1] * len(SAD), device=device)

    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=4, gamma=1e-2), ["query", "value"], train=[loaded.head])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=PEAK)
    schedule = LinearLR(optimizer, 1.0, 0.1, STEPS)
    model.train()
    for step in range(STEPS):
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(**batch).logits, labels)
        if (penalty := adapter.penalty()) is not None:  # 1: of methods that add to the loss
            loss = loss + penalty
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        adapter.before_step(PEAK, STEPS)  # 2: of methods that change gradients, after clipping
        optimizer.step()
        adapter.after_step(schedule.get_last_lr()[0] / PEAK)  # 3: of methods that change the factors
        schedule.step()
        optimizer.zero_grad()
        if step in (0, STEPS - 1):
            print(f"step {step + 1}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        right = (model(**batch).logits.argmax(-1) == labels).sum()
    print(f"right: {int(right)} of {len(labels)}; {adapter}")


if __name__ == "__main__":
    main()
