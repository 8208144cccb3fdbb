"""Train efficient-KAN or FastKAN 784-64-10 on Fashion-MNIST.

Run from the root of the repository, with an .npz of x_train, y_train, x_test, y_test (uint8)::

    python -m examples.train_fashion_mnist fashion_mnist.npz --model efficient_kan --epochs 8 --out weights.safetensors
"""

from examples.train_images import main

if __name__ == "__main__":
    main("fashion_mnist", __doc__)
