"""Noise schedules and samplers: published numbers, the formulas as loops, and diffusers."""

import dataclasses
import functools
import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from models.diffusion.schedulers import (
    SAMPLERS,
    Schedule,
    advance,
    begin,
    guided,
    model_input,
    plan,
    sample,
)
from models.files.scheduler_files import CLASSES, FILE, from_folder, hf_config, to_hf

SD = Schedule()
SHAPE = (2, 3, 3, 4)
# The scheduler_config.json of Stable Diffusion v1.4.
FILE_SD = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.2.2",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape)


def denoiser(x, time, xp):
    """Some function of both, with predictions of order 1."""
    return xp.tanh(0.7 * x + 0.3) + 0.2 * xp.cos(time / 200.0) * x


def in_float64(steps, noise, draw=None):
    """Samples by our scan."""
    with jax.enable_x64(True):
        run = jax.jit(
            lambda noise: sample(
                steps, lambda x, t: denoiser(x, t.astype(x.dtype), jnp), noise, draw
            )
        )
        return np.asarray(run(jnp.asarray(noise, jnp.float64)))


def in_float32(steps, noise, draw=None):
    denoise = functools.partial(denoiser, xp=jnp)
    run = jax.jit(lambda noise: sample(steps, denoise, noise, draw))
    return np.asarray(run(jnp.asarray(noise, jnp.float32)))


# Schedules.


def test_published_values_of_abar():
    want = {0: 0.999150, 1: 0.998296, 249: 0.675432, 499: 0.277670, 749: 0.056623}
    want |= {981: 0.005775, 999: 0.004660}
    for time, value in want.items():
        assert SD.abar[time] == pytest.approx(value, abs=6e-7)
    assert SD.abar.dtype == np.float32 and SD.abar.shape == (1000,)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(SD.abar, np.cumprod(1 - betas), rtol=2e-6)
    linear = Schedule(100, 1e-4, 0.02, "linear")
    np.testing.assert_allclose(linear.abar, np.cumprod(1 - np.linspace(1e-4, 0.02, 100)), rtol=2e-6)
    assert Schedule(1, 0.1, 0.2, "linear").abar.shape == (1,)
    with pytest.raises(ValueError, match="read-only"):
        SD.abar[0] = 0


def test_guidance():
    eps = jnp.asarray(normal(0))
    without, given = np.split(np.asarray(eps), 2)
    np.testing.assert_allclose(guided(eps, 1.0), given, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(guided(eps, 0.0), without)
    np.testing.assert_allclose(
        jax.jit(guided)(eps, 7.5), 7.5 * given - 6.5 * without, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "cosine"}, "beta_schedule is one of scaled_linear, linear"),
        ({"sampler": "euler"}, "sampler is one of ddim, pndm, lms"),
        ({"beta_start": 0.5}, "make no schedule"),
        ({"num_train_timesteps": 0}, "at least 1"),
        ({"steps_offset": -1}, "at least 0"),
    ],
)
def test_schedules_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SD, **change)


# Samplers, as loops over the formulas of the papers in float64.


def abar_at(time, schedule=SD):
    if time < 0:
        return 1.0 if schedule.set_alpha_to_one else float(schedule.abar[0])
    return float(schedule.abar[time])


def ddim_loop(x, count, eta=0.0, draw=None, schedule=SD):
    gap = 1000 // count
    for i in range(count):
        time = (count - 1 - i) * gap + 1
        a, b = abar_at(time), abar_at(time - gap, schedule)
        eps = denoiser(x, time, np)
        clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        std = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x = math.sqrt(b) * clean + math.sqrt(1 - b - std**2) * eps
        x = x + (std * draw[i] if eta else 0.0)
    return x


def pndm_loop(x, count):
    gap = 1000 // count
    times = [(count - 1 - i) * gap + 1 for i in range(count)]

    def move(x, eps, time):
        a, b = abar_at(time), abar_at(time - gap)
        below = a * math.sqrt(1 - b) + math.sqrt(a * (1 - a) * b)
        return math.sqrt(b / a) * x - (b - a) * eps / below

    old = [denoiser(x, times[0], np)]
    first = move(x, old[0], times[0])
    if count == 1:
        return first
    x = move(x, (denoiser(first, times[1], np) + old[0]) / 2, times[0])
    for time in times[1:]:
        old.append(denoiser(x, time, np))
        e = old[::-1]
        if len(old) == 2:
            eps = (3 * e[0] - e[1]) / 2
        elif len(old) == 3:
            eps = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            eps = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = move(x, eps, time)
    return x


def integral(sigmas, i, j, order):
    """The exact integral of a Lagrange polynomial, in fractions."""
    nodes = [Fraction(float(sigmas[i - k])) for k in range(order)]
    polynomial = [Fraction(1)]
    for k in range(order):
        if k != j:
            below = nodes[j] - nodes[k]
            shifted = [Fraction(0), *polynomial]
            scaled = [*(-nodes[k] * c for c in polynomial), Fraction(0)]
            polynomial = [(s + c) / below for s, c in zip(shifted, scaled, strict=True)]
    start, end = (Fraction(float(sigmas[n])) for n in (i, i + 1))
    return float(
        sum(c * (end ** (n + 1) - start ** (n + 1)) / (n + 1) for n, c in enumerate(polynomial))
    )


def lms_loop(noise, count):
    times = np.linspace(0, 999, count, dtype=np.float32)[::-1]
    known = np.sqrt((1 - SD.abar) / SD.abar)
    sigmas = np.append(np.interp(times, np.arange(1000), known), 0).astype(np.float32)
    x, old = noise * float(sigmas[0]), []
    for i, time in enumerate(times):
        seen = x / math.sqrt(float(sigmas[i]) ** 2 + 1)
        old.insert(0, denoiser(seen, float(time), np))
        order = min(i + 1, 4)
        x = x + sum(integral(sigmas, i, j, order) * old[j] for j in range(order))
    return x


LOOPS = {"ddim": ddim_loop, "pndm": pndm_loop, "lms": lms_loop}


@pytest.mark.parametrize("name", LOOPS)
def test_a_sampler_is_its_formulas(name):
    assert LOOPS.keys() == SAMPLERS.keys()
    noise = normal(2)
    for count in (10, 3, 2) if name == "lms" else (10, 3, 1):
        want = LOOPS[name](noise, count)
        steps = plan(SD, count, name)
        assert len(steps.times) == count + (name == "pndm" and count > 1)
        np.testing.assert_allclose(in_float64(steps, noise), want, rtol=1e-9, atol=1e-11)
    steps = plan(SD, 10, name)
    want = LOOPS[name](noise, 10)
    assert np.abs(in_float32(steps, noise) - want).max() <= 1e-5 * np.abs(want).max()


def test_times_of_50_steps():
    assert plan(SD, 50, "ddim").times.tolist() == list(range(981, 0, -20))
    assert plan(SD, 50).times.tolist() == [981, 961, *range(961, 0, -20)]
    lms = plan(SD, 50, "lms")
    assert lms.start == pytest.approx(14.61465, abs=5e-6)  # 14.61464 in float64
    assert lms.times[0] == 999 and lms.times[-1] == 0
    assert lms.times[1] == pytest.approx(999 * 48 / 49) != round(999 * 48 / 49)
    for steps in (lms, plan(SD, 50), plan(SD, 50, "ddim", 1.0)):
        assert steps.times.dtype == np.float32 and np.isfinite(steps.weights).all()


def test_ddim_with_noise():
    draw = normal(3, (10, *SHAPE))
    for eta in (0.5, 1.0):
        steps = plan(SD, 10, "ddim", eta)
        with jax.enable_x64(True):
            drawn = jnp.asarray(draw)
        found = in_float64(steps, normal(2), lambda i, z=drawn: z[i])
        np.testing.assert_allclose(found, ddim_loop(normal(2), 10, eta, draw), rtol=1e-9)
    with pytest.raises(ValueError, match="give draw"):
        sample(steps, lambda x, t: x, jnp.ones(SHAPE))


def test_what_is_behind_the_last_step():
    one = dataclasses.replace(SD, set_alpha_to_one=True)
    found = in_float64(plan(one, 10, "ddim"), normal(2))
    np.testing.assert_allclose(found, ddim_loop(normal(2), 10, schedule=one), rtol=1e-9)
    # A prediction that is right leads to the clean sample.
    clean, noise = normal(0), normal(1)
    for name in ("ddim", "pndm"):
        steps = plan(one, 10, name)
        with jax.enable_x64(True):
            at = np.float64(one.abar[int(steps.times[0])])
            start = jnp.asarray(np.sqrt(at) * clean + np.sqrt(1 - at) * noise)
            found = sample(steps, lambda x, t: jnp.asarray(noise), start)
        np.testing.assert_allclose(found, clean, rtol=1e-9, atol=1e-9)


def test_ddim_without_noise_is_undone():
    steps, noise = plan(SD, 10, "ddim"), normal(2)
    with jax.enable_x64(True):
        state, seen = begin(steps, jnp.asarray(noise)), []
        for i in range(10):
            seen.append(denoiser(*model_input(steps, state, i), jnp))
            state = advance(steps, state, seen[i], i)
        x = np.asarray(state.sample)
    assert np.abs(x - noise).max() > 1
    for i in reversed(range(10)):
        x = (x - steps.weights[i, 0] * np.asarray(seen[i])) / steps.scale[i]
    np.testing.assert_allclose(x, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_scan_is_a_loop(name):
    steps, noise = plan(SD, 7, name), jnp.asarray(normal(2), jnp.float32)
    state = begin(steps, noise)
    step = jax.jit(functools.partial(advance, steps))
    for i in range(len(steps.times)):
        state = step(state, denoiser(*model_input(steps, state, i), jnp), i)
    assert state.sample.dtype == jnp.float32
    np.testing.assert_allclose(state.sample, in_float32(steps, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_does_not_depend_on_others(name):
    steps, noise = plan(SD, 4, name), normal(2)
    np.testing.assert_allclose(
        in_float32(steps, noise)[1:], in_float32(steps, noise[1:]), rtol=1e-6, atol=1e-6
    )


def test_more_steps_come_closer():
    """For normal data the flow is known: a sample keeps its quantile."""
    spread, noise = 0.5, normal(2, (4,))

    def std(a):
        return math.sqrt(a * spread**2 + 1 - a)

    def found(name, count):
        steps = plan(SD, count, name)
        with jax.enable_x64(True):
            abar = jnp.asarray(SD.abar, jnp.float64)

            def denoise(x, time):
                at = jnp.interp(time.astype(jnp.float64), jnp.arange(1000.0), abar)
                return jnp.sqrt(1 - at) * x / (at * spread**2 + 1 - at)

            return np.asarray(sample(steps, denoise, jnp.asarray(noise))), steps

    errors = {}
    for name in SAMPLERS:
        for count in (20, 100):
            x, steps = found(name, count)
            first, last = SD.abar[int(steps.times[0])], SD.abar[0]
            if name == "lms":  # from noise without a signal, in coordinates without shrinking
                sigma = steps.start
                want = noise * sigma * spread / math.sqrt(spread**2 + sigma**2)
            else:
                want = noise * std(last) / std(first)
            errors[name, count] = np.abs(x / want - 1).max()
        assert errors[name, 100] < errors[name, 20] / 3
    assert errors["pndm", 100] < errors["ddim", 100] / 5 < 0.01
    assert errors["lms", 100] < errors["ddim", 100] / 5


def test_plans_that_are_refused():
    for args, message in {
        (50, "euler"): "no sampler 'euler'; use one of ddim, pndm, lms",
        (0, "ddim"): "0 steps are not for ddim, which takes 1 to 1000",
        (1, "lms"): "1 steps are not for lms, which takes 2 to 1000",
        (1001, "lms"): "1001 steps are not for lms",
        (1000, "pndm"): "1000 steps begin at time 1000, behind the last one of the model, 999",
        (50, "pndm", 0.5): "eta 0.5 is not for pndm; it is 0, or up to 1 with ddim",
        (50, "ddim", 1.5): "eta 1.5 is not for ddim",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            plan(SD, *args)
        assert "\n" not in str(caught.value)


# Files.


def test_files(tmp_path):
    assert hf_config(FILE_SD, FILE) == SD
    for name in SAMPLERS:
        schedule = Schedule(500, 0.001, 0.01, "linear", 2, name == "ddim", name)
        if name == "lms":
            schedule = dataclasses.replace(schedule, set_alpha_to_one=False)
        (tmp_path / FILE).write_text(json.dumps(to_hf(schedule)))
        assert from_folder(tmp_path) == schedule
    assert CLASSES.keys() == SAMPLERS.keys()
    with pytest.raises(UserError, match=f"no {FILE} in it"):
        from_folder(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "'EulerDiscreteScheduler' is no sampler that"),
        ({"_class_name": ["PNDMScheduler"]}, "is no sampler that is read"),
        (
            {"prediction_type": "v_prediction"},
            "prediction_type is 'v_prediction', and 'epsilon' al",
        ),
        ({"prediction_type": "odd\nword"}, "and 'epsilon' alone is supported"),
        ({"skip_prk_steps": False}, "skip_prk_steps is False, and True alone is supported"),
        ({"clip_sample": True}, "clip_sample is True, and False alone"),
        ({"trained_betas": [0.1]}, "trained_betas is"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing is 'trailing', and 'leading' alone"),
        ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is one of scaled_linear, linear"),
        ({"beta_schedule": ["linear"]}, "does not read"),
        ({"beta_start": "0.1"}, "does not read"),
        ({"beta_end": 2}, "make no schedule"),
        ({"steps_offset": 1.5}, "does not read"),
        ({"set_alpha_to_one": None}, "does not read"),
        ({"num_train_timesteps": -1}, "not a positive int"),
    ],
)
def test_files_that_are_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        hf_config(FILE_SD | change, FILE)
    assert "\n" not in str(caught.value)


def test_keys_that_are_left_out():
    with pytest.raises(UserError, match="clip_sample is True"):
        hf_config({"_class_name": "DDIMScheduler"}, FILE)
    with pytest.raises(UserError, match="skip_prk_steps is False"):
        hf_config({"_class_name": "PNDMScheduler"}, FILE)
    raw = {key: value for key, value in FILE_SD.items() if key != "beta_end"}
    with pytest.raises(UserError, match="'beta_ends' is unknown, and 'beta_end' is absent"):
        hf_config(raw | {"beta_ends": 0.012}, FILE)


# diffusers.


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


def theirs(diffusers, name, double):
    made = getattr(diffusers, CLASSES[name].name).from_config(FILE_SD)
    if double:
        made.alphas_cumprod = made.alphas_cumprod.double()
    return made


@pytest.mark.torch_parity
def test_abar_of_diffusers(diffusers):

    made = theirs(diffusers, "pndm", False)
    np.testing.assert_allclose(SD.abar, made.alphas_cumprod.numpy(), rtol=2e-7)
    linear = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02)
    ours = Schedule(1000, 1e-4, 0.02, "linear")
    np.testing.assert_allclose(ours.abar, linear.alphas_cumprod.numpy(), rtol=2e-7)


# diffusers' own, of torch tensors that it hands to NumPy.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.torch_parity
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", [*SAMPLERS, "noisy"])
def test_ten_steps_of_diffusers(diffusers, name, double):
    import torch

    eta = 0.7 if name == "noisy" else 0.0
    name = "ddim" if eta else name
    made, steps = theirs(diffusers, name, double), plan(SD, 10, name, eta)
    kind = torch.float64 if double else torch.float32
    draw = normal(3, (10, *SHAPE))
    made.set_timesteps(10)
    np.testing.assert_array_equal(steps.times, made.timesteps.numpy().astype(np.float32))
    if double and name == "lms":
        # As they are in float32, but for the arithmetic that follows, and with correctly rounded
        # roots, which torch's power does not give on every processor.
        single = theirs(diffusers, name, False)
        single.set_timesteps(10)
        abar = single.alphas_cumprod.numpy()
        known = np.sqrt((1 - abar) / abar)
        sigmas = np.interp(single.timesteps.numpy(), np.arange(len(known)), known)
        sigmas = np.append(sigmas, 0).astype(np.float32)
        np.testing.assert_allclose(sigmas, single.sigmas.numpy(), rtol=3e-7)
        made.sigmas = torch.as_tensor(sigmas).double()
    elif double:
        made.final_alpha_cumprod = made.final_alpha_cumprod.double()
    x = torch.as_tensor(normal(2), dtype=kind) * made.init_noise_sigma
    for i, time in enumerate(made.timesteps):
        seen = made.scale_model_input(x, time)
        eps = denoiser(seen, time.to(kind), torch)
        more = {"eta": eta, "variance_noise": torch.as_tensor(draw[i], dtype=kind)} if eta else {}
        x = made.step(eps, time, x, **more).prev_sample
    run, tolerance = (in_float64, 1e-9) if double else (in_float32, 1e-5)
    with jax.enable_x64(double):
        drawn = jnp.asarray(draw)
    found = run(steps, normal(2), (lambda i: drawn[i]) if eta else None)
    want = x.numpy()
    assert np.abs(want).max() > 0.5
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()
