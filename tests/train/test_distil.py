"""Distillation losses against float64 sums from the papers, and their numerical gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.train import distil
from efficient_vlm.train import distil_features as features
from efficient_vlm.train.losses import ratio

RANDOM = np.random.default_rng(0)
LABELS = np.array([[3, -1, 0, 5], [-1, -1, 2, 1]], np.int32)
STUDENT, TEACHER = RANDOM.normal(size=(2, 2, 4, 7)) * 2
KINDS = distil.KINDS


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0), -1)


def of_probabilities(p, q, kind, beta):
    """`p` of the teacher."""
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def expected(student, teacher, kind, temperature, beta):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return (of_probabilities(p, q, kind, beta) * temperature**2)[LABELS >= 0].sum()


def numerical(function, at, step=1e-5):
    """Central differences in float64."""
    slopes = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        change = np.zeros_like(at)
        change[index] = step
        slopes[index] = (function(at + change) - function(at - change)) / (2 * step)
    return slopes


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.5, 0.1), (0.5, 0.9)])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(kind, temperature, beta):
    options = dict(kind=kind, temperature=temperature, beta=beta)

    def loss(student, teacher):
        return distil.divergence(student, teacher, LABELS, **options)

    (value, count), pull = jax.vjp(loss, jnp.float32(STUDENT), jnp.float32(TEACHER))
    assert count == (LABELS >= 0).sum()
    np.testing.assert_allclose(
        value, expected(STUDENT, TEACHER, kind, temperature, beta), rtol=1e-5
    )
    slope, none = pull((jnp.float32(1), jnp.float32(0)))
    differences = numerical(lambda s: expected(s, TEACHER, kind, temperature, beta), STUDENT)
    np.testing.assert_allclose(slope, differences, atol=3e-6, rtol=1e-4)
    assert not none.any()  # A teacher learns nothing.
    assert not slope[LABELS < 0].any()


def test_what_the_divergences_are_by_hand():
    """Two tokens, p = (3/4, 1/4), q = (1/2, 1/2)."""
    labels = np.zeros((1,), np.int32)
    teacher, student = np.log([[3.0, 1.0]]).astype(np.float32), np.zeros((1, 2), np.float32)
    by_hand = {
        "forward_kl": 0.75 * np.log(1.5) + 0.25 * np.log(0.5),
        "reverse_kl": 0.5 * np.log(2 / 3) + 0.5 * np.log(2),
        "jensen_shannon": 0.5 * (0.75 * np.log(6 / 5) + 0.25 * np.log(2 / 3))
        + 0.5 * (0.5 * np.log(4 / 5) + 0.5 * np.log(4 / 3)),
    }
    for kind, value in by_hand.items():
        found = ratio(distil.divergence(student, teacher, labels, kind=kind))
        np.testing.assert_allclose(found, value, rtol=1e-6)
        same, _ = distil.divergence(student, student, labels, kind=kind)
        assert same == 0


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits(kind):
    """Logits of 1e4 with either sign, and padding that is not finite: values and slopes are."""
    signs = RANDOM.choice([-1.0, 1.0], (2, *STUDENT.shape))
    student, teacher = (STUDENT + 1e4 * signs[0]), (TEACHER + 1e4 * signs[1])
    student[LABELS < 0], teacher[LABELS < 0] = np.nan, np.inf
    student, teacher = np.float32(student), np.float32(teacher)

    def loss(student):
        return distil.divergence(student, teacher, LABELS, kind=kind)[0]

    value, slope = jax.value_and_grad(loss)(student)
    assert np.isfinite(slope).all()

    # Of exact log-probabilities: float64 holds them, probabilities of e-20000 it does not.
    def logs(x):
        x = np.float64(x[LABELS >= 0])
        top = x.max(-1, keepdims=True)
        return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))

    p, q = logs(teacher), logs(student)
    if kind == "reverse_kl":
        p, q = q, p
    if kind == "jensen_shannon":
        m = np.logaddexp(p, q) - np.log(2)
        total = 0.5 * (np.exp(p) * (p - m) + np.exp(q) * (q - m)).sum()
    else:
        total = (np.exp(p) * (p - q)).sum()
    np.testing.assert_allclose(value, total, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rest", distil.RESTS)
@pytest.mark.parametrize("kind", KINDS)
def test_top_tokens(kind, rest, temperature):
    options = dict(kind=kind, temperature=temperature, beta=0.3)

    def loss(student, k):
        top = distil.top_tokens(np.float32(TEACHER), k, temperature=temperature)
        return distil.divergence_of_top(student, top, LABELS, rest=rest, **options)

    def reference(student, k):
        p, q = softmax(TEACHER, temperature), softmax(student, temperature)
        order = np.argsort(-p, axis=-1)[..., :k]
        top = [np.take_along_axis(x, order, -1) for x in (p, q)]
        if rest == "bucket":
            p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in top)
        else:
            p, q = (x / x.sum(-1, keepdims=True) for x in top)
        return (of_probabilities(p, q, kind, 0.3) * temperature**2)[LABELS >= 0].sum()

    (value, count), slope = jax.value_and_grad(lambda s: (loss(s, 3)[0], 0), has_aux=True)(
        np.float32(STUDENT)
    )
    np.testing.assert_allclose(value, reference(STUDENT, 3), rtol=2e-5)
    np.testing.assert_allclose(
        slope, numerical(lambda s: reference(s, 3), STUDENT), atol=1e-5, rtol=1e-4
    )
    whole, _ = distil.divergence(np.float32(STUDENT), np.float32(TEACHER), LABELS, **options)
    if rest == "bucket":  # Less is known: never more than the whole.
        assert value <= whole
    everything, slope = jax.value_and_grad(lambda s: loss(s, 7)[0])(np.float32(STUDENT))
    np.testing.assert_allclose(everything, whole, rtol=1e-5)
    assert np.isfinite(slope).all() and count == 0


def test_rest_of_a_sure_student():
    """1 - p has no digits where p is next to 1; the sum over the others has."""
    student = np.float32([[30.0, 0.0, 0.0, 0.0]])
    top = distil.top_tokens(np.float32([[1.0, 0.0, 0.0, 0.0]]), 1)
    value, _ = distil.divergence_of_top(student, top, np.zeros(1, np.int32))
    p = np.exp(1) / (np.exp(1) + 3)
    q = 1 / (1 + 3 * np.exp(-30.0))
    rest = 3 * np.exp(-30.0) / (1 + 3 * np.exp(-30.0))
    by_hand = p * np.log(p / q) + (1 - p) * np.log((1 - p) / rest)
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)


def test_chunks_are_the_whole():
    """Of hidden states through heads, with a last chunk that is not full; slopes of heads, too."""
    hidden, weights = RANDOM.normal(size=(2, 4, 5)), RANDOM.normal(size=(5, 7))
    hidden, weights = np.float32(hidden), np.float32(weights)

    def head(labels, hidden, teacher, weights):
        return distil.divergence(hidden @ weights, teacher, labels)

    def chunked(hidden, weights):
        def loss(*rows):
            return head(*rows, weights)

        return distil.over_chunks(loss, 3, LABELS, hidden, np.float32(TEACHER))[0]

    def whole(hidden, weights):
        return head(LABELS, hidden, np.float32(TEACHER), weights)[0]

    for found, wanted in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, weights)),
        jax.tree.leaves(jax.value_and_grad(whole, (0, 1))(hidden, weights)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    counts = distil.over_chunks(lambda labels: (labels.sum(dtype=jnp.float32),) * 2, 3, LABELS >= 0)
    assert counts == (5, 5)


def test_chunks_need_no_whole_logits():
    """The compiled step of 512 positions and 4,096 tokens: temporaries below one array of them."""
    labels = jnp.zeros(512, jnp.int32)
    hidden, weights = jnp.ones((512, 8)), jnp.ones((8, 4096))

    def loss(hidden, weights):
        def of(labels, hidden, teacher):
            return distil.divergence(hidden @ weights, teacher @ weights, labels)

        return distil.over_chunks(of, 32, labels, hidden, hidden)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 4096 * 4 / 2


@pytest.mark.parametrize("kind", features.HIDDEN)
@pytest.mark.parametrize("project", [False, True])
def test_hidden_states(kind, project):
    student = RANDOM.normal(size=(2, 4, 3 if project else 5))
    teacher, projection = RANDOM.normal(size=(2, 4, 5)), RANDOM.normal(size=(3, 5))

    def loss(student, projection):
        options = dict(projection=projection) if project else {}
        return features.hidden_states(student, np.float32(teacher), LABELS, kind=kind, **options)

    def reference(student, projection):
        student = student @ projection if project else student
        if kind == "mse":
            values = np.square(student - teacher).mean(-1)
        else:
            lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
            values = 1 - (student * teacher).sum(-1) / lengths
        return values[LABELS >= 0].sum()

    value, count = loss(np.float32(student), np.float32(projection))
    np.testing.assert_allclose(value, reference(student, projection), rtol=1e-5)
    assert count == 5
    slopes = jax.grad(lambda *a: loss(*a)[0], (0, 1))(np.float32(student), np.float32(projection))
    wanted = (
        numerical(lambda s: reference(s, projection), student),
        numerical(lambda p: reference(student, p), projection),
    )
    for slope, numbers in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(slope, numbers, atol=2e-5, rtol=1e-4)
    zero = jax.grad(lambda s: loss(s, np.float32(projection))[0])(np.zeros(student.shape, "f4"))
    assert np.isfinite(zero).all()


@pytest.mark.parametrize("kind", features.ATTENTION)
@pytest.mark.parametrize("heads", [2, 6])
def test_attention(kind, heads):
    student, teacher = (softmax(RANDOM.normal(size=(2, h, 4, 3))) for h in (2, heads))
    value, count = features.attention(np.float32(student), np.float32(teacher), LABELS, kind=kind)
    if heads != 2:
        student, teacher = (a.mean(1, keepdims=True) for a in (student, teacher))
    values = kl(teacher, student) if kind == "kl" else np.square(student - teacher).mean(-1)
    np.testing.assert_allclose(value, values.mean(1)[LABELS >= 0].sum(), rtol=1e-5)
    assert count == 5
    same, _ = features.attention(np.float32(teacher), np.float32(teacher), LABELS, kind=kind)
    assert abs(same) < 1e-6


def test_attention_to_fewer_tokens():
    """What the teacher gives to all that a token stands for, it gives to that token."""
    source = np.array([[0, 0, 1, -1], [1, 1, 1, 0]], np.int32)
    teacher = softmax(RANDOM.normal(size=(2, 1, 3, 4)))
    folded = features.for_student(np.float32(np.moveaxis(teacher, -1, 1)), source, 2, mean=False)
    folded = np.moveaxis(np.asarray(folded), 1, -1)
    by_hand = np.zeros((2, 1, 3, 2))
    for row in range(2):
        for patch, token in enumerate(source[row]):
            if token >= 0:
                by_hand[row, ..., token] += teacher[row, ..., patch]
    np.testing.assert_allclose(folded, by_hand, rtol=1e-6)
    values = RANDOM.normal(size=(2, 4, 5))
    means = features.for_student(np.float32(values), source, 3)
    np.testing.assert_allclose(means[0, 0], values[0, :2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(means[1, 1], values[1, :3].mean(0), rtol=1e-5)
    assert not means[:, 2].any()  # Stands for nothing.


def test_relations():
    mask = np.array([[True, True, True, False], [True, True, False, False], [False] * 4])
    student, teacher = RANDOM.normal(size=(3, 4, 5)), RANDOM.normal(size=(3, 4, 9))
    student[~mask], teacher[~mask] = np.nan, np.inf

    def reference(student):
        values = 0.0
        for row in range(2):
            units = [
                x[row][mask[row]] / np.linalg.norm(x[row][mask[row]], axis=-1, keepdims=True)
                for x in (student, teacher)
            ]
            a, b = ((u @ u.T).ravel() for u in units)
            values += 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return values

    def loss(student):
        return features.relations(student, np.float32(teacher), mask)

    value, count = loss(np.float32(student))
    np.testing.assert_allclose(value, reference(student), rtol=1e-5)
    assert count == 2
    slope = jax.grad(lambda s: loss(s)[0])(np.float32(student))
    wanted = numerical(reference, np.where(mask[..., None], student, 0))
    np.testing.assert_allclose(slope, wanted, atol=2e-5, rtol=1e-3)
    # Sizes and rotations of the whole space are no relations.
    turn = np.linalg.qr(RANDOM.normal(size=(5, 5)))[0]
    same, _ = features.relations(np.float32(student @ turn * 3), np.float32(student), mask)
    assert abs(same) < 1e-5


@pytest.mark.parametrize(
    "call",
    [
        lambda: distil.divergence(STUDENT, TEACHER[..., :5], LABELS),
        lambda: distil.divergence(STUDENT, TEACHER, LABELS, kind="kl"),
        lambda: distil.divergence(STUDENT, TEACHER, LABELS, temperature=0),
        lambda: distil.divergence(STUDENT, TEACHER, LABELS, kind="jensen_shannon", beta=1.0),
        lambda: distil.divergence_of_top(
            STUDENT, distil.top_tokens(TEACHER, 2), LABELS, rest="drop"
        ),
        lambda: features.hidden_states(STUDENT, TEACHER[..., :5], LABELS),
        lambda: features.hidden_states(STUDENT, TEACHER, LABELS, kind="kl"),
        lambda: features.attention(STUDENT[:, :, None], TEACHER[:, :, None], LABELS, kind="no"),
    ],
)
def test_errors(call):
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 3
