"""A timm network with timm's optimiser and schedule: `num_classes=0` gives the features, the head gives the prototypes.

Look at: the pooled features go to the loss as they are. Most timm networks end in a norm, so features can be negative
and the simplex is within reach; after a ReLU and pooling add `neck="linear"`, as here.

    pip install '.[examples]'
    python examples/timm_loop.py
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter
from torch.utils.data import DataLoader, TensorDataset

import hypercontrast as hc

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
images = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, size=32, mode="bilinear")
train = DataLoader(TensorDataset(images[:1400], digits[:1400]), batch_size=100, shuffle=True)
test = images[1400:].to(device), digits[1400:].to(device)

backbone = timm.create_model("test_resnet", in_chans=1, num_classes=0).to(device)
head = hc.PrototypeHead(backbone.num_features, num_classes=10, neck="linear").to(device)
model = torch.nn.ModuleDict({"backbone": backbone, "head": head})
optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.02)
epochs = 4
schedule = CosineLRScheduler(optimizer, t_initial=epochs)

means = []
for epoch in range(epochs):
    model.train()
    meter = AverageMeter()
    for x, y in train:
        x, y = x.to(device), y.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features = head.embed(backbone(x))
        loss = hc.nonl_loss(features, head.prototypes, y, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        meter.update(loss.item(), len(x))
    schedule.step(epoch + 1)
    means.append(meter.avg)

model.eval()
with torch.no_grad():
    accuracy = head(backbone(test[0])).argmax(1).eq(test[1]).float().mean()
print(f"loss {means[0]:.2f} -> {means[-1]:.2f}, accuracy {accuracy:.3f}")
