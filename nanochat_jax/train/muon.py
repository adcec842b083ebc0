"""Muon (Jordan et al., 2024) as an optax transform on stacks of matrices, for both architectures.

Parameters are matrices [..., in, out]; upstream's formulas for torch's (out, in) weights are
transposed. Matrices of equal shape are stacked and orthogonalized together. The stack is sharded
over the mesh's devices, so each device works on its own matrices. Learning rate, momentum and decay
are functions of the step inside the transform.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Schedule = Callable[[Array | int], Array]  # of the step

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (  # Amsel et al., 2025: the best polynomial of each iteration
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonState(NamedTuple):
    # () int32, steps done; optax's name for it, also a tuple method
    count: Array  # type: ignore[assignment]
    momentum: Any  # like the parameters
    second_moment: Any  # modern: [..., 1, out] if out >= in else [..., in, 1]; classic: empty


def _iterate(x: Array, coefficients: tuple[tuple[float, float, float], ...]) -> Array:
    """X <- aX + (bA + cA^2)X with the Gram matrix A of the shorter side; x [K, in, out]."""
    wide = x.shape[-1] >= x.shape[-2]

    def dot(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(x.dtype)

    for a, b, c in coefficients:
        gram = dot("kio,kjo->kij", x, x) if wide else dot("kio,kip->kop", x, x)
        poly = b * gram + c * dot("kij,kjl->kil", gram, gram)
        x = a * x + (dot("kij,kjo->kio", poly, x) if wide else dot("kio,kop->kip", x, poly))
    return x


def _norm(x: Array, axis: Any = (-2, -1)) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis, keepdims=True))


def orthogonalize_classic(update: Array, dtype: Any) -> Array:
    """Five Newton-Schulz iterations towards the nearest orthogonal matrix.

    update [K, in, out]; float32 out.
    """
    x = update.astype(dtype)
    x = x / (_norm(x) + 1e-7).astype(dtype)
    return _iterate(x, NEWTON_SCHULZ).astype(jnp.float32)


def orthogonalize_modern(update: Array, dtype: Any) -> Array:
    """MuonEq (equal row norms), Polar Express, then the norm of an orthogonal matrix (Muon+)."""
    fan_in, fan_out = update.shape[-2:]
    x = update.astype(dtype)
    equal = (_norm(x) / math.sqrt(fan_out)) / jnp.maximum(_norm(x, axis=-2), 1e-6)
    x = x * equal.astype(dtype)
    x = x / (1.01 * _norm(x) + 1e-6).astype(dtype)
    x = _iterate(x, POLAR_EXPRESS).astype(jnp.float32)
    return x * (math.sqrt(min(fan_in, fan_out)) / jnp.maximum(_norm(x), 1e-6))


def _variance_axis(shape: tuple[int, ...]) -> int:
    """The axis NorMuon averages over: the inputs when out >= in, else the outputs."""
    return -2 if shape[-1] >= shape[-2] else -1


def normalize_variance(update: Array, second_moment: Array, beta2: float) -> tuple[Array, Array]:
    """NorMuon (Li et al., 2025): scale each neuron by its running second moment.

    Returns (update, second moment); the update's Frobenius norm is unchanged.
    """
    axis = _variance_axis(update.shape)
    mean_square = jnp.mean(jnp.square(update), axis=axis, keepdims=True)
    second_moment = beta2 * second_moment + (1.0 - beta2) * mean_square
    scale = jax.lax.rsqrt(jnp.maximum(second_moment, 1e-10))
    scaled_norm = jnp.sqrt(
        jnp.sum(mean_square * update.shape[axis] * scale**2, axis=(-2, -1), keepdims=True)
    )
    return update * scale * (_norm(update) / jnp.maximum(scaled_norm, 1e-10)), second_moment


def muon(
    learning_rate: Schedule,
    momentum: Schedule,
    weight_decay: Schedule | None = None,
    *,
    variant: str,
    beta2: float = 0.9,
    compute_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Muon for a tree whose leaves are matrices [in, out] or stacks [L, in, out].

    Args:
      learning_rate, momentum, weight_decay: functions of the number of finished steps.
      variant: "classic" (Newton-Schulz) or "modern" (MuonEq, Polar Express, Muon+, NorMuon,
        cautious decay).
      beta2: decay of NorMuon's second moment.
      compute_dtype: dtype of the iteration's matmuls (bfloat16 on accelerators).
      mesh: the stacked matrices are sharded over all its devices.
    """
    modern = variant == "modern"
    orthogonalize = orthogonalize_modern if modern else orthogonalize_classic

    def init(params: Any) -> MuonState:
        def second(p: Array) -> Array:
            shape = list(p.shape)
            shape[_variance_axis(p.shape)] = 1
            return jnp.zeros(shape, jnp.float32)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return MuonState(
            jnp.zeros((), jnp.int32), zeros, jax.tree.map(second, params) if modern else ()
        )

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        beta = momentum(state.count)
        average = lambda m, g: beta * m + (1.0 - beta) * g  # noqa: E731
        buffers = jax.tree.map(average, state.momentum, grads)
        nesterov = jax.tree.map(average, buffers, grads)
        steps = _orthogonalize_tree(nesterov, orthogonalize, compute_dtype, mesh)
        second_moment = state.second_moment
        if modern:
            pairs = jax.tree.map(
                lambda step, moment: normalize_variance(step, moment, beta2), steps, second_moment
            )
            steps, second_moment = jax.tree.transpose(
                jax.tree.structure(steps), jax.tree.structure((0, 0)), pairs
            )
        rate = learning_rate(state.count)
        decay = weight_decay(state.count) if weight_decay is not None else None
        updates = jax.tree.map(lambda step, p: _update(step, p, rate, decay), steps, params)
        return updates, MuonState(state.count + 1, buffers, second_moment)

    return optax.GradientTransformation(init, update)


def _update(step: Array, p: Array, rate: Array, decay: Array | None) -> Array:
    """What is added to the matrices `p`, from their orthogonalized step."""
    eta = rate * math.sqrt(max(1.0, step.shape[-1] / step.shape[-2]))  # fan_out / fan_in
    if decay is not None:  # cautious: only where decay and update agree
        step = step + decay * p * (step * p >= 0)
    return (-eta * step).astype(p.dtype)


def _orthogonalize_tree(tree: Any, orthogonalize: Callable, dtype: Any, mesh: Mesh | None) -> Any:
    """Orthogonalize every matrix of the tree."""
    leaves, treedef = jax.tree.flatten(tree)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(leaf.shape[-2:], []).append(index)
    for shape, indices in groups.items():
        stack = jnp.concatenate([leaves[i].reshape(-1, *shape) for i in indices])
        count = stack.shape[0]
        if mesh is not None and mesh.size > 1:
            stack = jnp.pad(stack, ((0, -count % mesh.size), (0, 0), (0, 0)))
            stack = jax.lax.with_sharding_constraint(
                stack, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            )
        stack = orthogonalize(stack, dtype)[:count]
        start = 0
        for i in indices:
            size = leaves[i].size // (shape[0] * shape[1])
            leaves[i] = stack[start : start + size].reshape(leaves[i].shape)
            start += size
    return jax.tree.unflatten(treedef, leaves)
