"""SimCLR with lightly's transform and projection head, and `hc.supcon_loss` as NT-Xent.

Look at: lightly's loss takes two tensors, `NTXentLoss(0.5)(z0, z1)`; ours takes the views stacked, `[B, V, D]`, any
number of them, and no labels. The value is the same. Under DDP it needs no `gather_distributed`. No label is used in
training; class means then tell what was learnt, beside those of the untrained network.

    pip install '.[examples]'
    python examples/lightly_ssl.py
"""

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

import hypercontrast as hc


def two_views(batch):  # the loader collates with it
    return [torch.stack(view) for view in zip(*map(transform, batch), strict=True)]


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
pictures = [Image.fromarray((x.reshape(8, 8) * 15.9).astype("uint8")).convert("RGB") for x in pixels]
# Digits are no photographs: no colours to change, no mirror images.
unused = dict.fromkeys(("cj_prob", "random_gray_scale", "gaussian_blur", "hf_prob"), 0)
transform = SimCLRTransform(8, min_scale=0.5, normalize={"mean": [0.5], "std": [0.5]}, **unused)
loader = DataLoader(pictures[:1400], batch_size=200, shuffle=True, collate_fn=two_views)

backbone = nn.Sequential(
    nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
)
projection = SimCLRProjectionHead(256, 128, 64)
optimizer = torch.optim.AdamW([*backbone.parameters(), *projection.parameters()], lr=2e-3)


def accuracy():
    """Of the nearest class mean of the backbone's features, on pictures that were not trained on."""
    plain, labels = torch.tensor(pixels / 8 - 1).float(), torch.tensor(digits)
    features = backbone(plain.view(-1, 1, 8, 8).expand(-1, 3, -1, -1)).detach()
    means = hc.ClassMeans(num_classes=10, dim=features.shape[1])
    means.update(features[:1400], labels[:1400])
    return hc.PrototypeClassifier(means.prototypes()).predict(features[1400:]).eq(labels[1400:]).float().mean()


before, losses = accuracy(), []
for _ in range(6):
    for views in loader:
        z = torch.stack([projection(backbone(view)) for view in views], dim=1)
        loss = hc.supcon_loss(z, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy {accuracy():.3f}, untrained {before:.3f}")
