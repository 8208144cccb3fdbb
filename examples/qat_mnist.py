"""Train a compiled KAN on with its few bits: quantization-aware training of efficient-KAN or FastKAN 784-64-10 on MNIST.

Run from the root of the repository, with the data and weights of ``examples.train_mnist``::

    python -m examples.qat_mnist mnist.npz --checkpoint mnist_efficient_kan.safetensors --weight-bits 2 --levels 4 --out kan.onnx
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import kancompile.qat as qat
from examples.train_images import MODELS, accuracy, load_split

HELD_OUT = 5000


def train(
    module: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int = 3,
    batch_size: int = 128,
    rate: float = 0.01,
    seed: int = 0,
    held_out: int = HELD_OUT,
) -> list[float]:
    """Train in place with Adam and a cosine schedule, half on labels and half on the float model's classes.

    The last ``held_out`` samples are not trained on; of the states after every epoch, and the one before the first, that of least
    loss on them is left in the module.

    Args:
        module: a prepared module, or a float one, of which nothing is special.
        teacher: the float model.
        x: samples ``[n, pixels]``.
        y: classes, int64 ``[n]``.
        epochs, batch_size, rate, seed, held_out: of the training.

    Returns:
        seconds of every epoch.
    """
    x_held, y_held, x, y = x[-held_out:], y[-held_out:], x[:-held_out], y[:-held_out]
    with torch.no_grad():
        taught = torch.cat([teacher(part) for part in x.split(1000)])
    is_prepared = isinstance(module, (qat.TrainedModel, qat.ElasticModel))
    groups = qat.parameter_groups(module, rate) if is_prepared else [{"params": list(module.parameters())}]
    optimizer = torch.optim.Adam(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch_size))
    best = qat.BestState(module, qat.held_out_loss(module, x_held, y_held))
    print(f"before: held-out loss {best.loss:.4f}", flush=True)
    generator, seconds = torch.Generator().manual_seed(seed), []
    for epoch in range(1, epochs + 1):
        module.train()
        start = time.perf_counter()
        batches = torch.randperm(len(x), generator=generator).split(batch_size)
        for batch in tqdm(batches, desc=f"epoch {epoch}/{epochs}", disable=None):
            optimizer.zero_grad()
            logits = module(x[batch])
            by_label = functional.cross_entropy(logits, y[batch])
            by_teacher = qat.distillation_loss(logits, taught[batch], temperature=2.0)
            ((by_label + by_teacher) / 2).backward()
            optimizer.step()
            schedule.step()
        seconds.append(time.perf_counter() - start)
        loss = qat.held_out_loss(module, x_held, y_held)
        print(f"epoch {epoch}/{epochs}: held-out loss {loss:.4f}{', the best' if best.offer(loss) else ''}", flush=True)
    best.restore()
    module.eval()
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script: compile, train on, write the file and print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz with x_train, y_train, x_test, y_test, all uint8")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of examples.train_mnist")
    parser.add_argument("--model", choices=sorted(MODELS), default="efficient_kan", help="default: %(default)s")
    parser.add_argument("--weight-bits", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--levels", type=int, default=4, help="rows of a table (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("qat_mnist.onnx"), help="default: %(default)s")
    arguments = parser.parse_args(argv)

    x, y = load_split(arguments.data, "train")
    x_test, y_test = load_split(arguments.data, "test")
    weights = load_file(arguments.checkpoint)
    hidden = next(
        len(value)
        for name, value in weights.items()
        if name.endswith("layers.0.base_weight") or "0.base_linear.weight" in name
    )
    model = MODELS[arguments.model]((x.shape[1], hidden, int(y.max()) + 1))
    model.load_state_dict(weights)
    model.eval()

    # the file keeps the bits that it is trained for: no error gate, and each input has a table row of its own
    recipe = {
        "weight_bits": arguments.weight_bits,
        "levels": arguments.levels,
        "lookup": "each",
        "goal_sqnr": None,
    }
    module = qat.prepare(model, x[:1000], recipe, training={"index": "lsq+"}, seed=arguments.seed)
    print(module)
    before = accuracy(module, x_test, y_test)
    train(module, model, x, y, arguments.epochs, seed=arguments.seed, held_out=min(HELD_OUT, len(x) // 5))
    compiled = qat.convert(module)
    compiled.save(arguments.out, force=True)
    after = accuracy(module, x_test, y_test)
    print(f"test accuracy: float {accuracy(model, x_test, y_test):.4f}, compiled {before:.4f}, trained on {after:.4f}")
    print(compiled.validate((x_test.numpy(), y_test.numpy())).table())


if __name__ == "__main__":
    main()
