import numpy as np
import pytest

from unified_approx import datasets, zoo


@pytest.fixture(scope="module")
def digits():
    """The trained network of the digits, and its images and labels for training and for tests."""
    entry, data = zoo.entry("digits"), datasets.load("digits")
    x, test = (entry.preprocess(images) for images in (data.x_train, data.x_test))
    return zoo.load("digits"), x, np.asarray(data.y_train), test, data.y_test
