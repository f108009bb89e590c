"""Plain DistributedDataParallel: each rank has its part of the batch, the loss is over all of it.

Look at: `hc.nonl_loss` needs no gather and no process group handed to it. The value is that of the global batch, the
same on every rank, and DDP's average of the gradients is exact, for uneven parts too.

    pip install '.[examples]'
    torchrun --nproc-per-node 2 examples/ddp.py     # NCCL where there are GPUs, Gloo elsewhere
"""

import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hypercontrast as hc


class Model(nn.Module):
    """The head is wrapped with the network, so that DDP averages the prototypes' gradient too."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = hc.PrototypeHead(32, num_classes=10)

    def forward(self, x):
        return self.head.embed(self.encoder(x))


gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if gpus else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
torch.manual_seed(0)
pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
pixels = pixels.float() / 16
train, test = TensorDataset(pixels[:1400], digits[:1400]), (pixels[1400:].to(device), digits[1400:].to(device))
sampler = DistributedSampler(train)
model = DistributedDataParallel(Model().to(device), device_ids=[device.index] if gpus else None)
head = model.module.head
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for epoch in range(8):
    sampler.set_epoch(epoch)
    for x, y in DataLoader(train, batch_size=100, sampler=sampler):
        loss = hc.nonl_loss(model(x.to(device)), head.prototypes, y.to(device), temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
if dist.get_rank() == 0:
    accuracy = hc.PrototypeClassifier(head.prototypes).predict(model(test[0])).eq(test[1]).float().mean()
    print(f"{dist.get_world_size()} ranks: loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy {accuracy:.3f}")
dist.destroy_process_group()
time.sleep(0.1)  # Gloo's threads have tensors to let go: one that finds Python ended aborts the process
