"""Trains scikit-learn's network on an exported set, without this project's code: see README.md."""

import numpy as np
import pandas as pd
from sklearn.neural_network import MLPClassifier

table = pd.read_parquet("mnist-31kB.parquet", columns=["image", "label"])
images = np.stack([np.concatenate(image[0]) for image in table.image])  # [n, 784]
with np.load("mnist.npz") as file:
    test_images, test_labels = file["x_test"].reshape(-1, 784), file["y_test"]
network = MLPClassifier(
    (256, 256), learning_rate_init=1e-3, batch_size=64, max_iter=40, tol=0, random_state=0
)
network.fit(images, table.label)
print(f"{100 * network.score((test_images / 255 - 0.1307) / 0.3081, test_labels):.1f}%")
