r"""Token embeddings that bring an erased concept back (SubAttack), and their removal (SubDefense).

An attack token is a non-negative combination of the vocabulary's embeddings, so its largest
coefficients name words. Each further token is orthogonal to the earlier ones. Their span is kept as
orthonormal columns ``(d, K)``; columns of zeros stand for tokens that are still to come, so that a
compiled step serves all of them.

The paper's text leaves open the network's size, the last non-negative map, and whether the
dictionary or the result is made orthogonal: the choices here are marked as such.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlib_unlearn.losses.likelihood import upcast
from jaxlib_unlearn.optim.arrays import matmul

# Functions that make a coefficient non-negative. The literal `relu` can start with no word at all.
POSITIVE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softplus": jax.nn.softplus,
    "abs": jnp.abs,
    "relu": jax.nn.relu,
}
# The vectors made orthogonal to the earlier tokens: the network's inputs, or only its result.
FORMS = ("deflate", "project")

Network = dict[str, dict[str, jax.Array]]


class Token(NamedTuple):
    """An attack token.

    Args:
        embedding: ``(d,)``.
        coefficients: ``(N,)``, the weights of the vocabulary's rows, not negative.
    """

    embedding: jax.Array
    coefficients: jax.Array


def init_network(key: jax.Array, width: int, hidden: int = 100) -> Network:
    r"""The network of the coefficients: d to hidden to 1, uniform in ``1 / sqrt(inputs)``.

    Args:
        key: the key of the draw.
        width: d.
        hidden: the number of units; 100 as in Conceptor's code (the paper does not say).

    Returns:
        ``{"hidden": {"kernel": (d, hidden), "bias"}, "output": {"kernel": (hidden, 1), "bias"}}``.

    Example:
        >>> import jax
        >>> init_network(jax.random.key(0), 8)["hidden"]["kernel"].shape
        (8, 100)
    """
    names, sizes = ("hidden", "output"), ((width, hidden), (hidden, 1))
    network = {}
    for name, shape, folded in zip(names, sizes, jax.random.split(key), strict=True):
        bound = shape[0] ** -0.5
        one, two = jax.random.split(folded)
        network[name] = {
            "kernel": jax.random.uniform(one, shape, minval=-bound, maxval=bound),
            "bias": jax.random.uniform(two, shape[1:], minval=-bound, maxval=bound),
        }
    return network


def coefficients(network: Network, rows: ArrayLike, positive: str = "softplus") -> jax.Array:
    r"""The weight of each word in a token.

    .. math::
        \alpha_i = \phi(w^T \max(W^T v_i + b, 0) + \beta) \ge 0

    Args:
        network: the parameters, see `init_network`.
        rows: ``(N, d)`` embeddings.
        positive: phi, one of `POSITIVE`.

    Returns:
        ``(N,)`` float32 or wider.

    Raises:
        ValueError: an unknown phi.

    Example:
        >>> import jax
        >>> alpha = coefficients(init_network(jax.random.key(0), 4), jax.numpy.eye(4))
        >>> alpha.shape, bool((alpha > 0).all())
        ((4,), True)

    SubAttack, arXiv 2504.21307; hidden ReLU and `abs` as in Conceptor's code, `softplus` is ours.
    """
    if positive not in POSITIVE:
        raise ValueError(f"positive is one of {', '.join(POSITIVE)}; got {positive!r}")
    first, last = network["hidden"], network["output"]
    hidden = jax.nn.relu(matmul(upcast(rows), first["kernel"]) + first["bias"])
    return POSITIVE[positive]((matmul(hidden, last["kernel"]) + last["bias"])[..., 0])


def project(embeddings: ArrayLike, basis: ArrayLike) -> jax.Array:
    r"""Embeddings without their part in a subspace: SubDefense.

    .. math::
        e' = e - U U^T e

    Applied where a text encoder looks embeddings up, it also covers embeddings outside the
    vocabulary; applied to the vocabulary alone, it does not.

    Args:
        embeddings: ``(..., d)``.
        basis: U ``(d, K)``, orthonormal columns, some of them possibly zero.

    Returns:
        ``(..., d)`` in the dtype of the embeddings; computed in float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> project(jnp.array([[3.0, 4.0]]), jnp.array([[1.0], [0.0]])).tolist()
        [[0.0, 4.0]]

    SubDefense, arXiv 2504.21307.
    """
    rows, columns = upcast(embeddings), upcast(basis)
    rest = rows - matmul(matmul(rows, columns), columns.T)
    return rest.astype(jnp.asarray(embeddings).dtype)


def attack_token(
    network: Network,
    vocabulary: ArrayLike,
    basis: ArrayLike,
    *,
    form: str = "deflate",
    positive: str = "softplus",
    norm: ArrayLike | None = None,
) -> Token:
    r"""The token that a network's coefficients make, orthogonal to the earlier tokens.

    .. math::
        v = \sum_i \alpha_i P v_i,\quad P = I - U U^T, \qquad
        \alpha_i = g(P v_i)\ \text{(deflate)}\ \text{or}\ g(v_i)\ \text{(project)}

    and then ``v norm / |v|``: only its direction is learnt. A token of length zero stays zero, with
    finite gradients.

    Args:
        network: the parameters of g, see `init_network`.
        vocabulary: ``(N, d)``, without special tokens.
        basis: U ``(d, K)``, the span of the earlier tokens; zeros at the start.
        form: one of `FORMS` (both are readings of the paper).
        positive: the name of phi, see `coefficients`.
        norm: length of the result; None: the mean length of the vocabulary's rows.

    Returns:
        The token.

    Raises:
        ValueError: an unknown form or phi.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> words, none = jnp.eye(4), jnp.zeros((4, 2))
        >>> token = attack_token(init_network(jax.random.key(0), 4), words, none)
        >>> float(jnp.linalg.norm(token.embedding).round(4))
        1.0

    SubAttack, arXiv 2504.21307; the length as in Conceptor's code.
    """
    if form not in FORMS:
        raise ValueError(f"form is one of {', '.join(FORMS)}; got {form!r}")
    rows = upcast(vocabulary)
    if norm is None:
        norm = jnp.mean(jnp.linalg.norm(rows, axis=-1))
    alpha = coefficients(network, project(rows, basis) if form == "deflate" else rows, positive)
    # P is linear. The second one removes what the first leaves by rounding.
    summed = project(project(matmul(alpha, rows), basis), basis)
    smallest = 1e-12 * jnp.square(norm)
    return Token(summed * norm * jax.lax.rsqrt(jnp.sum(jnp.square(summed)) + smallest), alpha)


def extend(basis: ArrayLike, embedding: ArrayLike, place: ArrayLike) -> jax.Array:
    """A basis with the direction of one more token in a column of zeros.

        ``U[:, place] = v / |v|``,  v first made orthogonal to U, twice

    Args:
        basis: ``(d, K)``, orthonormal columns and columns of zeros.
        embedding: ``(d,)``.
        place: the index of the new column, a column of zeros.

    Returns:
        ``(d, K)`` float32 or wider. A token inside the span adds rounding: see `span` for sets
        that may be dependent.

    Example:
        >>> import jax.numpy as jnp
        >>> extend(jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.array([5.0, 2.0]), 1).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    columns = upcast(basis)
    rest = project(project(upcast(embedding), columns), columns)
    return columns.at[:, place].set(rest / jnp.linalg.norm(rest))


def span(embeddings: ArrayLike, tol: float | None = None) -> jax.Array:
    """Orthonormal columns that span a set of embeddings.

    Args:
        embeddings: ``(K, d)``, any rows.
        tol: singular values up to this share of the largest count as zero; None: rounding,
            ``max(K, d)`` times the precision of the dtype.

    Returns:
        ``(d, r)`` with r the rank. Not for use inside `jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> span(jnp.array([[0.0, 3.0, 0.0], [0.0, 6.0, 0.0]])).shape
        (3, 1)
    """
    rows = upcast(embeddings)
    _, values, right = jnp.linalg.svd(rows, full_matrices=False)
    if tol is None:
        tol = max(rows.shape) * float(jnp.finfo(rows.dtype).eps)
    rank = int(np.sum(np.asarray(values) > tol * max(float(values[0]), 0.0))) if values.size else 0
    return right[:rank].T


def words_of(
    alpha: ArrayLike | Sequence[float], words: Sequence[str], top: int = 20
) -> list[tuple[str, float]]:
    """The words of a token's largest coefficients, the largest first.

    Args:
        alpha: ``(N,)``.
        words: the words of the N rows; CLIP's `</w>` is left out.
        top: the number of words.

    Returns:
        Words and coefficients; equal ones in the order of the vocabulary.

    Raises:
        ValueError: not as many words as coefficients.

    Example:
        >>> words_of([0.1, 0.5, 0.2], ["hat</w>", "shoe</w>", "lace"], top=2)
        [('shoe', 0.5), ('lace', 0.2)]
    """
    values = np.asarray(alpha)
    if len(words) != len(values):
        raise ValueError(f"{len(values)} coefficients of {len(words)} words")
    order = np.argsort(-values, kind="stable")[:top]
    return [(words[int(i)].removesuffix("</w>"), values[i].item()) for i in order]


def share_of_top(
    alpha: ArrayLike, vocabulary: ArrayLike, basis: ArrayLike, top: int = 50
) -> jax.Array:
    r"""The share of a token that its first words explain: the cosine of their sum with it.

    .. math::
        \cos\Big(\sum_{i \in \text{top}} \alpha_i P v_i,\ \sum_i \alpha_i P v_i\Big)

    Args:
        alpha: ``(N,)``.
        vocabulary: ``(N, d)``.
        basis: ``(d, K)``, the span of the earlier tokens.
        top: the number of largest coefficients.

    Returns:
        A scalar from -1 to 1; 0 where either sum is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> alpha, none = jnp.array([3.0, 4.0]), jnp.zeros((2, 1))
        >>> float(share_of_top(alpha, jnp.eye(2), none, top=1).round(3))
        0.8
    """
    values, rows = upcast(alpha), upcast(vocabulary)
    largest = jax.lax.top_k(values, min(top, len(values)))[1]
    first, whole = (
        project(matmul(part, rows), basis)
        for part in (jnp.zeros_like(values).at[largest].set(values[largest]), values)
    )
    norms = jnp.linalg.norm(first) * jnp.linalg.norm(whole)
    return jnp.where(norms > 0, jnp.dot(first, whole) / jnp.where(norms > 0, norms, 1), 0)
