"""Closed forms of the BERT family against GluonNLP's own models, and the figures known of it."""

from __future__ import annotations

import json

import mxnet as mx
import numpy as np
import pytest

from bort.bort import encode, get_bort_model, parameter_count
from bort.errors import UserError
from bort.ose.abnc import check_abnc
from bort.ose.bert_family import (
    BertFamily,
    bert_small_space,
    bert_space,
    grid,
    heads_first,
    load_space,
    measure_latency,
    synthetic_error,
)
from bort.ose.search import extract, largest, ordered, size_and_speed_gain
from bort.shapes import Shape, shape_of
from data.metrics import spearman

BORT = shape_of("bort_4_8_768_1024")
SMALLEST = shape_of("bort_2_4_256_512")
ROBERTA_LARGE = shape_of("bort_24_16_4096_1024")


def random_shapes():
    generator = np.random.default_rng(7)
    for _ in range(20):
        layers, heads, per_head = generator.integers(1, [5, 5, 9])
        shape = Shape(
            int(layers), int(heads), int(generator.integers(1, 40)), int(heads * per_head)
        )
        yield shape, *(int(n) for n in generator.integers([3, 2], [60, 30]))


CASES = list(random_shapes())


def in_order(family, space=None):
    space = bert_space() if space is None else space
    return ordered(space, family.parameter_size, family.inference_cost, heads_first)


@pytest.mark.parametrize(("shape", "vocab_size", "length"), CASES, ids=str)
def test_sizes_equal_the_frameworks_counts(shape, vocab_size, length):
    family = BertFamily(vocab_size=vocab_size, max_length=length)
    options = {"vocab": range(vocab_size), "max_length": length}
    body, _ = get_bort_model(shape.name, use_decoder=False, **options)
    whole, _ = get_bort_model(shape.name, use_decoder=True, **options)
    parts = family.layers(shape)
    assert family.parameter_size(shape) == parameter_count(body)
    assert family.parameter_size(shape) + parts.last.size == parameter_count(whole)
    cells = body.encoder.transformer_cells
    assert [parameter_count(cell) for cell in cells] == [parts.middle.size] * shape.layers
    effective = BertFamily(vocab_size=vocab_size, max_length=length, effective=True)
    assert effective.parameter_size(shape) == parameter_count(cells)


def count_operations(symbol, **inputs):
    """Walk the graph that GluonNLP built; return multiply-accumulates and all operations."""
    internals = symbol.get_internals()
    shapes = dict(zip(internals.list_outputs(), internals.infer_shape(**inputs)[1]))
    nodes = json.loads(symbol.tojson())["nodes"]

    def shape(node):
        # LayerNorm has three outputs, the first of its input's shape.
        suffix = {"null": "", "LayerNorm": "_output0"}.get(node["op"], "_output")
        return shapes.get(node["name"] + suffix) or shape(nodes[node["inputs"][0][0]])

    counts = []
    for node in nodes:
        if node["op"] != "null":
            sources = [shape(nodes[number]) for number, *_ in node["inputs"]]
            counts.append(operations_of(node, shape(node), *sources))
    return tuple(int(sum(column)) for column in zip(*counts))


def operations_of(node, output, first=None, *shapes):
    """Count one node of a graph by the shapes of its output and inputs."""
    entries, width = np.prod(output), output[-1]
    rows, products, others = entries // width, 0, 0
    if node["op"] == "FullyConnected":
        products = entries * first[-1]
        others = entries * (first[-1] - 1 + 1)  # sums and the bias
    elif node["op"] == "_contrib_interleaved_matmul_selfatt_qk":
        head_width = first[-1] // 3 // int(node["attrs"]["heads"])
        products = entries * head_width
        others = entries * (head_width - 1 + 1)  # sums and the scaling
    elif node["op"] == "_contrib_interleaved_matmul_selfatt_valatt":
        keys = shapes[0][-1]
        products = entries * keys
        others = entries * (keys - 1)
    elif node["op"] == "softmax":
        maximum, shift, exponentials, total, quotients = width - 1, width, width, width - 1, width
        others = rows * (maximum + shift + exponentials + total + quotients)
    elif node["op"] == "LayerNorm":
        mean, centred, variance, root = width - 1 + 1, width, width + width - 1 + 1, 1 + 1
        quotients, scaled, shifted = width, width, width
        others = rows * (mean + centred + variance + root + quotients + scaled + shifted)
    elif node["op"] == "LeakyReLU":
        others = entries * 5  # x / sqrt 2, erf, + 1, * x, / 2
    elif node["op"] == "elemwise_add" or (node["op"] == "broadcast_add" and len(output) == 3):
        others = entries  # the other broadcast_add prepares the mask of the padding
    return products, products + others


@pytest.mark.parametrize(("shape", "vocab_size", "length"), CASES, ids=str)
def test_costs_equal_a_walk_over_the_frameworks_graph(shape, vocab_size, length):
    model, _ = get_bort_model(shape.name, vocab=range(vocab_size), max_length=length)
    encoded = encode(model, mx.sym.var("ids"), mx.sym.var("valid_length"))
    products, operations = count_operations(encoded, ids=(1, length), valid_length=(1,))
    settings = {"vocab_size": vocab_size, "max_length": length, "sequence_length": length}
    plain, full = BertFamily(**settings), BertFamily(**settings, all_operations=True)
    assert plain.inference_cost(shape) == products
    assert full.inference_cost(shape) == operations

    decoded = model.decoder(mx.sym.var("hidden"))
    products, operations = count_operations(decoded, hidden=(1, shape.hidden))
    assert plain.layers(shape).last.operations == products
    assert full.layers(shape).last.operations == operations
    for family in (plain, full):
        parts = family.layers(shape)
        whole = parts.first.operations + shape.layers * parts.middle.operations
        assert whole == family.inference_cost(shape)


def test_the_papers_space():
    space = bert_space()
    assert len(space) == len(set(space)) == 300
    assert len({(s.layers, s.hidden, s.intermediate) for s in space}) == 90
    assert len({(s.heads, s.hidden) for s in space}) == 10
    assert BORT in space
    members = in_order(BertFamily())
    assert members[0].architecture == SMALLEST
    assert members[-1] == largest(members)
    assert members[-1].architecture.name == "bort_12_16_3072_1024"
    assert len(bert_small_space()) == 36


def test_shapes_of_equal_size_and_cost_are_ordered_by_heads():
    names = [member.architecture.name for member in in_order(BertFamily())]
    start = names.index("bort_4_4_768_1024")
    assert names[start : start + 3] == [f"bort_4_{a}_768_1024" for a in (4, 8, 16)]


def test_known_sizes_and_costs():
    roberta = BertFamily()
    bert = BertFamily(vocab_size=30522)
    millions = lambda n: round(n / 1e6, 2)  # noqa: E731
    assert millions(roberta.embedding_size(BORT)) == 52.00
    assert millions(roberta.layer_size(BORT)) == 5.78
    assert millions(roberta.parameter_size(BORT) + roberta.decoder_size(BORT)) == 76.21
    swapped = shape_of("bort_4_8_1024_768")  # fits the published 56 M
    pooler_and_decoder = swapped.hidden**2 + swapped.hidden + roberta.decoder_size(swapped)
    assert millions(roberta.parameter_size(swapped) + pooler_and_decoder) == 55.99
    base, large = shape_of("bort_12_12_3072_768"), ROBERTA_LARGE
    assert millions(bert.embedding_size(base)) == 23.84
    assert millions(bert.layer_size(base)) == 7.09
    assert millions(bert.layer_size(large)) == 12.60
    giga = lambda shape, n: round(  # noqa: E731
        BertFamily(sequence_length=n).inference_cost(shape) / 1e9, 2
    )
    assert [giga(BORT, n) for n in (128, 512)] == [3.09, 13.96]
    assert [giga(base, n) for n in (128, 512)] == [11.17, 48.32]
    assert [giga(large, n) for n in (128, 512)] == [39.46, 167.50]
    assert [giga(swapped, n) for n in (128, 512)] == [2.11, 9.66]


def test_size_and_speed_against_the_largest_member():
    members = in_order(BertFamily())
    top = members[-1]
    gains = {m.architecture: size_and_speed_gain(m, top) for m in members}
    assert max(gains, key=gains.get) == SMALLEST
    assert round(gains[SMALLEST], 3) == 0.817
    assert round(gains[BORT], 3) == 0.464
    assert 1 + sum(gain > gains[BORT] for gain in gains.values()) == 178
    assert round(gains[SMALLEST] / gains[BORT], 2) == 1.76


@pytest.mark.parametrize(
    ("effective", "top", "ratio"),
    [(True, None, 1.45), (False, ROBERTA_LARGE, 1.26), (True, ROBERTA_LARGE, 1.16)],
)
def test_how_much_lower_borts_error_has_to_be(effective, top, ratio):
    members = in_order(BertFamily(effective=effective), [*bert_space(), *([top] if top else [])])
    gains = {m.architecture: size_and_speed_gain(m, largest(members)) for m in members}
    assert round(gains[SMALLEST] / gains[BORT], 2) == ratio


def test_bort_wins_just_when_its_error_is_1_76_times_lower():
    def winner(factor):
        family = BertFamily()
        error = lambda shape, *_: 1.0 if shape == BORT else factor  # noqa: E731
        forms = (family.parameter_size, family.inference_cost)
        return extract(bert_space(), *forms, error, tie_break=heads_first).best.architecture

    assert winner(1.765) == BORT
    assert winner(1.755) == SMALLEST


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_search_over_the_papers_space(stride):
    def search(stride):
        family = BertFamily()
        forms = (family.parameter_size, family.inference_cost)
        return extract(bert_space(), *forms, synthetic_error, stride=stride, tie_break=heads_first)

    best, result = search(1), search(stride)
    assert len(result.table) == -(-300 // stride)
    assert best.best.w / stride <= result.best.w <= best.best.w
    assert result.table == best.table[::stride]


def test_abnc_on_the_papers_space():
    """Layers outgrow the embeddings, which are larger than any; the decoder holds an H x H."""
    for family in (BertFamily(), BertFamily(all_operations=True)):
        failed = [c.text for c in check_abnc(in_order(family), family.layers) if not c.holds]
        assert failed == [
            "size: the first layer is smaller than a middle layer",
            "size: the last layer grows by a smaller factor than a middle layer",
        ]


def test_grid_drops_heads_that_do_not_divide():
    shapes = grid(layers=[1], heads=[2, 3], hidden=[6, 8], intermediate=[5])
    assert [s.name for s in shapes] == ["bort_1_2_5_6", "bort_1_2_5_8", "bort_1_3_5_6"]


def test_spaces_of_a_file(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("layers: [1, 2]\nheads: [2]\nhidden: [8]\nintermediate: [4, 6]\n")
    assert load_space(str(path)) == grid([1, 2], [2], [8], [4, 6])
    path.write_text("architectures: [bort_4_8_768_1024, bort_1_1_1_1]\n")
    assert load_space(str(path)) == [BORT, Shape(1, 1, 1, 1)]
    assert load_space("bert") == bert_space()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [1]\n", "must hold the lists layers, heads, intermediate, hidden"),
        ("- 1\n", "must hold the lists"),
        ("layers: 1\nheads: [2]\nhidden: [8]\nintermediate: [4]\n", "layers must be a list"),
        ("layers: [0]\nheads: [2]\nhidden: [8]\nintermediate: [4]\n", "layers must be a list"),
        (
            f"layers: {list(range(1, 1000))}\nheads: [1, 2, 4, 8, 16, 32]\nhidden: [64, 128]\n"
            "intermediate: [64]\n",
            r"11,988 combinations; at most 2,000 are allowed",
        ),
        ("layers: [1001]\nheads: [2]\nhidden: [8]\nintermediate: [4]\n", "from 1 to 1,000, not"),
        ("layers: [2]\nheads: [2]\nhidden: [2147483648]\nintermediate: [4]\n", "to 1,000,000, not"),
        (
            "layers: [1]\nlayers: [2]\nheads: [2]\nhidden: [8]\nintermediate: [4]\n",
            "again on line 2",
        ),
        ("layers: [true]\nheads: [2]\nhidden: [8]\nintermediate: [4]\n", "integers from 1"),
        ("layers: [1]\nheads: [3]\nhidden: [8]\nintermediate: [4]\n", "no combination"),
        ("architectures: []\n", "a list of model names"),
        ("architectures: [bert]\n", r"space\.yaml: model name 'bert'"),
        ("layers: [1\n", "is not YAML"),
    ],
)
def test_invalid_space_files_are_refused(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_space(str(path))


def test_unknown_and_missing_spaces():
    with pytest.raises(UserError, match=r"--space large: must be bert, bert-small, or a"):
        load_space("large")
    with pytest.raises(UserError, match=r"absent\.yaml: cannot be read"):
        load_space("absent.yaml")


def test_latency_is_measured_at_the_length_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr("bort.bort.encode", lambda model, ids, n: seen.append(ids.shape) or ids)
    assert 0 < measure_latency(Shape(1, 1, 4, 4), sequence_length=6, runs=3) < 5
    assert len(seen) > 3
    assert set(seen) == {(1, 6)}


@pytest.mark.slow
def test_latency_rises_with_the_operations():
    space = grid(layers=(1, 3), heads=(4,), hidden=(64, 256), intermediate=(64, 1024))
    family = BertFamily(sequence_length=128)
    latencies = [measure_latency(shape, 128, runs=9) for shape in space]
    assert spearman([family.inference_cost(shape) for shape in space], latencies) > 0.8
