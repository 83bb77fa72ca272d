from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import nd

from bort.bort import (
    BortClassifier,
    BortModel,
    decode,
    encode,
    get_bort_model,
    initialize,
    masked_hidden,
    parameter_count,
)
from bort.errors import UserError
from bort.parameters import load_parameters, save_parameters
from bort.shapes import PREDEFINED_SHAPES, Shape, shape_of
from tests import reference
from tests.reference import parameters_of, redraw

TINY = "bort_2_4_24_32"
TIED = ("word_embed.0.weight", "decoder.3.weight")


def released_names(
    layers: int, intermediate: int, hidden: int, vocabulary: int
) -> dict[str, tuple[int, ...]]:
    """List the names and shapes of the released checkpoint, for other sizes of the same model."""
    square, vector = (hidden, hidden), (hidden,)
    shapes: dict[str, tuple[int, ...]] = {
        "word_embed.0.weight": (vocabulary, hidden),
        "encoder.position_weight": (512, hidden),
        "encoder.layer_norm.gamma": vector,
        "encoder.layer_norm.beta": vector,
        "decoder.0.weight": square,
        "decoder.0.bias": vector,
        "decoder.2.gamma": vector,
        "decoder.2.beta": vector,
        "decoder.3.weight": (vocabulary, hidden),
        "decoder.3.bias": (vocabulary,),
    }
    for layer in range(layers):
        cell = f"encoder.transformer_cells.{layer}."
        for projection in (
            "attention_cell.proj_query",
            "attention_cell.proj_key",
            "attention_cell.proj_value",
            "proj",
        ):
            shapes[f"{cell}{projection}.weight"] = square
            shapes[f"{cell}{projection}.bias"] = vector
        shapes[f"{cell}ffn.ffn_1.weight"] = (intermediate, hidden)
        shapes[f"{cell}ffn.ffn_1.bias"] = (intermediate,)
        shapes[f"{cell}ffn.ffn_2.weight"] = (hidden, intermediate)
        shapes[f"{cell}ffn.ffn_2.bias"] = vector
        for norm in ("layer_norm", "ffn.layer_norm"):
            shapes[f"{cell}{norm}.gamma"] = vector
            shapes[f"{cell}{norm}.beta"] = vector
    return shapes


def shapes_in(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: p.shape for name, p in model._collect_params_with_prefix().items()}


# ---- names, shapes and counts ------------------------------------------------------------------


def test_bort_has_the_names_shapes_and_count_of_the_released_checkpoint() -> None:
    model, _ = get_bort_model(vocab=range(50265), random_init=False)
    shapes = shapes_in(model)
    assert shapes == released_names(layers=4, intermediate=768, hidden=1024, vocabulary=50265)
    assert len(shapes) == 74
    # As the released file counts, with the tied matrix twice, and as the model counts, once.
    assert sum(math.prod(shape) for shape in shapes.values()) == 127_679_577
    assert parameter_count(model) == 76_208_217 == 127_679_577 - 50265 * 1024


def test_the_second_predefined_shape_has_the_sizes_of_its_name() -> None:
    model, _ = get_bort_model("bort_2_16_512_1024", vocab=range(10), random_init=False)
    assert shapes_in(model) == released_names(2, intermediate=512, hidden=1024, vocabulary=10)
    assert {cell.attention_cell._num_heads for cell in model.encoder.transformer_cells} == {16}
    # 2 layers of 5,252,608; positions and their norm; the decoder's dense, norm and bias; tokens
    expected = 2 * 5_252_608 + 512 * 1024 + 2048 + 1024 * 1025 + 2048 + 10 + 10 * 1024
    assert parameter_count(model) == expected


def test_a_model_without_decoder_has_no_decoder_parameters() -> None:
    model, _ = get_bort_model(TINY, vocab=range(50), use_decoder=False)
    expected = released_names(2, intermediate=24, hidden=32, vocabulary=50)
    assert shapes_in(model) == {n: s for n, s in expected.items() if not n.startswith("decoder")}


def test_frozen_parameters_are_not_counted(tiny_model: BortModel) -> None:
    before = parameter_count(tiny_model)
    tiny_model.decoder[0].collect_params().setattr("grad_req", "null")
    assert before - parameter_count(tiny_model) == 32 * 33


def test_the_table_of_shapes_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PREDEFINED_SHAPES["bort_4_8_768_1024"] = Shape(1, 1, 1, 1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        PREDEFINED_SHAPES["bort_4_8_768_1024"].layers = 5  # type: ignore[misc]
    assert dict(PREDEFINED_SHAPES) == {
        "bort_4_8_768_1024": (4, 8, 768, 1024),
        "bort_2_16_512_1024": (2, 16, 512, 1024),
    }


def test_the_settings_of_one_model_do_not_become_those_of_the_next() -> None:
    first, _ = get_bort_model(TINY, vocab=range(5), dropout=0.0, max_length=7)
    second, _ = get_bort_model(TINY, vocab=range(5))
    assert (first.encoder._dropout, first.encoder._max_length) == (0.0, 7)
    assert (second.encoder._dropout, second.encoder._max_length) == (0.1, 512)


def test_a_name_spells_a_shape_and_a_shape_its_name() -> None:
    shape = shape_of("bort_12_6_100_384")
    assert shape == Shape(layers=12, heads=6, intermediate=100, hidden=384)
    assert shape.name == "bort_12_6_100_384"
    assert all(shape_of(name).name == name for name in PREDEFINED_SHAPES)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "bort",
        "bert_4_8_768_1024",
        "bort_4_8_768",
        "bort_4_8_768_1024_1",
        "bort_4_8_768_1024 ",
        "bort_4_8_768_1024\n",
        "bort_-4_8_768_1024",
        "bort_4.0_8_768_1024",
        "bort_0_8_768_1024",
        "bort_4_00_768_1024",
        "bort_04_8_768_1024",
        "bort_4_8_768_x",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected bort_<layers>_<heads>_<intermediate>_<hidden>"):
        shape_of(name)


def test_heads_have_to_divide_the_hidden_size() -> None:
    with pytest.raises(UserError, match="hidden size 1024 is not divisible by 7 heads"):
        shape_of("bort_4_7_768_1024")


# ---- building ----------------------------------------------------------------------------------


def test_the_vocabulary_may_be_anything_that_knows_its_size() -> None:
    tokenizer = SimpleNamespace(vocab_size=37)
    model, returned = get_bort_model(TINY, vocab=tokenizer)
    assert returned is tokenizer
    assert model.word_embed[0].weight.shape == (37, 32)


def test_a_data_set_name_selects_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_tokenizer(settings: Any) -> Any:
        asked.append(settings.dataset_name)
        return SimpleNamespace(vocab_size=41)

    monkeypatch.setattr("bort.tokenization.load_tokenizer", load_tokenizer)
    model, _ = get_bort_model(TINY, dataset_name="openwebtext")
    assert asked == ["openwebtext"]
    assert model.word_embed[0].weight.shape == (41, 32)


def test_without_any_vocabulary_the_model_has_no_size() -> None:
    with pytest.raises(UserError, match="vocab or dataset_name"):
        get_bort_model(TINY)


def test_fresh_weights_follow_the_seed_alone() -> None:
    def drawn(seed: int) -> dict[str, np.ndarray]:
        mx.random.seed(seed)
        return parameters_of(get_bort_model(TINY, vocab=range(50))[0])

    first, again, other = drawn(3), drawn(3), drawn(4)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        if name.endswith("weight"):
            assert (values != other[name]).all()
            assert abs(values.std() - 0.02) < 0.003
        else:
            assert (values == (1 if name.endswith("gamma") else 0)).all()


def test_several_devices_start_from_the_same_weights() -> None:
    model, _ = get_bort_model(TINY, vocab=range(50), ctx=[mx.cpu(0), mx.cpu(1)])
    for parameter in model.collect_params().values():
        first, second = parameter.list_data()
        np.testing.assert_array_equal(first.asnumpy(), second.asnumpy())


# ---- the forward pass --------------------------------------------------------------------------


def test_golden_values() -> None:
    """A fixed seed and input give the values they gave when this was written.

    The tolerance allows for sums in another order (threads, instruction sets), which move
    these values by some 1e-6; another formula anywhere moves them by 1e-3 and more.
    """
    mx.random.seed(1)
    model, _ = get_bort_model("bort_4_8_768_1024", vocab=range(100))
    ids = nd.array([[0, 17, 42, 99, 2], [0, 5, 2, 1, 1]])
    sequence = encode(model, ids, nd.array([5, 3]))
    logits = decode(model, masked_hidden(model, sequence, nd.array([2, 6])))
    first, last = sequence[0, 0, :4].asnumpy(), sequence[1, 2, -4:].asnumpy()
    close = partial(np.testing.assert_allclose, atol=2e-5, rtol=0)
    close(first, [0.6722942, 1.0196922, 0.557475, -1.1489644])
    close(last, [-1.6680838, -0.988988, 1.2349343, 2.1674693])
    close(logits[0, :3].asnumpy(), [0.1094286, 0.9804519, -1.1531465])
    close(logits[1, :3].asnumpy(), [-0.0704617, 0.0000274, -1.4744945])


def test_four_layers_agree_with_numpy_in_float64() -> None:
    model, _ = get_bort_model("bort_4_8_768_1024", vocab=range(100))
    redraw(model, seed=2, deviation=0.05)
    generator = np.random.default_rng(3)
    lengths = [24, 1, 13]
    ids = generator.integers(0, 100, (3, 24))
    sequence = encode(model, nd.array(ids), nd.array(lengths))
    logits = decode(model, masked_hidden(model, sequence, nd.array([5, 24, 60]))).asnumpy()
    parameters = parameters_of(model)
    expected = [reference.encode(parameters, 8, row[:length]) for row, length in zip(ids, lengths)]
    for row, length, one in zip(sequence.asnumpy(), lengths, expected):
        np.testing.assert_allclose(row[:length], one, atol=1e-4, rtol=0)
    masked = np.stack([expected[0][5], expected[1][0], expected[2][12]])
    np.testing.assert_allclose(logits, reference.decode(parameters, masked), atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 512])
def test_every_length_up_to_the_last_position_agrees_with_numpy(
    tiny_model: BortModel, length: int
) -> None:
    ids = np.random.default_rng(length).integers(0, 50, length)
    sequence = encode(tiny_model, nd.array(ids[None]), nd.array([length])).asnumpy()[0]
    expected = reference.encode(parameters_of(tiny_model), 4, ids)
    np.testing.assert_allclose(sequence, expected, atol=1e-5, rtol=0)


def test_one_token_too_many_is_a_clear_error(tiny_model: BortModel) -> None:
    ids, lengths, positions = nd.zeros((2, 513)), nd.array([513, 4]), nd.zeros((2, 1))
    message = "sequence length 513: the model has 512 positions"
    with pytest.raises(ValueError, match=message):
        tiny_model(ids, lengths, positions)
    with pytest.raises(ValueError, match=message):
        encode(tiny_model, ids, lengths)


def test_padding_changes_no_valid_position_and_is_zero(tiny_model: BortModel) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (1, 9))
    alone = encode(tiny_model, nd.array(ids), nd.array([9])).asnumpy()
    for filler in (1, 33):
        padded = np.full((2, 20), filler)
        padded[1, :9] = ids
        sequence = encode(tiny_model, nd.array(padded), nd.array([20, 9])).asnumpy()[1]
        np.testing.assert_allclose(sequence[:9], alone[0], atol=1e-6, rtol=0)
        assert (sequence[9:] == 0).all()


def test_the_content_of_the_padding_does_not_change_a_bit(tiny_model: BortModel) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (2, 12))
    other = ids.copy()
    other[:, 7:] = np.random.default_rng(1).integers(0, 50, (2, 5))
    lengths = nd.array([7, 7])
    first, second = (encode(tiny_model, nd.array(one), lengths) for one in (ids, other))
    np.testing.assert_array_equal(first.asnumpy(), second.asnumpy())


def test_flat_positions_decode_what_gluonnlps_table_of_positions_decodes(
    tiny_model: BortModel,
) -> None:
    ids = nd.array(np.random.default_rng(0).integers(0, 50, (3, 8)))
    lengths = nd.array([8, 5, 3])
    table = np.array([[1, 7], [4, 0], [2, 2]])
    sequence, expected = tiny_model(ids, lengths, nd.array(table))
    own = encode(tiny_model, ids, lengths).asnumpy()
    np.testing.assert_allclose(own, sequence.asnumpy(), atol=2e-6)
    flat = (table + 8 * np.arange(3)[:, None]).ravel()
    logits = decode(tiny_model, masked_hidden(tiny_model, sequence, nd.array(flat)))
    assert logits.shape == (6, 50)
    np.testing.assert_allclose(logits.asnumpy(), expected.asnumpy().reshape(6, 50), atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    model, _ = get_bort_model(TINY, vocab=range(50), dropout=0.5)
    ids, lengths = nd.ones((1, 6)), nd.array([6])
    still = encode(model, ids, lengths).asnumpy()
    np.testing.assert_array_equal(still, encode(model, ids, lengths).asnumpy())
    with mx.autograd.train_mode():
        assert (still != encode(model, ids, lengths).asnumpy()).any()


# ---- the classifier ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_the_classifier_scores_the_first_token(classes: int) -> None:
    bort, _ = get_bort_model(TINY, vocab=range(50), use_decoder=False)
    classifier = BortClassifier(bort, num_classes=classes, dropout=0.3)
    initialize(classifier, mx.cpu())
    redraw(classifier, seed=1)
    ids = np.random.default_rng(0).integers(0, 50, (3, 8))
    scores = classifier(nd.array(ids), nd.array([8, 5, 1])).asnumpy()
    assert scores.shape == (3, classes)
    named = parameters_of(classifier)
    inner = {name[len("bort.") :]: v for name, v in named.items() if name.startswith("bort.")}
    first = np.stack([reference.encode(inner, 4, row[:n])[0] for row, n in zip(ids, (8, 5, 1))])
    pooled = np.tanh(reference.dense(first, named, "classifier.1"))
    expected = reference.dense(pooled, named, "classifier.3")
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("hybridized", [False, True])
def test_a_classifier_refuses_one_token_too_many(hybridized: bool) -> None:
    bort, _ = get_bort_model(TINY, vocab=range(50), use_decoder=False, max_length=8)
    classifier = BortClassifier(bort)
    initialize(classifier, mx.cpu())
    classifier.hybridize(hybridized)
    assert classifier(nd.zeros((1, 8)), nd.array([8])).shape == (1, 2)
    with pytest.raises(ValueError, match="sequence length 9: the model has 8 positions"):
        classifier(nd.zeros((1, 9)), nd.array([9]))


def test_a_classifier_says_what_it_cannot_be_built_of(tiny_model: BortModel) -> None:
    with pytest.raises(ValueError, match="has a decoder; build it with use_decoder=False"):
        BortClassifier(tiny_model)
    bort, _ = get_bort_model(TINY, vocab=range(50), use_decoder=False)
    with pytest.raises(ValueError, match="pooling 'max': expected one of cls, mean"):
        BortClassifier(bort, pooling="max")


# ---- parameter files ---------------------------------------------------------------------------


def released_layout(model: BortModel, dtype: str = "float32") -> dict[str, Any]:
    """Return what the released file holds: each array under each of its names."""
    named = model._collect_params_with_prefix()
    return {name: parameter.data().astype(dtype) for name, parameter in named.items()}


@pytest.fixture
def layout(tiny_model: BortModel) -> dict[str, Any]:
    return released_layout(tiny_model)


@pytest.fixture
def other() -> BortModel:
    """Return a model of the shape of `tiny_model` with other values."""
    return get_bort_model(TINY, vocab=range(50))[0]


def assert_same_parameters(first: Any, second: Any) -> None:
    expected = parameters_of(second)
    assert parameters_of(first).keys() == expected.keys()
    for name, values in parameters_of(first).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def refusal(model: BortModel, path: Path, arrays: Any) -> str:
    """Store the arrays, see them refused without a trace in the model; returns the message."""
    nd.save(str(path), arrays)
    before = parameters_of(model)
    with pytest.raises(UserError) as caught:
        load_parameters(model, str(path))
    for name, values in parameters_of(model).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_saving_writes_the_tied_matrix_once_and_loads_bit_identically(
    tiny_model: BortModel, other: BortModel, tmp_path: Path
) -> None:
    path = str(tmp_path / "model.params")
    save_parameters(tiny_model, path)
    stored = nd.load(path)
    assert len(stored.keys() & set(TIED)) == 1
    assert stored.keys() | set(TIED) == tiny_model._collect_params_with_prefix().keys()
    load_parameters(other, path)
    assert_same_parameters(other, tiny_model)


@pytest.mark.parametrize("dropped", [[], [TIED[0]], [TIED[1]]])
def test_the_tied_matrix_may_be_stored_under_either_name_or_both(
    dropped: list[str],
    layout: dict[str, Any],
    tiny_model: BortModel,
    other: BortModel,
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "bort.params")
    nd.save(path, {name: array for name, array in layout.items() if name not in dropped})
    load_parameters(other, path)
    assert_same_parameters(other, tiny_model)
    assert other.decoder[3].weight is other.word_embed[0].weight


def test_float16_is_cast(tiny_model: BortModel, other: BortModel, tmp_path: Path) -> None:
    path = str(tmp_path / "bort.params")
    nd.save(path, released_layout(tiny_model, "float16"))
    load_parameters(other, path)
    for name, parameter in other._collect_params_with_prefix().items():
        assert parameter.data().dtype == np.float32
        rounded = tiny_model._collect_params_with_prefix()[name].data().asnumpy()
        np.testing.assert_array_equal(
            parameter.data().asnumpy(), rounded.astype(np.float16).astype(np.float32)
        )


def test_missing_parameters_are_listed(
    layout: dict[str, Any], other: BortModel, tmp_path: Path
) -> None:
    del layout["encoder.layer_norm.beta"], layout["decoder.0.bias"]
    message = refusal(other, tmp_path / "x.params", layout)
    assert message.endswith("missing decoder.0.bias, encoder.layer_norm.beta")


def test_a_tied_matrix_under_neither_name_is_missing(
    layout: dict[str, Any], other: BortModel, tmp_path: Path
) -> None:
    for name in TIED:
        del layout[name]
    message = refusal(other, tmp_path / "x.params", layout)
    assert message.endswith("missing word_embed.0.weight")


def test_surplus_parameters_are_listed(
    layout: dict[str, Any], other: BortModel, tmp_path: Path
) -> None:
    layout["pooler.weight"] = layout["cls.bias"] = nd.ones((2, 2))
    message = refusal(other, tmp_path / "x.params", layout)
    assert message.endswith("fit this model: surplus cls.bias, pooler.weight")
    del layout["decoder.0.bias"]
    message = refusal(other, tmp_path / "x.params", layout)
    assert message.endswith("missing decoder.0.bias; surplus cls.bias, pooler.weight")


def test_a_long_list_is_cut_with_its_length(other: BortModel, tmp_path: Path) -> None:
    message = refusal(other, tmp_path / "x.params", {"a": nd.ones(1)})
    # 41 = 10 + 2 * 16 names, of which the tied two count once
    assert "missing decoder.0.bias, decoder.0.weight, " in message
    assert "and 33 more; surplus a" in message


def test_a_parameter_of_another_shape_is_named(
    layout: dict[str, Any], other: BortModel, tmp_path: Path
) -> None:
    layout["decoder.0.bias"] = nd.ones(31)
    message = refusal(other, tmp_path / "x.params", layout)
    assert "decoder.0.bias has shape (31,), the model (32,)" in message


def test_a_checkpoint_of_another_vocabulary_is_refused(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    larger, _ = get_bort_model(TINY, vocab=range(51))
    message = refusal(larger, tmp_path / "x.params", layout)
    assert "(50, 32), the model (51, 32)" in message


def test_tied_matrices_that_differ_are_refused(
    layout: dict[str, Any], other: BortModel, tmp_path: Path
) -> None:
    changed = layout[TIED[1]].copy()
    # The second is larger: the greatest of their differences is still 0.
    changed[3, 4] += 1
    layout[TIED[1]] = changed
    message = refusal(other, tmp_path / "x.params", layout)
    assert "word_embed.0.weight and decoder.3.weight are tied but differ" in message


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_a_truncated_file_is_refused(
    kept: int, tiny_model: BortModel, other: BortModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.params"
    save_parameters(tiny_model, str(path))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.params: cannot be read as a parameter file"):
        load_parameters(other, str(path))


def test_other_files_are_refused(other: BortModel, tmp_path: Path) -> None:
    text = tmp_path / "text.params"
    text.write_text("not parameters at all")
    for path in (text, tmp_path, tmp_path / "absent.params"):
        with pytest.raises(UserError, match="cannot be read as a parameter file"):
            load_parameters(other, str(path))
    assert "not as many names as arrays" in refusal(other, tmp_path / "x.params", [nd.ones(3)])


def test_pretrained_loads_the_released_file(tiny_model: BortModel, tmp_path: Path) -> None:
    nd.save(str(tmp_path / "bort.params"), released_layout(tiny_model, "float32"))
    loaded, _ = get_bort_model(TINY, vocab=range(50), pretrained=True, root=str(tmp_path))
    assert_same_parameters(loaded, tiny_model)


def test_pretrained_without_decoder_ignores_the_decoder(
    tiny_model: BortModel, tmp_path: Path
) -> None:
    nd.save(str(tmp_path / "bort.params"), released_layout(tiny_model))
    loaded, _ = get_bort_model(
        TINY, vocab=range(50), pretrained=True, use_decoder=False, root=str(tmp_path)
    )
    expected = parameters_of(tiny_model)
    for name, values in parameters_of(loaded).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_pretrained_without_file_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bort\.params: not found; scripts/download_model\.sh"):
        get_bort_model(TINY, vocab=range(50), pretrained=True, root=str(tmp_path))
