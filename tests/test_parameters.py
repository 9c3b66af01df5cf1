"""The one vector of a model, and the views into it that must never come loose."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from distconv.nn.parameters import PIECE, Parameters, Spec, count
from tests.files import peak_memory

SPECS = {
    "conv1": {"W": Spec((3, 3, 2, 4), 0.5), "b": Spec((4,))},
    "maxpool1": {},
    "block": {"inner": {"W": Spec((40, 50), 2.0)}, "b": Spec((5,))},
    "scale": Spec((), 1.0),
}
SIZE = 72 + 4 + 2000 + 5 + 1


def leaves(views: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, node in views.items():
        if isinstance(node, Mapping):
            yield from leaves(node, f"{prefix}{name}.")
        else:
            yield prefix + name, node


@pytest.mark.parametrize(("views", "vector"), [("values", "vector"), ("grads", "gradient")])
def test_views_tile_the_vector_in_the_order_listed(views, vector):
    parameters = Parameters(SPECS, np.float64)
    whole, found = getattr(parameters, vector), dict(leaves(getattr(parameters, views)))
    assert parameters.size == SIZE
    assert whole.shape == (SIZE,)
    assert list(found) == ["conv1.W", "conv1.b", "block.inner.W", "block.b", "scale"]

    whole[...] = np.arange(SIZE)  # every element has its place in the vector as value
    np.testing.assert_array_equal(np.concatenate([view.ravel() for view in found.values()]), np.arange(SIZE))


@pytest.mark.parametrize(("views", "vector"), [("values", "vector"), ("grads", "gradient")])
def test_what_a_layer_writes_into_a_view_is_in_the_vector(views, vector):
    parameters = Parameters(SPECS)
    whole = getattr(parameters, vector)
    for _, view in leaves(getattr(parameters, views)):
        assert np.shares_memory(view, whole)
        view[...] = 1
    np.testing.assert_array_equal(whole, np.ones(SIZE, np.float32), strict=True)
    assert not np.shares_memory(parameters.vector, parameters.gradient)


def test_named_views_lie_in_any_vector_of_that_length():
    moments = np.arange(SIZE)
    views = Parameters(SPECS).named(moments)
    assert {name: view.shape for name, view in views.items()} == {
        "conv1.W": (3, 3, 2, 4),
        "conv1.b": (4,),
        "block.inner.W": (40, 50),
        "block.b": (5,),
        "scale": (),
    }
    assert views["block.b"].tolist() == [2076, 2077, 2078, 2079, 2080]
    assert all(np.shares_memory(view, moments) for view in views.values())


@pytest.mark.parametrize("views", ["values", "grads"])
@pytest.mark.parametrize("path", ["", "conv1", "block", "block.inner"])
def test_a_view_cannot_be_bound_to_other_memory_at_any_level(views, path):
    level = getattr(Parameters(SPECS), views)
    for name in filter(None, path.split(".")):
        level = level[name]
    for name in [*level, "new"]:
        with pytest.raises(TypeError):
            level[name] = np.zeros(4)


def test_a_view_can_be_added_to_in_place():
    parameters = Parameters(SPECS)
    parameters.grads["conv1"]["W"] += 2
    parameters.grads["scale"] += 1
    assert parameters.gradient.sum() == 2 * parameters.grads["conv1"]["W"].size + 1


def test_the_digest_tells_one_flipped_bit():
    parameters = Parameters(SPECS)
    parameters.initialize(0)
    digests = {parameters.digest()}
    bits = parameters.vector.view(np.uint32)
    for element, bit in [(0, 0), (0, 31), (SIZE // 2, 12), (SIZE - 1, 0)]:
        bits[element] ^= np.uint32(1 << bit)
        digests.add(parameters.digest())
        bits[element] ^= np.uint32(1 << bit)
        assert parameters.digest() in digests
    assert len(digests) == 5

    parameters.gradient[...] = 1  # the digest is one of the values only
    assert parameters.digest() in digests


def test_the_layout_tells_names_shapes_order_and_dtype_apart():
    W, b = Spec((2, 3)), Spec((3,))
    several = [{"W": W, "b": b}, {"b": b, "W": W}, {"W": Spec((3, 2)), "b": b}, {"a": {"W": W, "b": b}}]
    layouts = {Parameters(specs).layout() for specs in several} | {Parameters(several[0], np.float64).layout()}
    assert len(layouts) == 5
    assert Parameters(several[0]).layout() in layouts


def initialized(specs: Mapping, seed: int, dtype: type = np.float32) -> Parameters:
    parameters = Parameters(specs, dtype)
    parameters.initialize(seed)
    return parameters


def test_first_values_belong_to_the_seed():
    assert initialized(SPECS, 7).digest() == initialized(SPECS, 7).digest()
    mine, other = (initialized(SPECS, seed).values["conv1"]["W"] for seed in (7, 8))
    assert not np.any(mine == other)


def test_first_values_of_a_layer_do_not_change_when_others_come_or_go():
    alone = initialized({"block": SPECS["block"]}, 7)
    among = initialized({"conv0": {"W": Spec((5, 5), 1.0)}, **SPECS}, 7)
    for name in ("block.inner.W", "block.b"):
        np.testing.assert_array_equal(alone.named(alone.vector)[name], among.named(among.vector)[name])


def test_two_layers_of_one_shape_start_with_different_values():
    values = initialized({"affine1": {"W": Spec((20, 20), 1.0)}, "affine2": {"W": Spec((20, 20), 1.0)}}, 7).values
    assert not np.any(values["affine1"]["W"] == values["affine2"]["W"])


def test_first_values_have_the_deviation_asked_for_and_none_means_zero():
    values = initialized(SPECS, 7).values
    W = values["block"]["inner"]["W"]
    assert W.std() == pytest.approx(2.0, rel=4 / np.sqrt(2 * W.size))  # four standard errors of a sample's deviation
    assert W.mean() == pytest.approx(0, abs=4 * 2.0 / np.sqrt(W.size))
    assert not values["block"]["b"].any()


def test_first_values_in_float32_are_those_in_float64_rounded():
    single, double = initialized(SPECS, 7), initialized(SPECS, 7, np.float64)
    np.testing.assert_array_equal(single.vector, double.vector.astype(np.float32), strict=True)


def test_a_large_array_is_drawn_as_if_at_once():
    specs = {"a": {"W": Spec((3, PIECE + 1), 0.5)}}
    drawn = 0.5 * np.random.default_rng([7, zlib.crc32(b"a.W")]).standard_normal((3, PIECE + 1))
    np.testing.assert_array_equal(initialized(specs, 7).values["a"]["W"], drawn.astype(np.float32), strict=True)


def test_first_values_and_the_digest_of_a_large_model_take_no_memory_to_speak_of():
    parameters = Parameters({"affine1": {"W": Spec((1000, 4000), 0.1)}})
    assert peak_memory(lambda: (parameters.initialize(0), parameters.digest())) < parameters.vector.nbytes / 4


class Channels:
    """Data that knows something of its images."""

    channel_means = np.array([0.25, 0.5])


STANDARDISED = {
    "standardize1": {"mean": Spec((2,), trained=False, of_data="channel_means")},
    "conv1": {"W": Spec((3, 4), 0.5), "mean": Spec((4,), mean=1.0, trained=False)},
    "affine1": {"W": Spec((4, 5), 0.5), "b": Spec((5,))},
}


def test_what_is_not_trained_lies_first_so_that_gradients_are_final_from_a_layer_on():
    parameters = Parameters(STANDARDISED)
    names = ["standardize1.mean", "conv1.mean", "conv1.W", "affine1.W", "affine1.b"]
    assert list(parameters.starts) == names
    assert parameters.runs(lambda spec: spec.trained) == [slice(6, 6 + 12 + 25)]
    assert [parameters.start(layer) for layer in STANDARDISED] == [None, 6, 18]
    assert parameters.trained_size == count(STANDARDISED, lambda spec: spec.trained) == 37 and count(STANDARDISED) == 43


def test_first_values_may_be_those_of_the_data_where_it_has_them():
    parameters = Parameters(STANDARDISED)
    for data, wanted in ((Channels(), [0.25, 0.5]), (object(), [0, 0]), (None, [0, 0])):
        parameters.initialize(0, data)
        np.testing.assert_array_equal(parameters.values["standardize1"]["mean"], np.float32(wanted))
        np.testing.assert_array_equal(parameters.values["conv1"]["mean"], np.ones(4, np.float32))
