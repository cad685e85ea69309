"""Plain float64 loops for the trained projectors, one row at a time, from their definitions.

Every function takes embed [N, D], mask [N], the grid (h, w) in raster order and the parameters
without the method's prefix; it gives the fields of one row of `VisualTokens`.
"""

import math

import numpy as np


def linear(p, name, x):
    y = np.float64(x) @ p[f"{name}_kernel"]
    return y + p[f"{name}_bias"] if f"{name}_bias" in p else y


def gelu(x):
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def hard_sigmoid(x):
    return np.clip(x + 3, 0, 6) / 6


def layer_norm(p, name, x, epsilon):
    centred = x - np.mean(x)
    normal = centred / math.sqrt(np.mean(centred**2) + epsilon)
    return normal * p[f"{name}_scale"] + p[f"{name}_bias"]


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def perceptron(p, x):
    return linear(p, "down", gelu(linear(p, "up", x)))


def blank(count, num_patches, features):
    return {
        "embed": np.zeros((count, features)),
        "position": np.zeros((count, 2)),
        "size": np.zeros(count),
        "mask": np.zeros(count, bool),
        "source": np.full(num_patches, -1),
    }


def pooled(embed, mask, grid, cells):
    """Area resampling by cutting every patch into equal crumbs, each wholly inside one cell."""
    (h, w), (ch, cw) = grid, cells
    row = blank(ch * cw, h * w, embed.shape[-1])
    area = np.zeros((ch * cw, h * w))
    for y in range(h * ch):
        for x in range(w * cw):
            area[(y // h) * cw + x // w, (y // ch) * w + x // cw] += 1 / (ch * cw)
    for cell in range(ch * cw):
        for patch in range(h * w):
            if mask[patch] and area[cell, patch]:
                row["mask"][cell] = True
                row["size"][cell] += area[cell, patch]
                row["embed"][cell] += area[cell, patch] * np.float64(embed[patch])
                row["position"][cell] += area[cell, patch] * np.array(divmod(patch, w))
        if row["mask"][cell]:
            row["embed"][cell] /= row["size"][cell]
            row["position"][cell] /= row["size"][cell]
    for patch in np.flatnonzero(mask):
        row["source"][patch] = max(range(ch * cw), key=lambda c: (round(area[c, patch], 9), -c))
    return row


def each(row, function):
    """Applies `function` to the embeddings of the real tokens."""
    out = [function(x) for x in row["embed"][row["mask"]]]
    width = len(function(row["embed"][0]))
    row["embed"] = np.zeros((len(row["mask"]), width))
    for slot, value in zip(np.flatnonzero(row["mask"]), out, strict=True):
        row["embed"][slot] = value
    return row


def mlp(embed, mask, grid, cells, p):
    return each(pooled(embed, mask, grid, grid), lambda x: perceptron(p, x))


def deco(embed, mask, grid, cells, p):
    return each(pooled(embed, mask, grid, cells), lambda x: perceptron(p, x))


def depthwise(kernel, places, grid, stride=1):
    """`places` maps (row, column) of real places to vectors; all others are zeros."""
    out = {}
    for y in range(0, grid[0], stride):
        for x in range(0, grid[1], stride):
            total = np.zeros(kernel.shape[-1])
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if (y + i, x + j) in places:
                        total += kernel[1 + i, 1 + j] * places[y + i, x + j]
            out[y // stride, x // stride] = total
    return out


def squeeze_excite(p, name, places, activation, gate):
    if not places:
        return {}
    mean = np.mean(list(places.values()), axis=0)
    scale = gate(linear(p, f"{name}_excite", activation(linear(p, f"{name}_squeeze", mean))))
    return {place: x * scale for place, x in places.items()}


def to_places(values, mask, grid):
    return {divmod(n, grid[1]): values[n] for n in range(len(mask)) if mask[n]}


def from_places(places, grid, width):
    values = np.zeros((grid[0] * grid[1], width))
    for (y, x), value in places.items():
        values[y * grid[1] + x] = value
    return values


def bottleneck(p, name, places, grid):
    y = {
        k: silu(layer_norm(p, f"{name}_in_norm", linear(p, f"{name}_in", x), 1e-6))
        for k, x in places.items()
    }
    y = depthwise(p[f"{name}_depthwise_kernel"], y, grid)
    y = {k: silu(layer_norm(p, f"{name}_depthwise_norm", y[k], 1e-6)) for k in places}
    y = squeeze_excite(p, name, y, silu, sigmoid)
    out = {}
    for k, x in places.items():
        if f"{name}_shortcut_kernel" in p:
            x = layer_norm(p, f"{name}_shortcut_norm", linear(p, f"{name}_shortcut", x), 1e-6)
        out[k] = silu(x + layer_norm(p, f"{name}_out_norm", linear(p, f"{name}_out", y[k]), 1e-6))
    return out


def c_abstractor(embed, mask, grid, cells, p, depth, mlp_depth):
    places = to_places(embed + p["position"].reshape(embed.shape), mask, grid)
    for i in range(depth):
        places = bottleneck(p, f"before_{i}", places, grid)
    hidden = p["before_0_out_kernel"].shape[1]
    row = pooled(from_places(places, grid, hidden), mask, grid, cells)
    places = to_places(row["embed"], row["mask"], cells)
    for i in range(depth):
        places = bottleneck(p, f"after_{i}", places, cells)
    row["embed"] = from_places(places, cells, hidden)

    def head(x):
        x = linear(p, "mlp_0", x)
        for i in range(1, mlp_depth):
            x = linear(p, f"mlp_{i}", silu(x))
        return x

    return each(row, head)


def inverted_residual(p, name, places, grid, stride, kept):
    y = depthwise(p[f"{name}_depthwise_kernel"], places, grid, stride)
    y = {k: layer_norm(p, f"{name}_depthwise_norm", y[k], 1e-5) for k in kept}
    y = {k: x * hard_sigmoid(x) for k, x in y.items()}
    y = squeeze_excite(p, name, y, lambda x: np.maximum(x, 0), hard_sigmoid)
    y = {
        k: layer_norm(p, f"{name}_out_norm", linear(p, f"{name}_out", x), 1e-5)
        for k, x in y.items()
    }
    return {k: x + places[k] for k, x in y.items()} if stride == 1 else y


def ldp(embed, mask, grid, cells, p):
    places = {k: perceptron(p, x) for k, x in to_places(embed, mask, grid).items()}
    places = inverted_residual(p, "block_0", places, grid, 1, list(places))
    row = pooled(embed, mask, grid, cells)
    kept = list(to_places(row["embed"], row["mask"], cells))
    places = inverted_residual(p, "block_1", places, grid, grid[0] // cells[0], kept)
    row["embed"] = from_places(places, cells, p["down_bias"].shape[0])
    return row


def ldpv2(embed, mask, grid, cells, p):
    values = np.array([perceptron(p, x) for x in np.float64(embed)])
    row = pooled(values, mask, grid, cells)
    places = to_places(row["embed"], row["mask"], cells)
    mixed = depthwise(p["peg_kernel"], places, cells)
    out = {k: x + mixed[k] + p["peg_bias"] for k, x in places.items()}
    row["embed"] = from_places(out, cells, values.shape[1])
    return row


def tokenpacker(embed, mask, grid, cells, p, heads, style="paper", bias=None):
    row = pooled(embed, mask, grid, cells)
    side, width = grid[0] // cells[0], embed.shape[1]
    depth = width // heads
    out = np.zeros((len(row["mask"]), p["down_bias"].shape[0]))
    for cell in np.flatnonzero(row["mask"]):
        top, left = cell // cells[1] * side, cell % cells[1] * side
        members, middle, biases = [], [], []
        for dy in range(side):
            for dx in range(side):
                patch = (top + dy) * grid[1] + left + dx
                if mask[patch]:
                    members.append(np.float64(embed[patch]))
                    biases.append(0.0 if bias is None else float(bias[patch]))
                    # Within half a patch of the centre of the cell, in both directions.
                    if max(abs(dy - (side - 1) / 2), abs(dx - (side - 1) / 2)) <= 0.5:
                        middle.append(members[-1])
        query = linear(p, "query", np.mean(middle or members, axis=0))
        keys = [linear(p, "key_down", gelu(linear(p, "key_up", x))) for x in members]
        values = [linear(p, "value_down", gelu(linear(p, "value_up", x))) for x in members]
        if style == "official":
            query = linear(p, "attention_query", layer_norm(p, "query_norm", query, 1e-6))
            keys = [linear(p, "attention_key", layer_norm(p, "key_norm", k, 1e-6)) for k in keys]
            values = [
                linear(p, "attention_value", layer_norm(p, "value_norm", v, 1e-6)) for v in values
            ]
        mixed = np.zeros(width)
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            logits = np.array([k[part] @ query[part] for k in keys]) / math.sqrt(depth)
            for weight, value in zip(softmax(logits + biases), values, strict=True):
                mixed[part] += weight * value[part]
        y = linear(p, "out", mixed)
        if style == "paper":
            y = layer_norm(p, "norm", query + y, 1e-5)
        out[cell] = perceptron(p, y)
    row["embed"] = out
    return row


def attend(p, name, queries, keys, heads, patches):
    """(outputs, attention to the first `patches` keys with rows summing to 1, mean over heads)."""
    width = queries.shape[1]
    depth = width // heads
    q = [linear(p, f"{name}_query", x) for x in queries]
    k = [linear(p, f"{name}_key", x) for x in keys]
    v = [linear(p, f"{name}_value", x) for x in keys]
    out, seen = [], np.zeros((len(queries), patches))
    for t in range(len(queries)):
        mixed = np.zeros(width)
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            weights = softmax(np.array([x[part] @ q[t][part] for x in k]) / math.sqrt(depth))
            for weight, x in zip(weights, v, strict=True):
                mixed[part] += weight * x[part]
            if patches:
                seen[t] += weights[:patches] / weights[:patches].sum() / heads
        out.append(linear(p, f"{name}_out", mixed))
    return np.array(out), seen


def read(embed, mask, grid, budget, layers):
    """The row of `min(budget, real)` queries that `layers(x, live)` computes."""
    row, real = blank(budget, len(mask), embed.shape[1]), np.flatnonzero(mask)
    live = min(budget, len(real))
    if live == 0:
        return row
    z, seen = layers(np.float64(embed[real]), live)
    position = np.array([divmod(n, grid[1]) for n in real], float)
    for t in range(live):
        row["embed"][t], row["position"][t], row["mask"][t] = z[t], seen[t] @ position, True
    for n, patch in enumerate(real):
        row["size"][:live] += seen[:, n] / seen[:, n].sum()
        row["source"][patch] = int(np.argmax(seen[:, n]))
    return row


def perceiver(embed, mask, grid, budget, p, heads, depth, style):
    def norm(name, rows):
        if style == "flamingo":
            return np.array([layer_norm(p, name, x, 1e-5) for x in rows])
        scale = p[f"{name}_scale"]
        return np.array([x / math.sqrt(np.mean(x**2) + 1e-6) * scale for x in rows])

    def layers(x, live):
        z, total = p["queries"][:live], 0
        for i in range(depth):
            y = norm(f"{i}_latent_norm", z)
            keys = np.concatenate([norm(f"{i}_patch_norm", x), y])
            change, seen = attend(p, str(i), y, keys, heads, len(x))
            z, total = z + change, total + seen / depth
            for t, y in enumerate(norm(f"{i}_mlp_norm", z)):
                inner = linear(p, f"{i}_up", y)
                if style == "flamingo":
                    inner = np.maximum(inner, 0) ** 2
                else:
                    inner = inner * silu(linear(p, f"{i}_gate", y))
                z[t] = z[t] + linear(p, f"{i}_down", inner)
        return (z if style == "flamingo" else norm("norm", z)), total

    return read(embed, mask, grid, budget, layers)


def qformer(embed, mask, grid, budget, p, heads, depth):
    def norm(name, rows):
        return np.array([layer_norm(p, f"{name}_norm", x, 1e-12) for x in rows])

    def layers(x, live):
        z, x = norm("query", p["queries"][:live]), norm("patch", x)
        total = []
        for i in range(depth):
            z = norm(f"{i}_self", z + attend(p, f"{i}_self", z, z, heads, 0)[0])
            if i in range(0, depth, 2):
                change, seen = attend(p, f"{i}_cross", z, x, heads, len(x))
                z = norm(f"{i}_cross", z + change)
                total.append(seen)
            inner = [linear(p, f"{i}_down", gelu(linear(p, f"{i}_up", y))) for y in z]
            z = norm(f"{i}_mlp", z + np.array(inner))
        return z, np.mean(total, axis=0)

    return read(embed, mask, grid, budget, layers)
