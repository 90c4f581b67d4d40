# %% [markdown]
# # A net that reads digits
#
# You will train a neural network, watch it learn, change it, look at its mistakes, draw a digit for it and
# ask why it answers as it does. If you have written a Python function before, you can follow. Run the cells
# from top to bottom (Shift+Enter); all together take about a minute.
#
# In Colab or Jupyter the package must be there first: `%pip install mnist_lightning-*.whl`, or the folder
# of a clone.

# %% [markdown]
# ## 1. Look at the data
#
# MNIST is 70,000 grey images of handwritten digits, 28×28 pixels each, with the digit that was meant
# (*label*). `load_mnist` gives them in *batches* of 64: 60,000 images to learn from, and 10,000 others to
# test with.

# %%
import torch
from matplotlib import pyplot as plt

from mnist_lightning import load_mnist

torch.manual_seed(1)
train_loader, test_loader = load_mnist(batch_size=64)
images, labels = next(iter(train_loader))
print("images", tuple(images.shape), "from", images.min().item(), "to", images.max().item())
print("labels", tuple(labels.shape))

fig, axes = plt.subplots(2, 8, figsize=(8, 2.4))
for axis, image, label in zip(axes.flat, images, labels, strict=False):
    axis.imshow(image[0], cmap="gray_r")
    axis.set_title(int(label), fontsize=10)
    axis.axis("off")

# %% [markdown]
# Each image is 784 numbers, from −1 (paper) to 1 (ink). A net turns them into ten numbers, one for each
# digit; the largest is its answer.

# %% [markdown]
# ## 2. Ten lines of PyTorch
#
# The net has two layers. Each multiplies its inputs with *weights* and adds *biases*; `ReLU` between them
# sets negative numbers to 0. All weights begin at random. The *loss* says how wrong the answers to a batch
# are. `backward()` computes its *gradient*: for each weight, how fast the loss rises when the weight is
# raised. `step()` moves each weight a little the other way.

# %%
from torch import nn

model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
losses = []
for images, labels in train_loader:  # one epoch: each image once
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

# %%
plt.figure(figsize=(6, 2.4))
plt.plot(losses, linewidth=0.6)
plt.axhline(2.303, color="gray", linestyle="--")  # ln 10: the loss of a net that knows nothing
plt.xlabel("step")
plt.ylabel("loss")

right = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in test_loader)
print(f"{right / 100:.1f} % of 10,000 images that it has never seen")

# %% [markdown]
# It began at the dashed line, where one knows nothing, and reads most digits after one pass.

# %% [markdown]
# ## 3. The same in Lightning
#
# Lightning has the loop. You say what a step is, and which optimizer makes it.

# %%
import logging
import warnings

import lightning as L

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # no hints
warnings.simplefilter("ignore")


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
classifier = Classifier()
L.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(classifier, train_loader)
right = sum(int((classifier.model(images).argmax(dim=1) == labels).sum()) for images, labels in test_loader)
print(f"{right / 100:.1f} %")

# %% [markdown]
# ## 4. Watch it learn
#
# `train` is this project's own run. It keeps 5,000 of the training images apart (*validation*), because a
# net can learn the images that it is trained on by heart. The test images are read once, at the end.

# %%
from mnist_lightning import train

run = train("trainer.max_epochs=5")

# %%
run.show()

# %% [markdown]
# Where the two curves part, the net begins to know its training images better than others: *overfitting*.
# Below are 24 of its hidden units at the end. Each has a weight for each pixel; blue pixels speak for the
# unit, red ones against it.

# %%
net = run.load()
weights = net.classifier.net.layers[1].weight.detach().unflatten(1, (28, 28))
fig, axes = plt.subplots(2, 12, figsize=(9, 1.7))
for axis, weight in zip(axes.flat, weights, strict=False):
    axis.imshow(weight, cmap="RdBu", vmin=-0.2, vmax=0.2)
    axis.axis("off")

# %% [markdown]
# ## 5. Change one thing
#
# What does the hidden layer buy? Guess first, then train a net without one.

# %%
linear = train("trainer.max_epochs=5", "model.hidden=[]")

# %%
for name, one in (("256 hidden units", run), ("no hidden layer", linear)):
    print(f"{name:16}  {100 * one.metrics['val/acc']:.1f} % of the validation images")

# %% [markdown]
# That is a large difference. Most are not: another `seed=` alone changes the accuracy by 0.1 to 0.2 points,
# so believe a small difference only over several seeds. Try `"model.dropout=0.3"`, `"optimizer=sgd"`,
# `"scheduler=none"` or `"data.deskew=true"`.

# %% [markdown]
# ## 6. Look at its mistakes
#
# Scores are counted on the validation images. *Precision*: of all images called a 4, how many are.
# *Recall*: of all 4s, how many are called so.

# %%
scores = net.evaluate("val")
scores

# %%
scores.figures["mistakes"]

# %% [markdown]
# ## 7. Draw a digit
#
# Corners of a line, in a square from 0 to 1. Change them and run the cell again. `predict` prepares the
# picture as MNIST's were: cropped, scaled, centred.

# %%
from IPython.display import display
from PIL import Image, ImageDraw

line = [(0.3, 0.25), (0.5, 0.22), (0.7, 0.25), (0.6, 0.45), (0.5, 0.65), (0.42, 0.85)]  # a 7

picture = Image.new("L", (200, 200), "white")
ImageDraw.Draw(picture).line([(200 * x, 200 * y) for x, y in line], fill="black", width=18, joint="curve")
picture.save("my_digit.png")
display(picture)
net.predict("my_digit.png")

# %% [markdown]
# ## 8. Ask why
#
# Blue pixels spoke for the answer, red ones against it. Below are the training images that look most like
# it to the net.

# %%
why = net.explain("my_digit.png")
print(why)
why.draw()

# %% [markdown]
# ## 9. Draw with the mouse
#
# The net fits into one page. Open it in a browser: the answer follows the pen, and each bar tells why.

# %%
import subprocess
import sys

from IPython.display import FileLink

page = run.folder / "page.html"
export = [
    sys.executable,
    "-m",
    "mnist_lightning.export",
    "format=html",
    f"run={run.folder}",
    f"output={page}",
]
subprocess.run(export, check=True, capture_output=True)
FileLink(page)

# %% [markdown]
# ## Go on
#
# You have trained four nets. The README is the guide to the code; `docs/questions.md` has answers;
# `docs/from_scratch.md` shows what `backward()` does; `docs/make_it_yours.md` how to bring a net of your
# own.
