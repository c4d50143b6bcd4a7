"""A dense CRF written out pixel by pixel: labels differ or not, two kernels (arXiv:1210.5644, Eq. 3 and Algorithm 1)."""

import numpy as np


def mean_field(given, image, w1, alpha, beta, w2, gamma, iterations):
    """Probabilities [C h w] after the iterations, in float64. image: [3 h w] in 0..1; w1, alpha, ...: the paper's letters."""
    labels, height, width = given.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]

    def kernels(i, j):
        apart = (i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2
        tint = sum((255 * (float(image[c][i]) - float(image[c][j]))) ** 2 for c in range(3))
        return np.exp(-apart / (2 * alpha**2) - tint / (2 * beta**2)), np.exp(-apart / (2 * gamma**2))

    alike = {(i, j): kernels(i, j) for i in pixels for j in pixels}
    sums = {i: [sum(alike[i, j][m] for j in pixels) for m in (0, 1)] for i in pixels}
    found = np.asarray(given, np.float64)
    for _ in range(iterations):
        energy = np.zeros((labels, height, width))
        for i in pixels:
            for label in range(labels):
                agreeing = 0.0
                for j in pixels:
                    for m, weight in ((0, w1), (1, w2)):
                        agreeing += weight * alike[i, j][m] / np.sqrt(sums[i][m] * sums[j][m]) * found[(label, *j)]
                energy[(label, *i)] = np.log(given[(label, *i)]) + agreeing
        found = np.exp(energy) / np.exp(energy).sum(0)
    return found
