r"""Noise schedules of diffusion models, and samplers as tables: DDIM, PNDM (PLMS) and LMS.

All three samplers take steps of one form,

.. math::
    x_{i+1} = s_i\, x_i + \sum_{j=0}^{3} w_{ij}\, \epsilon_{i-j} + n_i z,

so a sampler is a function that fills a table of the numbers s, w and n (`Steps`), and one pure
function (`advance`) takes a step. The table is made on the host in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line

PAST = 3  # predictions that a step may use beside its own


@dataclass(frozen=True)
class Schedule:
    r"""A noise schedule; the defaults are those of Stable Diffusion v1.

    .. math::
        \beta_s = \Bigl(\sqrt{\beta_0} + \tfrac{s}{S-1} (\sqrt{\beta_1} - \sqrt{\beta_0})\Bigr)^2,
        \qquad \bar\alpha_t = \prod_{s \le t} (1 - \beta_s)

    Args:
        num_train_timesteps: S, times of the model; a time is 0 to S - 1.
        beta_start: the first beta.
        beta_end: the last one.
        beta_schedule: `scaled_linear`, as above; `linear`: betas are evenly spaced.
        steps_offset: added to the times of DDIM and PNDM.
        set_alpha_to_one: whether abar is 1 behind their last step; if not, it is that of time 0.
        sampler: the row of `SAMPLERS` that is meant for the model.

    Raises:
        ValueError: a word that is unknown, or numbers that make no schedule.

    Example:
        >>> abar = Schedule().abar
        >>> abar.dtype, float(abar[0]), float(abar[499])
        (dtype('float32'), 0.99915, 0.277669)

    Paper: Ho et al., arXiv:2006.11239, section 2; Rombach et al., arXiv:2112.10752, section B.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    sampler: str = "pndm"

    def __post_init__(self):
        for name, words in (("beta_schedule", BETAS), ("sampler", SAMPLERS)):
            if (found := getattr(self, name)) not in words:
                raise ValueError(f"{name} is one of {', '.join(words)}, got {found!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas from {self.beta_start} to {self.beta_end} make no schedule")
        if self.num_train_timesteps < 1 or self.steps_offset < 0:
            raise ValueError("num_train_timesteps is at least 1 and steps_offset at least 0")

    @property
    def abar(self) -> np.ndarray:
        """Alpha-bar of every time, float32 `(S,)`, as PyTorch's schedulers compute it."""
        return _abar(self)


def _evenly(first: float, last: float, count: int) -> np.ndarray:
    """Float32 numbers as `torch.linspace` rounds them: counted from both ends."""
    start, end = np.float32(first), np.float32(last)
    step = float((end - start) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    rising, falling = float(start) + step * i, float(end) - step * (count - 1 - i)
    return np.where(i < count // 2, rising, falling).astype(np.float32)


BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "scaled_linear": lambda first, last, count: _evenly(first**0.5, last**0.5, count) ** 2,
    "linear": _evenly,
}


@functools.lru_cache(16)
def _abar(schedule: Schedule) -> np.ndarray:
    s = schedule
    betas = BETAS[s.beta_schedule](s.beta_start, s.beta_end, s.num_train_timesteps)
    found = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
    found.flags.writeable = False
    return found


def guided(eps: jax.Array, weight: jax.Array | float) -> jax.Array:
    r"""Classifier-free guidance of a batch that was predicted without and with its prompts.

    .. math:: \epsilon = \epsilon_u + w\, (\epsilon_c - \epsilon_u)

    Args:
        eps: `(2 B, ...)`: predictions for the empty prompt, then those for the prompts.
        weight: w; 1 is the prediction for the prompt. It may be traced.

    Returns:
        `(B, ...)`.

    Example:
        >>> guided(jnp.array([0.0, 1.0, 2.0, 4.0]), 7.5).tolist()
        [15.0, 23.5]

    Paper: Ho and Salimans, arXiv:2207.12598, equation 6, with w = 1 + the paper's weight.
    """
    without, given = jnp.split(eps, 2)
    return without + weight * (given - without)


class Steps(NamedTuple):
    """The calls of a model that make a sample, N of them, and what each one does to the sample.

    Args:
        times: float32 `(N,)`; the times of LMS are fractional.
        inputs: float64 `(N,)`; the model reads the sample times this.
        scale: float64 `(N,)`, the factors of the sample.
        weights: float64 `(N, 4)`, the weights of this prediction and of the three before it.
        noise: float64 `(N,)`, the factors of fresh standard normal noise.
        again: bool `(N,)`: the step before is taken once more, from the sample that it began with,
            and later steps do not see this prediction.
        start: the standard deviation of the first sample, which is noise.
    """

    times: np.ndarray
    inputs: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    noise: np.ndarray
    again: np.ndarray
    start: float = 1.0


class State(NamedTuple):
    """The state of a sampler between two steps.

    Args:
        sample: `(...)`.
        before: the sample that the last step began with.
        past: `(3, ...)`, the last predictions of noise, newest first.
    """

    sample: jax.Array
    before: jax.Array
    past: jax.Array


def begin(steps: Steps, noise: jax.Array) -> State:
    """The state before the first step.

    Args:
        steps: the table of the sampler's steps.
        noise: standard normal, in the shape and dtype of a sample.
    """
    sample = noise * jnp.asarray(steps.start, noise.dtype)
    return State(sample, sample, jnp.zeros((PAST, *noise.shape), noise.dtype))


def model_input(steps: Steps, state: State, i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The inputs of the model in step i: the scaled sample and a float32 time."""
    scale = jnp.asarray(steps.inputs, state.sample.dtype)[i]
    return scale * state.sample, jnp.asarray(steps.times)[i]


def advance(
    steps: Steps, state: State, eps: jax.Array, i: jax.Array | int, noise: jax.Array | None = None
) -> State:
    """Step i: the next state, given what the model predicts.

    Args:
        steps: the table of the sampler's steps.
        state: the state that `begin` or the previous step returned.
        eps: the predicted noise in `model_input`, in the shape of the sample.
        i: 0 to N - 1; it may be traced, as the index of a `jax.lax.scan`.
        noise: standard normal; None where the sampler draws none.

    Returns:
        The state, in the dtype of the old one.

    Example:
        >>> steps = plan(Schedule(), 2, "ddim")
        >>> state = begin(steps, jnp.ones(()))
        >>> for i in range(2):
        ...     state = advance(steps, state, jnp.zeros(()), i)
        >>> float(state.sample)  # sqrt(abar_0 / abar_501)
        1.906
    """
    dtype = state.sample.dtype
    again = jnp.asarray(steps.again)[i]
    eps = eps.astype(dtype)
    weights = jnp.asarray(steps.weights, dtype)[i]
    base = jnp.where(again, state.before, state.sample)
    sample = jnp.asarray(steps.scale, dtype)[i] * base + weights[0] * eps
    # Not a matrix product, which accelerators round.
    for j in range(PAST):
        sample = sample + weights[j + 1] * state.past[j]
    if noise is not None:
        sample = sample + jnp.asarray(steps.noise, dtype)[i] * noise.astype(dtype)
    past = jnp.where(again, state.past, jnp.concatenate([eps[None], state.past[:-1]]))
    return State(sample, base, past)


def sample(
    steps: Steps,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    draw: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """A sample from noise: all steps in one `jax.lax.scan`.

    Args:
        steps: the table of the sampler's steps.
        denoise: `(x, time) -> eps`, the model with its condition, and guidance where there is any.
        noise: standard normal `(B, ...)`.
        draw: `i -> z`, the fresh noise of step i; needed by DDIM with an eta above 0.

    Returns:
        Samples `(B, ...)`.

    Raises:
        ValueError: the sampler draws noise and there is no `draw`.

    Example:
        >>> steps = plan(Schedule(), 50, "lms")
        >>> spread = lambda x, time: 0.9 * x  # of a model that knows one image
        >>> sample(steps, spread, jnp.ones((2, 4, 4, 1))).shape
        (2, 4, 4, 1)
    """
    if draw is None and np.any(steps.noise):
        raise ValueError("this sampler draws noise; give draw")

    def body(state, i):
        eps = denoise(*model_input(steps, state, i))
        return advance(steps, state, eps, i, None if draw is None else draw(i)), None

    state, _ = jax.lax.scan(body, begin(steps, noise), jnp.arange(len(steps.times)))
    return state.sample


def plan(schedule: Schedule, count: int, name: str | None = None, eta: float = 0.0) -> Steps:
    """The steps of a sampler.

    Args:
        schedule: the model's schedule.
        count: the number of steps; PNDM calls the model once more.
        name: a row of `SAMPLERS`; None: the schedule's own sampler.
        eta: the noise of DDIM: 0, none is drawn; 1, as much as DDPM draws.

    Returns:
        The table of its steps.

    Raises:
        UserError: the sampler is unknown, there are too few or too many steps, or eta is outside
            0 to 1 or given to a sampler that has none.

    Example:
        >>> plan(Schedule(), 50, "ddim").times[:3].tolist()
        [981.0, 961.0, 941.0]
        >>> len(plan(Schedule(), 50).times)
        51

    Paper: Song et al., arXiv:2010.02502, equation 12 (DDIM); Liu et al., arXiv:2202.09778,
    equations 11 and 12 (PNDM, without Runge-Kutta steps); Katherine Crowson's k-diffusion (LMS).
    """
    name = schedule.sampler if name is None else name
    if name not in SAMPLERS:
        raise UserError(f"no sampler {one_line(name, 40)!r}; use one of {', '.join(SAMPLERS)}")
    row, most = SAMPLERS[name], schedule.num_train_timesteps
    if not row.fewest <= count <= most:
        raise UserError(
            f"{count} steps are not for {name}, which takes {row.fewest} to {most} of them with "
            "this model; choose another number"
        )
    if not 0 <= eta <= (1 if row.draws else 0):
        drawing = ", ".join(name for name, other in SAMPLERS.items() if other.draws)
        raise UserError(f"eta {eta:g} is not for {name}; it is 0, or up to 1 with {drawing}")
    return row.steps(schedule, count, eta)


def _times(schedule: Schedule, count: int) -> tuple[np.ndarray, int]:
    """Times from the noisiest on, and the distance between them."""
    gap = schedule.num_train_timesteps // count
    times = np.arange(count)[::-1] * gap + schedule.steps_offset
    if times[0] >= schedule.num_train_timesteps:
        raise UserError(
            f"{count} steps begin at time {times[0]}, behind the last one of the model, "
            f"{schedule.num_train_timesteps - 1}; take fewer"
        )
    return times, gap


def _between(schedule: Schedule, times: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64 alpha-bar of times, and that of the times a gap later in the walk."""
    abar = schedule.abar.astype(np.float64)
    final = 1.0 if schedule.set_alpha_to_one else abar[0]
    later = times - gap
    return abar[times], np.where(later < 0, final, abar[later])


def _table(times: np.ndarray, **columns: Any) -> Steps:
    """A table; the columns left out change nothing."""
    n = len(times)
    plain = {
        "inputs": np.ones(n),
        "scale": np.ones(n),
        "noise": np.zeros(n),
        "again": np.zeros(n, bool),
    }
    return Steps(times=times.astype(np.float32), **{**plain, **columns})


def _ddim(schedule: Schedule, count: int, eta: float) -> Steps:
    times, gap = _times(schedule, count)
    a, b = _between(schedule, times, gap)
    std = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
    weights = np.zeros((count, 1 + PAST))
    weights[:, 0] = np.sqrt(1 - b - std**2) - np.sqrt(b * (1 - a) / a)
    return _table(times, scale=np.sqrt(b / a), weights=weights, noise=std)


# Weights of PLMS: the first step, the same again, then Adams-Bashforth of rising order.
ADAMS = (
    np.array([1, 0, 0, 0]),
    np.array([1, 1, 0, 0]) / 2,
    np.array([3, -1, 0, 0]) / 2,
    np.array([23, -16, 5, 0]) / 12,
    np.array([55, -59, 37, -9]) / 24,
)


def _pndm(schedule: Schedule, count: int, eta: float) -> Steps:
    """PLMS: the first step is taken twice, the second time with the mean of both its ends."""
    del eta
    times, gap = _times(schedule, count)
    a, b = _between(schedule, times, gap)
    shift = -(b - a) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))
    calls = np.array([0, 1, *range(1, count)] if count > 1 else [0])
    step = np.array([0, 0, *range(1, count)] if count > 1 else [0])
    weights = np.stack([ADAMS[min(i, len(ADAMS) - 1)] for i in range(len(calls))])
    return _table(
        times[calls],
        scale=np.sqrt(b / a)[step],
        weights=shift[step, None] * weights,
        again=np.arange(len(calls)) == 1,
    )


def _lms(schedule: Schedule, count: int, eta: float) -> Steps:
    r"""A linear multistep method in sigma: each step integrates a polynomial through predictions.

    .. math:: w_{ij} = \int_{\sigma_i}^{\sigma_{i+1}} \prod_{k \ne j}
        \frac{\tau - \sigma_{i-k}}{\sigma_{i-j} - \sigma_{i-k}}\, d\tau
    """
    del eta
    last = schedule.num_train_timesteps - 1
    times = np.linspace(0, last, count, dtype=np.float32)[::-1]
    known = np.sqrt((1 - schedule.abar) / schedule.abar)
    sigmas = np.interp(times, np.arange(last + 1), known).astype(np.float32)
    sigmas = np.append(sigmas, 0).astype(np.float64)
    weights = np.zeros((count, 1 + PAST))
    for i in range(count):
        nodes = sigmas[max(i - PAST, 0) : i + 1][::-1]
        half = (sigmas[i + 1] - sigmas[i]) / 2
        # Two points integrate a cubic exactly.
        at = sigmas[i] + half * (1 + np.array([-1, 1]) / np.sqrt(3))
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            basis = np.prod((at[:, None] - others) / (node - others), axis=1)
            weights[i, j] = half * np.sum(basis)
    return _table(
        times,
        inputs=1 / np.sqrt(sigmas[:-1] ** 2 + 1),
        weights=weights,
        start=float(sigmas.max()),
    )


class Sampler(NamedTuple):
    """A row of `SAMPLERS`.

    Args:
        steps: `(schedule, count, eta) -> Steps`.
        fewest: the smallest number of steps.
        draws: whether it takes an eta.
    """

    steps: Callable[[Schedule, int, float], Steps]
    fewest: int = 1
    draws: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(_ddim, draws=True),
    "pndm": Sampler(_pndm),
    "lms": Sampler(_lms, fewest=2),
}
