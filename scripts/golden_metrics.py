"""The metrics of `dmd-distill eval` on small sets of features, by numpy and scipy in f64.

Writes tests/golden/metrics.safetensors. Needs numpy, scipy and safetensors alone. Three cases NAME, each with the features
`NAME.real.f64` and `NAME.generated.f64` `[n, d]`: `normal` (two normal distributions), `relu` (cut at 0, features of very
different size, one that is always 0, one repeated: singular covariances) and `few` (less images than features).
`NAME.scores.f64` is [frechet, mmd, precision, recall, density, coverage]:
 - frechet: by `scipy.linalg.sqrtm` in `normal`; elsewhere, where that is unstable, the trace of the root is the nuclear norm of
   `X·Yᵀ` for centred features X, Y over sqrt(n - 1) (singular values, no eigenvalue and no root of a covariance);
 - mmd: unbiased, kernel (x·y/d + 1)³, on all images;
 - precision, recall with k = 3, density, coverage with k = 5, from differences, not from products.
`classes.logits` `[n, 10]` f32 with `classes.asked` and a second set `classes.other`: `classes.scores.f64` is
[agreement, mean entropy, total variation of the two histograms].
Must not be shared code with the crate.
"""

import sys
from importlib import metadata
from pathlib import Path

PINS = {"numpy": "2.4.", "scipy": "1.17.", "safetensors": "0.8."}
PATH = Path(__file__).resolve().parent.parent / "tests" / "golden" / "metrics.safetensors"

for package, pin in PINS.items():
    if not metadata.version(package).startswith(pin):
        sys.exit(f"error: got {package} {metadata.version(package)}, expected {pin}x")

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import scipy.special  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402


def frechet(x, y, singular):
    """Distance of the fitted normal distributions."""
    means = np.sum((x.mean(0) - y.mean(0)) ** 2)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    if singular:
        xc, yc = x - x.mean(0), y - y.mean(0)
        root = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    else:
        root = np.trace(scipy.linalg.sqrtm(a @ b)).real
    return means + np.trace(a) + np.trace(b) - 2 * root


def mmd(x, y):
    """Unbiased squared maximum mean discrepancy."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    m, n = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return within - 2 * kernel(x, y).mean()


def distances(a, b):
    """Euclidean distances `[a, b]`."""
    return np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(2))


def radius(x, k):
    """Distance to the k-th nearest other image."""
    return np.sort(distances(x, x), 1)[:, k]


def neighbours(real, generated):
    """Precision, recall, density, coverage."""
    between = distances(real, generated)
    near, wide, theirs = radius(real, 3), radius(real, 5), radius(generated, 3)
    return [
        (between <= near[:, None]).any(0).mean(),
        (between <= theirs[None, :]).any(1).mean(),
        (between <= wide[:, None]).sum(0).mean() / 5,
        (between <= wide[:, None]).any(1).mean(),
    ]


def main():
    """Writes everything."""
    random = np.random.Generator(np.random.PCG64(0))
    mix = random.normal(size=(16, 16)) / 4
    relu_mix = random.normal(size=(12, 20)) * np.geomspace(0.01, 10, 20)
    relu = [np.maximum(random.normal(size=(n, 12)) @ relu_mix + shift, 0) for n, shift in ((260, 0.0), (240, 0.3))]
    for x in relu:
        x[:, 5] = 0
        x[:, 7] = x[:, 11]
    sets = {
        "normal": [random.normal(size=(200, 16)), random.normal(size=(200, 16)) @ mix + 0.2],
        "relu": relu,
        "few": [random.normal(size=(12, 20)), random.normal(size=(10, 20)) + 0.5],
    }
    tensors = {}
    for name, (real, generated) in sets.items():
        tensors[f"{name}.real.f64"], tensors[f"{name}.generated.f64"] = real, generated
        scores = [frechet(real, generated, name != "normal"), mmd(real, generated), *neighbours(real, generated)]
        print(name, scores)
        tensors[f"{name}.scores.f64"] = np.array(scores)
    check = [frechet(*sets["normal"], singular) for singular in (False, True)]
    assert abs(check[0] / check[1] - 1) < 1e-10, check

    logits = (3 * random.normal(size=(150, 10))).astype(np.float32)
    other = (3 * random.normal(size=(150, 10)) + np.arange(10) / 3).astype(np.float32)
    asked = np.where(random.random(150) < 0.7, logits.argmax(1), random.integers(0, 10, 150))
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    entropy = -(p * np.log(p)).sum(1).mean()
    histograms = [np.bincount(x.argmax(1), minlength=10) / 150 for x in (logits, other)]
    variation = np.abs(histograms[0] - histograms[1]).sum() / 2
    scores = [(logits.argmax(1) == asked).mean(), entropy, variation]
    print("classes", scores)
    tensors |= {"classes.logits": logits, "classes.other": other, "classes.asked": asked.astype(np.int64)}
    tensors["classes.scores.f64"] = np.array(scores)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, PATH)
    PATH.chmod(0o644)
    print(PATH.name, PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
