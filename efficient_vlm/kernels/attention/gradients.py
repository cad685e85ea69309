"""Gradients of `attention`: the logits are recomputed, so that memory stays O(N + M)."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call, q, k, v, key_bias, mask, weights):
    out, lse = call.run("forward", q, k, v, key_bias, mask)
    importance = None
    if weights is not None:
        importance = call.importance(q, k, key_bias, mask, lse, weights)
    return out, lse, importance


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _once(call, pass_name, *args):
    """A pass of the gradient, which has no gradients itself."""
    return call.run(pass_name, *args)


def _refuse(call, pass_name, saved, cotangents):
    raise UserError(
        "attention: a second derivative", fix="implementation='reference', which has them"
    )


_once.defvjp(lambda *args: (_once(*args), None), _refuse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_whole(call, *args):
    """The reference where nobody asked for it: its gradients, but no derivatives that the other
    implementations lack, or whether a program can be differentiated would depend on its lengths."""
    return _whole(call, *args)


def _forward_whole(call, *perturbed):
    q, k, v, key_bias, mask, weights = args = jax.tree.map(lambda each: each.value, perturbed)

    def function(q, k, v, key_bias, weights):
        out, lse, importance = _whole(call, q, k, v, key_bias, mask, weights)
        return (out, importance), lse

    # Without the lse, whose gradient, though zero, would take one more map and exponentials of it.
    (out, importance), pull, lse = jax.vjp(function, q, k, v, key_bias, weights, has_aux=True)
    return (out, lse, importance), (pull, args)


def _backward_whole(call, saved, cotangents):
    pull, (q, k, v, key_bias, mask, weights) = saved
    d_out, d_lse, d_importance = cotangents
    gradients = _pulled(pull, _instantiated((d_out, d_importance)))
    if not isinstance(d_lse, SymbolicZero):
        pull = jax.vjp(lambda *args: _whole(call, *args, mask, weights)[1], q, k, v, key_bias)[1]
        gradients = (*jax.tree.map(jnp.add, gradients[:4], _pulled(pull, d_lse)), gradients[4])
    dq, dk, dv, d_bias, d_weights = gradients
    return dq, dk, dv, d_bias, None, d_weights


def _whole(call, *args):
    return reference.attend(*args, scale=call.scale, softcap=call.softcap)


def _instantiated(cotangents):
    return jax.tree.map(
        lambda each: jnp.zeros(each.shape, each.dtype) if isinstance(each, SymbolicZero) else each,
        cotangents,
    )


@jax.custom_vjp
def _pulled(pull, cotangents):
    return pull(cotangents)


_pulled.defvjp(lambda *args: (_pulled(*args), None), lambda *_: _refuse(None, None, None, None))
attend_whole.defvjp(_forward_whole, _backward_whole, symbolic_zeros=True)


def _forward(call, *args):
    results = attend(call, *args)
    return results, (args, results)


def _backward(call, saved, cotangents):
    (q, k, v, key_bias, mask, weights), (out, lse, _) = saved
    d_out, d_lse, d_importance = cotangents
    exact = lse.dtype
    delta = jnp.sum(d_out.astype(exact) * out.astype(exact), axis=-1)
    delta -= jnp.where(jnp.isfinite(lse), d_lse, 0)
    d_weights = gain = None
    if weights is not None:
        # Importance equals attention to one more column of values, the gain, with the weights as
        # its cotangents; so the sum over keys that a row needs is one more forward pass.
        gain = (d_importance / q.shape[1]).astype(exact)
        # Scaled because gradients of means may lie below 6e-8, the least number of float16.
        top = jnp.max(jnp.abs(gain), axis=-1, keepdims=True)
        top = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
        column = (gain / top)[:, None, :, None]
        column = jnp.broadcast_to(column, (*k.shape[:3], 1)).astype(v.dtype)
        received, _ = _once(call, "forward", q, k, column, key_bias, mask)
        received = received[..., 0].astype(exact) * top[..., None]
        delta += weights[:, None] * received
        d_weights = received.sum(axis=1).astype(weights.dtype)
        weights = weights.astype(exact)
    args = (q, k, v, key_bias, mask, lse, delta, d_out.astype(q.dtype), weights, gain)
    dq, dk, dv, d_bias = _once(call, "backward", *args)
    return dq, dk, dv, d_bias, None, d_weights


attend.defvjp(_forward, _backward)
