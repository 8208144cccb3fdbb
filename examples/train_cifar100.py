"""Train the convolutional KAGN classifier (3-16-32-64-64 channels) on the 100 classes of CIFAR-100.

Run from the root of the repository, with an .npz of x_train, y_train, x_test, y_test (uint8, images [n, 32, 32, 3])::

    python -m examples.train_cifar100 cifar100.npz --epochs 8 --out cifar100_kagn.safetensors

Writes the weights after every epoch, so a run that is cut short leaves a usable file.
"""

from examples.train_cifar10 import main

if __name__ == "__main__":
    main("cifar100", __doc__)
