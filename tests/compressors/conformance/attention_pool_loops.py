"""Plain float64 loops of mqt, molmo_pool and minicpm_merger, from their definitions, row by row.

They take arrays as the papers name them, and know no parameter names: W is a pair (matrix, bias),
LN a pair (scale, bias).
"""

import math

import numpy as np
from pooling_loops import blank, side_by_side, whole_cells


def layer_norm(norm, x):
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-6) * norm[0] + norm[1]


def linear(weights, x):
    return x @ weights[0] + weights[1]


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def sine_code(position, width):
    """Column first, then row; sines then cosines of each."""
    quarter, code = width // 4, np.zeros(width)
    for axis, value in enumerate((position[1], position[0])):
        for i in range(quarter):
            w = 10000 ** (-i / quarter)
            code[2 * axis * quarter + i] = math.sin(value * w)
            code[(2 * axis + 1) * quarter + i] = math.cos(value * w)
    return code


def mqt(embed, mask, grid, queries, products, norms, *, budget, heads, content):
    """products: W_q, W_k, W_v, W_o and the matrix W_p; norms: LN_q, LN_k, LN_v."""
    (W_q, W_k, W_v, W_o, W_p), (LN_q, LN_k, LN_v) = products, norms
    width = embed.shape[1]
    side = math.ceil(math.sqrt(len(queries)))
    real = [n for n in range(len(mask)) if mask[n]]
    row = blank(budget, len(mask), W_p.shape[1])
    keys, values = {}, {}
    for n in real:
        r, c = divmod(n, grid[1])
        code = sine_code(
            ((r + 0.5) * side / grid[0] - 0.5, (c + 0.5) * side / grid[1] - 0.5), width
        )
        if content:
            key = layer_norm(LN_k, np.float64(embed[n])) + code
        else:
            key = layer_norm(LN_k, code)
        keys[n] = linear(W_k, key)
        values[n] = linear(W_v, layer_norm(LN_v, np.float64(embed[n])))
    depth, live = width // heads, min(budget, len(real))
    attention = np.zeros((live, len(real)))
    for t in range(live):
        query = queries[t] + sine_code(divmod(t, side), width)
        query = linear(W_q, layer_norm(LN_q, query))
        mixed = np.zeros(width)
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            weights = softmax(
                np.array([query[part] @ keys[n][part] / math.sqrt(depth) for n in real])
            )
            for weight, n in zip(weights, real, strict=True):
                mixed[part] += weight * values[n][part]
            attention[t] += weights / heads
        row["embed"][t] = linear(W_o, mixed) @ W_p
        row["mask"][t] = True
        for weight, n in zip(attention[t], real, strict=True):
            row["position"][t] += weight * np.array(divmod(n, grid[1]))
    for i, n in enumerate(real):
        for t in range(live):
            row["size"][t] += attention[t, i] / attention[:, i].sum()
        row["source"][n] = int(np.argmax(attention[:, i]))
    return row


def molmo(embed, mask, grid, side, *, W_q, W_k, W_v, W_o, swiglu, heads, query, bias=None):
    """swiglu: (W_1, W_3, W_2) without biases, or None."""
    bias = np.zeros(len(mask)) if bias is None else np.float64(bias)
    row, members = whole_cells(embed, mask, grid, side)
    inner = W_q[0].shape[1]
    depth = inner // heads
    outputs = []
    for cell, patches in enumerate(members):
        if not patches:
            outputs.append(None)
            continue
        start = row["embed"][cell] if query == "mean" else np.float64(embed[patches[0]])
        q = linear(W_q, start)
        y = np.zeros(inner)
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            logits = []
            for n in patches:
                key = linear(W_k, np.float64(embed[n]))
                logits.append(q[part] @ key[part] / math.sqrt(depth) + bias[n])
            for weight, n in zip(softmax(np.array(logits)), patches, strict=True):
                value = linear(W_v, np.float64(embed[n]))
                y[part] += weight * value[part]
        y = linear(W_o, y)
        if swiglu is not None:
            W_1, W_3, W_2 = swiglu
            gate = y @ W_1
            y = (gate / (1 + np.exp(-gate)) * (y @ W_3)) @ W_2
        outputs.append(y)
    last = W_o[0] if swiglu is None else swiglu[2]
    row["embed"] = np.zeros((len(members), last.shape[1]))
    for cell, y in enumerate(outputs):
        if y is not None:
            row["embed"][cell] = y
    return row


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def perceptron(mlp, x, activation):
    LN, W_1, W_2 = mlp
    return linear(W_2, activation(linear(W_1, layer_norm(LN, x))))


def window_merger(embed, mask, grid, attention, mlp, *, heads, bias=None):
    """attention: (LN, W_q, W_k, W_v, W_o); mlp: (LN, W_1, W_2)."""
    bias = np.zeros(len(mask)) if bias is None else np.float64(bias)
    LN, W_q, W_k, W_v, W_o = attention
    row, members = whole_cells(embed, mask, grid, 2)
    width = embed.shape[1]
    depth, after = width // heads, np.zeros((len(mask), width))
    for patches in members:
        x = {n: layer_norm(LN, np.float64(embed[n])) for n in patches}
        for n in patches:
            q = linear(W_q, x[n])
            y = np.zeros(width)
            for h in range(heads):
                part = slice(h * depth, (h + 1) * depth)
                keys = [linear(W_k, x[m])[part] for m in patches]
                logits = np.array([q[part] @ k / math.sqrt(depth) for k in keys])
                weights = softmax(logits + bias[patches])
                for weight, m in zip(weights, patches, strict=True):
                    y[part] += weight * linear(W_v, x[m])[part]
            after[n] = np.float64(embed[n]) + linear(W_o, y)
    flat = side_by_side(after, mask, grid, 2, "row_column_feature")
    for cell, patches in enumerate(members):
        row["embed"][cell] = 0
        if patches:
            y = perceptron(mlp, flat[cell], tanh_gelu)
            row["embed"][cell] = sum(after[n] for n in patches) / len(patches) + y
    return row


def final_merger(embed, mask, grid, mlp):
    """mlp: (LN, W_1, W_2)."""
    row, members = whole_cells(embed, mask, grid, 2)
    flat = side_by_side(embed, mask, grid, 2, "row_column_feature")
    for cell, patches in enumerate(members):
        row["embed"][cell] = 0
        if patches:
            row["embed"][cell] = perceptron(mlp, flat[cell], erf_gelu)
    return row


def chained(first, second):
    """The row after two mergers: the second ran on the result of the first (sizes as they were)."""
    row = {name: second[name].copy() for name in second}
    row["source"] = np.array([-1 if s < 0 else second["source"][s] for s in first["source"]])
    row["size"][:] = 0
    row["position"][:] = 0
    for cell, holder in enumerate(second["source"]):
        if first["mask"][cell]:
            row["size"][holder] += first["size"][cell]
            row["position"][holder] += first["size"][cell] * first["position"][cell]
    for t in range(len(row["size"])):
        if row["size"][t]:
            row["position"][t] /= row["size"][t]
    return row
