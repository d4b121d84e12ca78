"""What `--precision medium` does here, against fp32: `python tests/bench/medium.py`."""

import clock
import torch


def medium(device: str, size: int = 1024) -> tuple[float, float]:
    """The error of a product of two random matrices, as a share of its norm, and how many times as
    fast as in fp32 it is, at best of eight."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    products, seconds = [], []
    for precision in ("fp32", "medium"):
        with clock.matmuls(precision):
            seconds.append(min(clock.seconds_of(lambda _: a @ b, 0, device) for _ in range(8)))
            products.append(a @ b)
    error = float((products[1] - products[0]).norm() / products[0].norm())
    return error, seconds[0] / seconds[1]


if __name__ == "__main__":
    where = "cuda" if torch.cuda.is_available() else "cpu"
    error, ratio = medium(where)
    print(f"{where}: error {error:.1e} of a matrix product, {ratio:.1f} times fp32's speed")
