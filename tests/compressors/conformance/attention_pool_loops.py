"""Plain float64 loops of mqt, molmo_pool and minicpm_merger, from their definitions, row by row."""

import math

import numpy as np
from pooling_loops import blank, side_by_side, whole_cells


def layer_norm(x, scale, bias):
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-6) * scale + bias


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


def mqt(embed, mask, grid, budget, params, *, num_queries, heads, content):
    p = {name.removeprefix("mqt_"): value for name, value in params.items()}
    width = embed.shape[1]
    side = math.ceil(math.sqrt(num_queries))
    real = [n for n in range(len(mask)) if mask[n]]
    row = blank(budget, len(mask), p["projection_kernel"].shape[1])
    keys, values = {}, {}
    for n in real:
        r, c = divmod(n, grid[1])
        code = sine_code(
            ((r + 0.5) * side / grid[0] - 0.5, (c + 0.5) * side / grid[1] - 0.5), width
        )
        if content:
            key = layer_norm(np.float64(embed[n]), p["key_norm_scale"], p["key_norm_bias"]) + code
        else:
            key = layer_norm(code, p["key_norm_scale"], p["key_norm_bias"])
        value = layer_norm(np.float64(embed[n]), p["value_norm_scale"], p["value_norm_bias"])
        keys[n] = key @ p["key_kernel"] + p["key_bias"]
        values[n] = value @ p["value_kernel"] + p["value_bias"]
    depth, live = width // heads, min(budget, len(real))
    attention = np.zeros((live, len(real)))
    for t in range(live):
        query = p["queries"][t] + sine_code(divmod(t, side), width)
        query = layer_norm(query, p["query_norm_scale"], p["query_norm_bias"])
        query = query @ p["query_kernel"] + p["query_bias"]
        mixed = np.zeros(width)
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            weights = softmax(
                np.array([query[part] @ keys[n][part] / math.sqrt(depth) for n in real])
            )
            for weight, n in zip(weights, real, strict=True):
                mixed[part] += weight * values[n][part]
            attention[t] += weights / heads
        row["embed"][t] = (mixed @ p["out_kernel"] + p["out_bias"]) @ p["projection_kernel"]
        row["mask"][t] = True
        for weight, n in zip(attention[t], real, strict=True):
            row["position"][t] += weight * np.array(divmod(n, grid[1]))
    for i, n in enumerate(real):
        for t in range(live):
            row["size"][t] += attention[t, i] / attention[:, i].sum()
        row["source"][n] = int(np.argmax(attention[:, i]))
    return row


def molmo(embed, mask, grid, side, params, *, heads, query, bias=None):
    bias = np.zeros(len(mask)) if bias is None else np.float64(bias)
    p = {name.removeprefix("molmo_pool_"): value for name, value in params.items()}
    row, members = whole_cells(embed, mask, grid, side)
    inner = p["query_kernel"].shape[1]
    depth = inner // heads
    outputs = []
    for cell, patches in enumerate(members):
        if not patches:
            outputs.append(None)
            continue
        start = row["embed"][cell] if query == "mean" else np.float64(embed[patches[0]])
        q = start @ p["query_kernel"] + p["query_bias"]
        y = np.zeros(inner)
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            logits = []
            for n in patches:
                key = np.float64(embed[n]) @ p["key_kernel"] + p["key_bias"]
                logits.append(q[part] @ key[part] / math.sqrt(depth) + bias[n])
            for weight, n in zip(softmax(np.array(logits)), patches, strict=True):
                value = np.float64(embed[n]) @ p["value_kernel"] + p["value_bias"]
                y[part] += weight * value[part]
        y = y @ p["out_kernel"] + p["out_bias"]
        if "gate_kernel" in p:
            gate = y @ p["gate_kernel"]
            y = (gate / (1 + np.exp(-gate)) * (y @ p["up_kernel"])) @ p["down_kernel"]
        outputs.append(y)
    features = p["down_kernel" if "gate_kernel" in p else "out_kernel"].shape[1]
    row["embed"] = np.zeros((len(members), features))
    for cell, y in enumerate(outputs):
        if y is not None:
            row["embed"][cell] = y
    return row


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def window_merger(embed, mask, grid, params, heads, bias=None):
    bias = np.zeros(len(mask)) if bias is None else np.float64(bias)
    p = {name.removeprefix("minicpm_window_"): value for name, value in params.items()}
    row, members = whole_cells(embed, mask, grid, 2)
    width = embed.shape[1]
    depth, after = width // heads, np.zeros((len(mask), width))
    for patches in members:
        x = {n: layer_norm(np.float64(embed[n]), p["norm_scale"], p["norm_bias"]) for n in patches}
        for n in patches:
            q = x[n] @ p["query_kernel"] + p["query_bias"]
            y = np.zeros(width)
            for h in range(heads):
                part = slice(h * depth, (h + 1) * depth)
                keys = [(x[m] @ p["key_kernel"] + p["key_bias"])[part] for m in patches]
                logits = np.array([q[part] @ k / math.sqrt(depth) for k in keys])
                weights = softmax(logits + bias[patches])
                for weight, m in zip(weights, patches, strict=True):
                    y[part] += weight * (x[m] @ p["value_kernel"] + p["value_bias"])[part]
            after[n] = np.float64(embed[n]) + y @ p["out_kernel"] + p["out_bias"]
    flat = side_by_side(after, mask, grid, 2, "row_column_feature")
    for cell, patches in enumerate(members):
        row["embed"][cell] = 0
        if patches:
            y = layer_norm(flat[cell], p["merge_norm_scale"], p["merge_norm_bias"])
            y = tanh_gelu(y @ p["up_kernel"] + p["up_bias"]) @ p["down_kernel"] + p["down_bias"]
            row["embed"][cell] = sum(after[n] for n in patches) / len(patches) + y
    return row


def final_merger(embed, mask, grid, params):
    p = {name.removeprefix("minicpm_final_"): value for name, value in params.items()}
    row, members = whole_cells(embed, mask, grid, 2)
    flat = side_by_side(embed, mask, grid, 2, "row_column_feature")
    for cell, patches in enumerate(members):
        row["embed"][cell] = 0
        if patches:
            y = layer_norm(flat[cell], p["norm_scale"], p["norm_bias"])
            y = erf_gelu(y @ p["up_kernel"] + p["up_bias"])
            row["embed"][cell] = y @ p["down_kernel"] + p["down_bias"]
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
