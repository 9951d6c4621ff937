"""Generators of wrong values, damaged bytes and damaged JSON, and checks that a reader survives them."""

import json
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MUTATIONS = int(os.environ.get("MPDIT_JAX_MUTATIONS", "800"))


def bulk(count):
    """Settings of Hypothesis for `count` examples that are the same in every run and may be slow."""
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )  # fmt: skip


# Values of config fields, mostly wrong. Sizes that JAX would have to allocate stay small.
WHOLE = st.sampled_from([-(2**63), -7, -1, 0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 2**31, 2**32, 2**64])
REAL = st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 1e-30, 0.5, 0.999, 1.0, 2.5, 1e30, 1e308])
WORD = st.sampled_from(
    ["", "adamw", "muon", "cosine", "linear", "constant", "uniform", "logit_normal", "digits", "arrays", "latents",
     "fashion_mnist", "all", "train", "test", "float32", "bfloat16", "full", "dots", "none", "xla", "cudnn", "tokens",
     "vector", "shared", "block", "fno", "sinusoidal", "mpdit_b", "dit_b_2", "velocity", "sit", "paper", "manifest",
     "../x", "\0", "é" * 300]
)  # fmt: skip
TUPLE = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 16, 2.5, "2", None, 2**40]), max_size=4).map(tuple)

# Damage to the bytes of a file: flipped, cut off, inserted, repeated.
CUT = st.tuples(st.just("cut"), st.floats(0, 1), st.just(b""))
FLIP = st.tuples(st.just("flip"), st.floats(0, 1), st.binary(min_size=1, max_size=4))
INSERT = st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=64))
HEADER = st.tuples(st.just("flip"), st.floats(0, 0.2), st.binary(min_size=1, max_size=9))
DAMAGE = st.lists(st.one_of(CUT, FLIP, INSERT, HEADER), min_size=1, max_size=3)


def damaged(content, damage):
    for how, where, what in damage:
        place = int(where * len(content))
        if how == "cut":
            content = content[:place]
        elif how == "insert":
            content = content[:place] + what + content[place:]
        else:
            content = content[:place] + what + content[place + len(what) :]
    return content


def survives(path, content, read, expected, count=MUTATIONS // 8):
    """Read `count` damaged versions of a file: each is read, or refused by an error of class `expected`."""
    outcome, sentences = {True: 0, False: 0}, []

    @bulk(count)
    @given(DAMAGE)
    def one(damage):
        path.write_bytes(damaged(content, damage))
        try:
            read(path)
        except expected as error:
            outcome[False] += 1
            sentences.append(str(error))
        else:
            outcome[True] += 1

    one()
    path.write_bytes(content)
    read(path)
    print(f"{path.name}: {outcome[True]} read, {outcome[False]} refused")
    assert all(sentences)
    assert outcome[False]


# Values of a JSON file replaced, removed and added.
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), WHOLE, REAL, WORD),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORD, inner, max_size=3)),
    max_leaves=4,
)


def changed_json(text, changes):
    tree = json.loads(text)
    for places, value, remove in changes:
        place = tree
        for depth, number in enumerate(places):
            if not isinstance(place, dict | list) or not place:
                break
            key = sorted(place)[number % len(place)] if isinstance(place, dict) else number % len(place)
            if depth == len(places) - 1 or not isinstance(place[key], dict | list):
                if remove:
                    del place[key]
                else:
                    place[key] = value
                break
            place = place[key]
    return json.dumps(tree)


CHANGES = st.lists(
    st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=3), JSON, st.booleans()), min_size=1, max_size=2
)


def json_survives(path, read, expected, count=MUTATIONS // 6):
    text = path.read_text()
    outcome, sentences = {True: 0, False: 0}, []

    @bulk(count)
    @given(CHANGES)
    def one(changes):
        path.write_text(changed_json(text, changes))
        try:
            read()
        except expected as error:
            outcome[False] += 1
            sentences.append(str(error))
        else:
            outcome[True] += 1

    one()
    path.write_text(text)
    read()
    print(f"{path.name}: {outcome[True]} read, {outcome[False]} refused")
    assert all(sentences)
    assert outcome[False]
    survives(path, text.encode(), lambda path: read(), expected, count=count // 3)
