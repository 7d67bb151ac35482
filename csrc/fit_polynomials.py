"""Fit the polynomials of philox.h: python csrc/fit_polynomials.py (needs mpmath and numpy).

Each fit minimises the largest relative error of the whole function, by Lawson's iteratively
reweighted least squares on Chebyshev nodes; the leading coefficient that the header writes down
exactly (1, -1/2, 2 pi as a sum of two floats) is held fixed. Printed are the coefficients rounded
to fp32, as C99 hexadecimal floats, lowest power first, and the error left before any rounding of
the arithmetic.
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 40


def fit(target, weight, low, high, degree, nodes=400, rounds=300):
    """Coefficients of p with max |weight (target - p)| least on [low, high], and that maximum."""
    angle = (np.arange(nodes) + 0.5) * np.pi / nodes
    x = 0.5 * (low + high) + 0.5 * (high - low) * np.cos(angle)
    y = np.array([float(target(mp.mpf(float(value)))) for value in x])
    w = np.array([float(weight(mp.mpf(float(value)))) for value in x])
    powers = np.vander(x / high, degree + 1, increasing=True)
    lawson = np.full(nodes, 1.0 / nodes)
    for _ in range(rounds):
        root = np.sqrt(lawson) * w
        scaled = np.linalg.lstsq(powers * root[:, None], y * root, rcond=None)[0]
        error = np.abs(w * (y - powers @ scaled))
        lawson = lawson * error
        lawson /= lawson.sum()
    return scaled / high ** np.arange(degree + 1), error.max()


def show(name, coefficients, error):
    print(f"{name}: relative error {error:.2e}")
    for power, value in enumerate(coefficients):
        rounded = float(np.float32(value))
        print(f"  x^{power}  {float.hex(rounded)}f  {rounded:+.9e}")


def log_tail(f):
    """(ln(1 + f) - f + f^2 / 2) / f^3."""
    if abs(f) < mp.mpf("1e-9"):
        return mp.mpf(1) / 3 - f / 4
    return (mp.log1p(f) - f + f * f / 2) / f**3


def log_weight(f):
    return mp.mpf(1) if f == 0 else f**3 / mp.log1p(f)


TWO_PI_HIGH = float(np.float32(2 * np.pi))


def sin_tail(x):
    """(sin(2 pi f) / f - 2 pi) / x with x = f^2, and its limit at 0."""
    if x < mp.mpf("1e-12"):
        return -((2 * mp.pi) ** 3) / 6
    f = mp.sqrt(x)
    return (mp.sin(2 * mp.pi * f) / f - 2 * mp.pi) / x


def cos_tail(x):
    """(cos(2 pi f) - 1) / x with x = f^2, and its limit at 0."""
    if x < mp.mpf("1e-12"):
        return -((2 * mp.pi) ** 2) / 2
    return (mp.cos(2 * mp.pi * mp.sqrt(x)) - 1) / x


if __name__ == "__main__":
    root = float(mp.sqrt(2))
    show("ln, tail", *fit(log_tail, log_weight, 1 / root - 1, root - 1, 7))
    print(f"  ln 2 = {float.hex(float(np.float32(np.log(2))))}f + ", end="")
    print(f"{float.hex(float(np.float32(mp.log(2) - mp.mpf(float(np.float32(np.log(2)))))))}f")
    eighth = 1.0 / 64
    show("sin, tail", *fit(sin_tail, lambda x: x / (2 * mp.pi), 1e-9, eighth, 2))
    print(f"  2 pi = {float.hex(TWO_PI_HIGH)}f + ", end="")
    print(f"{float.hex(float(np.float32(2 * mp.pi - mp.mpf(TWO_PI_HIGH))))}f")
    show("cos, tail", *fit(cos_tail, lambda x: x, 1e-9, eighth, 3))
