"""Adasum in plain arithmetic, for vectors of numpy or torch: what the tests compare with."""


def pairwise(a, b):
    return (1 - a @ b / (2 * a @ a)) * a + (1 - a @ b / (2 * b @ b)) * b


def adasum(vectors):
    """Combine as the paper does: surplus ranks first, then neighbours, then pairs of these."""
    core_size = 1 << (len(vectors).bit_length() - 1)
    level = vectors[:core_size]
    for i, surplus in enumerate(vectors[core_size:]):
        level[i] = pairwise(level[i], surplus)
    while len(level) > 1:
        level = [pairwise(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]
