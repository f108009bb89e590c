"""A LightningModule: the loss is one call in `training_step`, and stays that call when the Trainer has several devices.

Look at: `training_step`. Lightning starts the ranks and wraps the module in DDP; the loss finds the process group by
itself, so the step below is over the global batch and `sync_dist` has nothing left to average. The prototypes are
parameters of the module, so the optimiser, checkpoints and DDP have them.

    pip install '.[examples]'
    python examples/lightning_module.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hypercontrast as hc


class Digits(lightning.LightningModule):
    def __init__(self, temperature=0.1, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = hc.PrototypeHead(32, num_classes=10)
        self.loss = hc.NTCELoss(temperature=temperature)
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(self.head.embed(self.encoder(x)), self.head.prototypes, y)
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch, batch_idx):
        x, y = batch
        accuracy = self.head(self.encoder(x)).argmax(1).eq(y).float().mean()
        self.log("accuracy", accuracy, on_epoch=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    train = DataLoader(TensorDataset(pixels[:1400], digits[:1400]), batch_size=200, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(pixels[1400:], digits[1400:]), batch_size=397)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=8, devices=1, **quiet, enable_model_summary=False)
    model = Digits()
    trainer.fit(model, train)
    (result,) = trainer.test(model, test, verbose=False)
    print(f"loss {model.losses[0]:.2f} -> {model.losses[-1]:.2f}, accuracy {result['accuracy']:.3f}")
