"""A method class in the style of solo-learn: its loss function swapped, the rest of the method left as it is.

Look at: `training_step`. solo-learn hands over the sample's index, its views and its target; views are encoded one by
one and stacked view after view. Repeated targets as labels give SupCon, repeated indices SimCLR. (solo-learn's own
function sums positives inside the log: `variant="in"` has its gradient.) Its base class stands in `nn.Module`'s place.

    pip install '.[examples]'
    python examples/solo_style.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, StackDataset

import hypercontrast as hc


class SupCon(nn.Module):
    def __init__(self, temperature=0.1, proj_output_dim=32):
        super().__init__()
        self.temperature = temperature
        self.backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, proj_output_dim))

    def forward(self, x):
        feats = self.backbone(x)
        return {"feats": feats, "z": self.projector(feats)}

    def training_step(self, batch, batch_idx):
        _, views, targets = batch
        z = torch.cat([self(x)["z"] for x in views])
        return hc.supcon_loss(z, targets.repeat(len(views)), temperature=self.temperature)


def two_views(x):
    """Each a picture shifted by up to one pixel, with noise."""
    images = x.view(-1, 8, 8)
    shifts = torch.randint(-1, 2, (2, 2)).tolist()
    return [(images.roll(shift, (1, 2)) + 0.1 * torch.randn(images.shape)).flatten(1) for shift in shifts]


torch.manual_seed(0)
pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
pixels = pixels.float() / 16
loader = DataLoader(StackDataset(torch.arange(1400), pixels[:1400], digits[:1400]), batch_size=200, shuffle=True)
method, losses = SupCon(), []
optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
for _ in range(10):
    for step, (indices, x, targets) in enumerate(loader):
        loss = method.training_step((indices, two_views(x), targets), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
means = hc.ClassMeans(num_classes=10, dim=32)
means.update(method(pixels[:1400])["z"].detach(), digits[:1400])
predicted = hc.PrototypeClassifier(means.prototypes()).predict(method(pixels[1400:])["z"])
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy {predicted.eq(digits[1400:]).float().mean():.3f}")
