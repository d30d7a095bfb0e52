"""A torchvision network on batches that are dicts: classes, a real number, missing labels.

    python -m examples.torchvision_dicts

The target is the direction of a bar in a picture (2 classes). Auxiliary tasks are its colour (3
classes) and its length (a number), each missing for a third of the pictures. Prints the test
accuracy and the mean weight that the stable form of JTDS gives to every task.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

from auxilearn import TaskLosses, fit_stable, schedule_weights


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = shufflenet_v2_x0_5(weights=None)
        self.body.fc = nn.Identity()
        self.direction, self.colour, self.length = (nn.Linear(1024, n) for n in (2, 3, 1))

    def forward(self, batch):
        features = self.body(batch["image"])
        direction, colour = self.direction(features), self.colour(features)
        losses = [
            F.cross_entropy(direction, batch["direction"], reduction="none"),
            F.cross_entropy(colour, batch["colour"].clamp(min=0), reduction="none"),
            (self.length(features)[:, 0] - batch["length"].nan_to_num()).square(),
        ]
        known = [batch["direction"] >= 0, batch["colour"] >= 0, ~batch["length"].isnan()]
        return TaskLosses(torch.stack(losses, dim=1), features, mask=torch.stack(known, dim=1))


def pictures(count):
    """Bars on noise, 32 x 32. A missing colour is -1, a missing length NaN."""
    direction, colour = torch.randint(2, (count,)), torch.randint(3, (count,))
    length, image = torch.rand(count), 0.2 * torch.randn(count, 3, 32, 32)
    for i, half in enumerate((6 + 8 * length).int()):
        bar = image[i, colour[i]] if direction[i] else image[i, colour[i]].T
        bar[14:18, 16 - half : 16 + half] += 1
    colour[torch.rand(count) < 1 / 3] = -1
    length[torch.rand(count) < 1 / 3] = torch.nan
    return {"image": image, "direction": direction, "colour": colour, "length": length}


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Model()
    lower = torch.optim.Adam(model.parameters(), lr=3e-3)
    dev = [pictures(32)]
    train = [*dev, *(pictures(32) for _ in range(15))]
    scheduler = fit_stable(model, lower, train, dev, tasks=3, feature_dim=1024, epochs=6)
    test = pictures(256)
    predicted = model.eval().direction(model(test).features).argmax(dim=1)
    print(f"accuracy  {(predicted == test['direction']).float().mean():.2f}")
    weights = torch.from_numpy(schedule_weights(model, scheduler, [test]).weights)
    print("weights  ", *(f"{weight:.2f}" for weight in weights.nanmean(dim=0)))
