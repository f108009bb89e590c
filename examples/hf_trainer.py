"""Hugging Face's Trainer: override `compute_loss`, keep everything else.

Look at: `compute_loss`. The model returns features beside the logits; the loss takes the features, the metrics the
logits. Under `torchrun` the Trainer wraps the model in DDP and the same call is over the global batch; started without,
it uses DataParallel where there are several GPUs. With `gradient_accumulation_steps` the samples of one chunk do not
see those of another: `large_batch_supcon.py` shows the cure.

    pip install '.[examples]'
    python examples/hf_trainer.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

import hypercontrast as hc


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = hc.PrototypeHead(32, num_classes=10)

    def forward(self, pixels, labels=None):
        features = self.head.embed(self.encoder(pixels))
        return {"logits": hc.PrototypeClassifier(self.head.prototypes)(features), "features": features}


class HypersphereTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        prototypes = self.accelerator.unwrap_model(model).head.prototypes
        loss = hc.nonl_loss(outputs["features"], prototypes, inputs["labels"], temperature=0.1)
        return (loss, outputs) if return_outputs else loss


def accuracy(prediction):
    logits, _ = prediction.predictions
    return {"accuracy": (logits.argmax(1) == prediction.label_ids).mean()}


pixels, digits = load_digits(return_X_y=True)
rows = [{"pixels": torch.tensor(x / 16).float(), "labels": int(y)} for x, y in zip(pixels, digits, strict=True)]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=8, per_device_train_batch_size=200, learning_rate=3e-3, seed=0,
        logging_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    torch.manual_seed(0)
    data = {"train_dataset": rows[:1400], "eval_dataset": rows[1400:]}
    trainer = HypersphereTrainer(Classifier(), arguments, **data, compute_metrics=accuracy)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
