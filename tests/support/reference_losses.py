"""Reference implementation of the losses as slow loops over numbers, from the equations only.

Nothing here is shared with the code under test. Tensors come in and are read element by element;
sizes must be small. Sections are those of method.md.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

Vector = Sequence[float]


def _unit(vector: Vector) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(_unit(a), _unit(b), strict=True))


def log_sum_exp(values: Vector) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def instance_loss(clips: Tensor, tau: float) -> float:
    """4.1; `clips` is `[B, 2, C]`."""
    z = clips.tolist()
    total = 0.0
    for i in range(len(z)):
        for v in (0, 1):
            positive = cosine(z[i][v], z[i][1 - v]) / tau
            candidates = [positive]
            for j in range(len(z)):
                for u in (0, 1):
                    if j != i:
                        candidates.append(cosine(z[i][v], z[j][u]) / tau)
            total += log_sum_exp(candidates) - positive
    return total / (2 * len(z))


def distillation_loss(student: Tensor, teacher: Tensor, tau: float) -> float:
    """L_dis; both are `[B, 2, C]`."""
    z, t = student.tolist(), teacher.tolist()
    total = 0.0
    for i in range(len(z)):
        for v in (0, 1):
            for u in (0, 1):
                candidates = [cosine(z[i][v], t[j][u]) / tau for j in range(len(t))]
                total += log_sum_exp(candidates) - candidates[i]
    return total / (4 * len(z))


def augmentation_loss(clips: Tensor, altered: Tensor, tau: float) -> float:
    """4.4; `clips` is `[B, 2, C]`, `altered` is `[B, A, 2, C]`."""
    a, b = clips.tolist(), altered.tolist()
    total = 0.0
    for i in range(len(a)):
        for v in (0, 1):
            positive = cosine(a[i][v], a[i][1 - v]) / tau
            candidates = [positive]
            for j in range(len(a)):
                for u in (0, 1):
                    if j != i:
                        candidates.append(cosine(a[i][v], a[j][u]) / tau)
            for alteration in b[i]:
                for u in (0, 1):
                    candidates.append(cosine(a[i][v], alteration[u]) / tau)
            total += log_sum_exp(candidates) - positive
    return total / (2 * len(a))


def retrieval_loss(short: Tensor, long: Tensor, tau: float) -> float:
    """4.5; `short` is `[B, 2, T, C]`, `long` is `[B, L, C]`."""
    r, o = short.tolist(), long.tolist()
    num_long = len(o[0])
    total = 0.0
    for i in range(len(r)):
        pool = 2 * len(r[i][0]) // num_long
        steps = []
        for v in (0, 1):
            for start in range(0, len(r[i][v]), pool):
                group = r[i][v][start : start + pool]
                steps.append([sum(column) / pool for column in zip(*group, strict=True)])
        for t in range(num_long):
            row = [cosine(steps[t], o[i][s]) / tau for s in range(num_long)]
            column = [cosine(steps[s], o[i][t]) / tau for s in range(num_long)]
            total += log_sum_exp(row) - row[t]
            total += log_sum_exp(column) - column[t]
    return total / (2 * len(r) * num_long)


def sinkhorn(scores: Tensor, epsilon: float, num_iterations: int) -> list[list[float]]:
    """4.2, step for step in the order of the release; `scores` is `[S, K]` of one view."""
    s = scores.tolist()
    num_samples, num_prototypes = len(s), len(s[0])
    top = max(max(row) for row in s)
    q = [[math.exp((x - top) / epsilon) for x in row] for row in s]
    mass = sum(sum(row) for row in q)
    q = [[x / mass for x in row] for row in q]
    for _ in range(num_iterations):
        for k in range(num_prototypes):
            column = sum(q[i][k] for i in range(num_samples))
            for i in range(num_samples):
                q[i][k] /= column * num_prototypes
        for i in range(num_samples):
            row = sum(q[i])
            q[i] = [x / (row * num_samples) for x in q[i]]
    return [[x / sum(row) for x in row] for row in q]


def prototype_loss(scores: Tensor, assignments: Tensor, temperature: float) -> float:
    """4.2; both `[B, 2, K]`."""
    s, q = scores.tolist(), assignments.tolist()
    total = 0.0
    for i in range(len(s)):
        for v in (0, 1):
            logits = [x / temperature for x in s[i][v]]
            for k in range(len(logits)):
                total -= q[i][1 - v][k] * (logits[k] - log_sum_exp(logits))
    return total / (2 * len(s))


def graphs(
    clips: Tensor, labels: Tensor, tau: float, eta: float
) -> tuple[list[list[float]], list[list[bool]], list[list[float]]]:
    """4.6; `clips` is `[B, 2, C]`. G_ins, G_sem, E."""
    z, y = clips.tolist(), labels.tolist()
    everyone = range(len(z))
    instance, semantic, target = [], [], []
    for i in everyone:
        logits = [cosine(z[i][0], z[j][1]) / tau for j in everyone]
        w = [math.exp(x - log_sum_exp(logits)) for x in logits]
        instance.append([w[j] if w[j] >= eta or i == j else 0.0 for j in everyone])
        semantic.append([y[i] == y[j] for j in everyone])
        both = [instance[i][j] * semantic[i][j] for j in everyone]
        target.append([x / sum(both) for x in both])
    return instance, semantic, target


def graph_loss(clips: Tensor, target: Tensor, tau: float) -> float:
    """4.7, mean over rows; `clips` is `[B, 2, C]`."""
    g, e = clips.tolist(), target.tolist()
    total = 0.0
    for i in range(len(g)):
        logits = [cosine(g[i][0], g[j][1]) / tau for j in range(len(g))]
        for j in range(len(g)):
            total -= e[i][j] * (logits[j] - log_sum_exp(logits))
    return total / len(g)


def motion_excitation(
    maps: Tensor,
    squeeze: Tensor,
    squeeze_norm: nn.BatchNorm3d,
    depthwise: Tensor,
    expand: Tensor,
    expand_norm: nn.BatchNorm1d,
) -> Tensor:
    """2.2 on frames as images, with two-dimensional layers; batch statistics, as in training.

    `maps` is `[n, c, T, H, W]`; returns `[n, T, c]`, the maps excited and averaged over space.
    """
    num_clips, _, num_steps, height, width = maps.shape
    frames = maps.transpose(1, 2).flatten(0, 1)
    u = functional.batch_norm(
        functional.conv2d(frames, squeeze[:, :, 0]),
        None,
        None,
        squeeze_norm.weight,
        squeeze_norm.bias,
        training=True,
        eps=squeeze_norm.eps,
    )
    after = functional.conv2d(u, depthwise, padding=1, groups=u.shape[1])
    u = u.unflatten(0, (num_clips, num_steps))
    after = after.unflatten(0, (num_clips, num_steps))
    d = u.new_zeros(u.shape)
    for t in range(num_steps - 1):
        d[:, t] = after[:, t + 1] - u[:, t]
    pooled = d.flatten(0, 1).mean((2, 3), keepdim=True)
    raw = functional.conv2d(pooled, expand[:, :, None, None])
    normed = functional.batch_norm(
        raw, None, None, expand_norm.weight, expand_norm.bias, training=True, eps=expand_norm.eps
    )
    weight = normed.sigmoid() - 0.5
    excited = frames + weight * frames
    assert excited.shape[2:] == (height, width)
    return excited.mean((2, 3)).unflatten(0, (num_clips, num_steps))


def running_queue(batches: Sequence[Tensor], num_rows: int) -> list[list[list[float]]]:
    """4.3 with only what was pushed: all rows ever pushed in order, then the last of them."""
    pushed = [row for batch in batches for row in batch.tolist()]
    return pushed[-num_rows:]
