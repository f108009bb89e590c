"""SupCon with a batch larger than memory allows, and with past features as further negatives and positives.

Look at: `hc.accumulate_exact` takes the encoder, the loss of all features and the chunks; its gradient is that of one
batch of all chunks, at the memory of one. The `NegativeBuffer` is read by the loss and filled afterwards, so a step
contrasts its own batch with the last `queue` features too.

    pip install '.[examples]'
    python examples/large_batch_supcon.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hypercontrast as hc

BATCH, CHUNK, QUEUE, DIM = 700, 100, 1400, 32

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pixels, digits = (torch.tensor(part).to(device) for part in load_digits(return_X_y=True))
pixels = pixels.float() / 16
train, test = (pixels[:1400], digits[:1400]), (pixels[1400:], digits[1400:])

encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, DIM)).to(device)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
memory = hc.NegativeBuffer(dim=DIM, batch=BATCH, queue=QUEUE, device=device)

# The gradient of seven chunks together, and of one batch of 700: the same numbers.
x, y = train[0][:BATCH], train[1][:BATCH]
hc.accumulate_exact(encoder, lambda z: hc.supcon_loss(z, y, temperature=0.1), x.split(CHUNK))
chunked = encoder[0].weight.grad.clone()
encoder.zero_grad()
hc.supcon_loss(encoder(x), y, temperature=0.1).backward()
difference = (chunked - encoder[0].weight.grad).norm() / chunked.norm()

losses = []
for _ in range(15):
    for rows in torch.randperm(1400, device=device).split(BATCH):
        x, y = train[0][rows], train[1][rows]
        optimizer.zero_grad()
        loss = hc.accumulate_exact(
            encoder, lambda z, y=y: hc.supcon_loss(z, y, temperature=0.1, queue=memory), x.split(CHUNK)
        )
        optimizer.step()
        memory.push(encoder(x).detach(), y)
        losses.append(loss.item())

means = hc.ClassMeans(num_classes=10, dim=DIM).to(device)
means.update(encoder(train[0]).detach(), train[1])
accuracy = hc.PrototypeClassifier(means.prototypes()).predict(encoder(test[0])).eq(test[1]).float().mean()
# Two steps fill the queue; the loss grows with the columns, so only later ones compare.
print(f"loss {losses[2]:.2f} -> {losses[-1]:.2f}, accuracy {accuracy:.3f}, chunks against one batch {difference:.1e}")
