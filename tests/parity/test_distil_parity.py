"""Losses of distillation and of preferences against torch: values, and slopes by its autograd."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from efficient_vlm.train import distil, preference  # noqa: E402

pytestmark = pytest.mark.parity

RANDOM = np.random.default_rng(3)
LABELS = RANDOM.integers(-1, 11, (3, 5)).astype(np.int32)
LABELS[0, 0] = -1


def of_torch(student, teacher, kind, temperature, beta):
    """With `kl_div`, whose first argument is the one that is measured, as log-probabilities."""

    def kl(p, q):
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    q, p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    if kind == "forward_kl":
        losses = kl(p, q)
    elif kind == "reverse_kl":
        losses = kl(q, p)
    else:
        m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
        losses = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return (losses * temperature**2)[torch.from_numpy(LABELS >= 0)].sum()


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (4.0, 0.2)])
@pytest.mark.parametrize("kind", distil.KINDS)
def test_divergences(kind, temperature, beta):
    student, teacher = RANDOM.normal(size=(2, 3, 5, 11)).astype(np.float32) * 4
    leaf = torch.tensor(student, requires_grad=True)
    theirs = of_torch(leaf, torch.tensor(teacher), kind, temperature, beta)
    theirs.backward()

    def loss(student):
        options = dict(kind=kind, temperature=temperature, beta=beta)
        return distil.divergence(student, teacher, LABELS, **options)[0]

    value, slope = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(slope, leaf.grad.numpy(), atol=1e-5)


def test_log_probs_of_sequences():
    logits = RANDOM.normal(size=(3, 5, 11)).astype(np.float32)
    leaf = torch.tensor(logits, requires_grad=True)
    theirs = -torch.nn.functional.cross_entropy(
        leaf.transpose(1, 2), torch.tensor(LABELS).long(), ignore_index=-1, reduction="none"
    ).sum(-1)
    theirs.sum().backward()
    found, count = preference.sequence_log_probs(logits, LABELS)
    np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=1e-5)
    np.testing.assert_array_equal(count, (LABELS >= 0).sum(-1))
    slope = jax.grad(lambda x: preference.sequence_log_probs(x, LABELS)[0].sum())(logits)
    np.testing.assert_allclose(slope, leaf.grad.numpy(), atol=1e-6)
