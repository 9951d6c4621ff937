"""Guidance: its formula, its variants, and when the second pass runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, InputError
from tests.conftest import relative_error
from tests.flow.toys import GaussianModel, counting_model, tiny_model

KEY = jax.random.key(0)


def evaluations(labels=(1, 2), **settings):
    """Return the batch size of every evaluation of 10 Euler steps, by time."""
    call = {name: settings.pop(name) for name in ("negative_labels", "guide") if name in settings}
    model, seen = counting_model()
    mp.make_sampler(steps=10, **settings)(model, np.array(labels), KEY, **call)
    jax.effects_barrier()
    return {round(float(times[0]), 3): len(times) for times in seen}


def test_a_scale_of_one_runs_no_second_pass():
    assert set(evaluations(guidance_scale=1.0).values()) == {2}
    assert set(evaluations(guidance_scale=[1.0, 1.0]).values()) == {2}


def test_both_passes_share_a_batch():
    counts = evaluations(guidance_scale=1.5)
    assert len(counts) == 10
    assert set(counts.values()) == {4}


def test_outside_the_interval_no_second_pass_runs():
    counts = evaluations(guidance_scale=1.5, guidance_interval=(0.3, 0.7))
    assert counts == {t: 4 if 0.3 <= t <= 0.7 else 2 for t in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)}


def test_an_adaptive_solver_keeps_to_the_interval():
    model, seen = counting_model()
    mp.make_sampler("tsit5", guidance_scale=1.5, guidance_interval=(0.3, 0.7), rtol=1e-2, atol=1e-2)(model, [1], KEY)
    jax.effects_barrier()
    guided = {float(times[0]) for times in seen if len(times) == 2}
    plain = {float(times[0]) for times in seen if len(times) == 1}
    assert guided
    assert min(guided) >= 0.3 - 1e-6
    assert max(guided) <= 0.7 + 1e-6
    assert not [t for t in plain if 0.3 + 1e-6 < t < 0.7 - 1e-6]


def drawn(model=None, labels=(1, 2), noise=0.0, **settings):
    """Sample a model whose velocity is label / 10 from constant noise; return the negated latents."""
    call = {name: settings.pop(name) for name in ("negative_labels", "guide") if name in settings}
    model = counting_model()[0] if model is None else model
    z = mp.make_sampler(steps=10, **settings)(
        model, np.array(labels), KEY, jnp.full((len(labels), 1, 1, 1), noise), **call
    )
    return -np.asarray(z[:, 0, 0, 0])


def test_the_formula():
    assert np.allclose(drawn(guidance_scale=1.0), [0.1, 0.2])
    assert np.allclose(drawn(guidance_scale=0.0), [1.0, 1.0])  # the null class, 10
    assert np.allclose(drawn(guidance_scale=3.0), [1 + 3 * (0.1 - 1), 1 + 3 * (0.2 - 1)])


def test_a_scale_for_each_sample():
    assert np.allclose(drawn(guidance_scale=[1.0, 3.0]), [0.1, 1 + 3 * (0.2 - 1)])
    sampler, model = mp.make_sampler(steps=10, guidance_scale=7.0), tiny_model()
    z = sampler(model, [1, 2], KEY, guidance_scale=np.array([1.5, 3.0]))
    alone = [
        mp.make_sampler(steps=10, guidance_scale=scale)(model, [1, 2], KEY)[i] for i, scale in enumerate((1.5, 3.0))
    ]
    assert relative_error(z, np.stack(alone)) < 1e-5


def test_the_interval_limits_guidance():
    half = drawn(guidance_scale=3.0, guidance_interval=(0.05, 0.55))  # 5 of 10 steps
    assert np.allclose(half, (drawn(guidance_scale=3.0) + drawn(guidance_scale=1.0)) / 2, atol=1e-6)


@pytest.mark.parametrize(("negatives", "expected"), [
    ([4, 5], (4, 5)),
    (4, (4, 4)),
    ({1: 4, 2: 5}, (4, 5)),
    ({2: 5}, (10, 5)),
    ({}, (10, 10)),
])  # fmt: skip
def test_negative_labels(negatives, expected):
    worse = np.array(expected) / 10
    assert np.allclose(drawn(guidance_scale=3.0, negative_labels=negatives), worse + 3 * (np.array([0.1, 0.2]) - worse))


def test_autoguidance():
    class Weak(type(counting_model()[0])):
        def __call__(self, x, t, y):
            return super().__call__(x, t, y) / 2

    found = drawn(guidance_scale=3.0, guide=Weak())
    assert np.allclose(found, [0.05 + 3 * 0.05, 0.1 + 3 * 0.1])  # the guide sees the same labels
    found = drawn(guidance_scale=3.0, guide=Weak(), negative_labels=4)
    assert np.allclose(found, [0.2 + 3 * (0.1 - 0.2), 0.2 + 3 * (0.2 - 0.2)])


def test_autoguidance_by_the_model_itself_is_classifier_free_guidance():
    model, labels = tiny_model(), [1, 2, 3]
    sampler = mp.make_sampler(steps=4, guidance_scale=2.0)
    found = sampler(model, labels, KEY, guide=model, negative_labels=model.num_classes)
    assert relative_error(found, sampler(model, labels, KEY)) < 1e-5


@pytest.mark.slow
def test_parts_and_the_plain_call_agree():
    """A model with the call signature alone and the same model with separate parts draw the same latents."""
    model = tiny_model()

    class Plain(type(GaussianModel())):
        input_shape, num_classes = model.input_shape, model.num_classes

        def __init__(self):
            self.model = model

        def __call__(self, x, t, y):
            return self.model(x, t, y)

    for settings in (
        {"guidance_scale": 2.0},
        {"solver": "heun"},
        {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.6)},
        {"solver": "tsit5", "guidance_scale": 2.0, "rtol": 1e-4, "atol": 1e-4},
    ):
        sampler = mp.make_sampler(steps=6, **settings)
        assert relative_error(sampler(Plain(), [1, 2], KEY), sampler(model, [1, 2], KEY)) < 1e-5


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"steps": 0}, "steps=0: expected a whole number"),
    ({"steps": 2.5}, "steps=2.5"),
    ({"steps": True}, "steps=True"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1.0: expected 0 or more"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ({"guidance_scale": [1.0, -2.0]}, "guidance_scale=-2.0"),
    ({"guidance_scale": "big"}, "guidance_scale='big'"),
    ({"guidance_interval": (0.5, 1.5)}, r"guidance_interval=\(0.5, 1.5\): expected 0 <= low <= high <= 1"),
    ({"guidance_interval": (0.7, 0.3)}, r"guidance_interval=\(0.7, 0.3\)"),
    ({"guidance_interval": (-0.1, 0.3)}, r"guidance_interval=\(-0.1, 0.3\)"),
    ({"guidance_interval": 0.5}, r"guidance_interval=0.5: expected two times"),
    ({"solver": "eular"}, "unknown solver 'eular'.*did you mean 'euler'"),
    ({"precision": "float16"}, "precision='float16': expected one of float32, bfloat16"),
])  # fmt: skip
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mp.make_sampler(**settings)


class FewerClasses(GaussianModel):
    num_classes = 2


@pytest.mark.parametrize(("call", "sentence"), [
    ({"labels": [0, 4]}, r"label 4 is out of range: this model has classes 0 to 2 \(and 3, the null class\)"),
    ({"labels": [-1, 0]}, "label -1 is out of range"),
    ({"labels": [0.0, 1.0]}, "whole numbers"),
    ({"labels": 3}, "whole numbers"),
    ({"labels": []}, "whole numbers"),
    ({"noise": np.zeros((2, 4, 1, 1))}, r"noise \(2, 4, 1, 1\): expected \(2, 1, 1, 4\)"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, r"guidance_scale of shape \(3,\)"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
    ({"negative_labels": 7}, "negative label 7 is out of range"),
    ({"negative_labels": [1, 1, 1]}, "3 negative labels for 2 labels"),
    ({"negative_labels": {9: 1}}, "label 9 is out of range"),
    ({"indices": np.arange(3)}, r"indices \(3,\)"),
    ({"increments": np.zeros((3, 2, 1, 1, 4))}, r"increments .* one for each step but the last"),
    ({"model": lambda x, t, y: x}, "model=function: expected an MPDiT"),
    ({"guide": counting_model()[0]}, "expected the same shape"),
    ({"guide": FewerClasses()}, "guide has 2 classes and model 3: expected the same"),
])  # fmt: skip
def test_bad_calls_are_refused(call, sentence):
    arguments = {"model": GaussianModel(), "labels": [0, 1], **call}
    with pytest.raises(InputError, match=sentence):
        mp.make_sampler(steps=3)(arguments.pop("model"), arguments.pop("labels"), KEY, **arguments)


def test_a_model_in_another_convention_is_refused():
    class SiT(GaussianModel):
        convention = "sit"

    class ChannelsFirst(GaussianModel):
        def __call__(self, x, t, y):
            return jnp.moveaxis(x, -1, 1)

    class LearnedVariance(GaussianModel):
        def __call__(self, x, t, y):
            return jnp.concatenate([x, x], -1)

    with pytest.raises(InputError, match="convention is 'sit': expected 'velocity'"):
        mp.make_sampler(steps=3)(SiT(), [0], KEY)
    for model in (ChannelsFirst(), LearnedVariance()):
        with pytest.raises(InputError, match="expected a velocity of the same shape, channels last"):
            mp.make_sampler(steps=3)(model, [0], KEY)
    with pytest.raises(InputError, match="no astype"):
        mp.make_sampler(steps=3, precision="bfloat16")(GaussianModel(), [0], KEY)
