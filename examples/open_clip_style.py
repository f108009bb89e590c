"""Image-text contrastive learning as open_clip does it: both directions, a learned temperature, any number of ranks.

Look at: `clip_loss`. `gather_with_grad` sends gradients back, so DDP's average is exact; no logits are ever stored.

    pip install '.[examples]' && torchrun --nproc-per-node 2 examples/open_clip_style.py
"""

import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import hypercontrast as hc


def clip_loss(images, texts, temperature):
    """(image to texts + text to images) / 2, a mean over the pairs of all ranks. Ranks number their pairs apart."""
    pairs = torch.arange(len(images), device=images.device) + (dist.get_rank() << 40 if dist.is_initialized() else 0)
    all_images, all_texts, all_pairs = map(hc.gather_with_grad, (images, texts, pairs))
    options = {"ref_labels": all_pairs, "temperature": temperature}
    to_texts = hc.supcon_loss(images, pairs, ref_features=all_texts, **options)
    return (to_texts + hc.supcon_loss(texts, pairs, ref_features=all_images, **options)) / 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.text = nn.Sequential(nn.EmbeddingBag(128, 64, mode="sum", padding_idx=32), nn.ReLU(), nn.Linear(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, pixels, captions):
        letters = torch.tensor([list(caption.ljust(10).encode()) for caption in captions])
        return self.image(pixels), self.text(letters), self.logit_scale.neg().exp()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    prompts = [f"{('thin', 'bold')[b]} {names[y]}" for b, y in zip(pixels.mean(1) > pixels.mean(), digits, strict=True)]
    pixels, losses, model = pixels.float() / 16, [], nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for rows in torch.cat([torch.randperm(1400) for _ in range(8)]).split(200):
        mine = rows[dist.get_rank() :: dist.get_world_size()]
        loss = clip_loss(*model(pixels[mine], [prompts[i] for i in mine]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    images, texts, _ = model(pixels[1400:], [f"{kind} {name}" for name in names for kind in ("bold", "thin")])
    accuracy = (hc.PrototypeClassifier(texts).predict(images) // 2).eq(digits[1400:]).float().mean()
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, zero-shot accuracy {accuracy:.3f}")
    dist.destroy_process_group()
    time.sleep(0.1)  # as in ddp.py
