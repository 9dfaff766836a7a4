"""Property tests: weights, statistics, windows and files equal their slow twins on generated inputs."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opd import Controls, Rock, RockSet, TokenStats, token_weights
from trl_opd.artefacts.occurrences import MAX_VOCABULARY, PROMPT_SCHEMA, Occurrences, read_prompts, write_occurrences
from trl_opd.rocks.corpus import NO_TOKEN, Corpus

from tests.helpers import reference
from tests.helpers.token_statistics import MEASURE, V, assert_sums, positions, slow_sums, stats_of

texts = st.text(max_size=12) | st.text(alphabet='a\0\n"\\\ud800\ufeff\u202e', max_size=6)
finite = st.floats(-1e300, 1e300) | st.sampled_from([0.0, -0.0, 5e-324, 1e300, -1e300, 0.1])
wholes, wholes_32 = st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1)
divergences = st.floats(0.0, 2.0**127, width=32) | st.sampled_from([-0.0, -(2.0**-14)])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_token_weights_equal_a_plain_loop(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 14))
    rows = [data.draw(st.lists(kind, min_size=length, max_size=length)) for kind in [st.integers(0, 6)] * batch]
    mask = [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(batch)]
    rocks = data.draw(st.lists(st.integers(0, 40), max_size=4))
    weight, window = data.draw(st.sampled_from([0.0, 0.25, 1.0])), data.draw(st.integers(0, 12))
    found = token_weights(torch.tensor(rows), rocks, rock_weight=weight, window=window, mask=torch.tensor(mask))
    assert found.tolist() == reference.weights(rows, set(rocks), weight, window, mask)


@settings(deadline=None, max_examples=30)
@given(rows=positions, data=st.data())
def test_statistics_saved_in_parts_merge_to_the_sums_of_all_rows(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    pieces = [rows[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    total = TokenStats(V, MEASURE)
    with tempfile.TemporaryDirectory() as folder:
        for place in data.draw(st.permutations(range(len(pieces)))):
            stats_of(pieces[place]).save(Path(folder, "part"))
            total.merge(TokenStats.load(Path(folder, "part")))
            total.save(Path(folder, "total"))
            total = TokenStats.load(Path(folder, "total"))
    assert_sums(total, slow_sums(rows))


def slow_window(rows: list[tuple[int, int, int]], row: int, width: int) -> list[int]:
    """Return the tokens around a row of (rollout, position, token), near to far on the left, then on the right."""
    at = {(rollout, position): token for rollout, position, token in rows}
    rollout, position, _ = rows[row]
    places = [*range(-1, -width - 1, -1), *range(1, width + 1)]
    found = []
    for offset in places:
        way = range(1, offset + 1) if offset > 0 else range(-1, offset - 1, -1)
        whole = all((rollout, position + step) in at for step in way)
        found.append(at[rollout, position + offset] if whole else NO_TOKEN)
    return found


@settings(deadline=None, max_examples=60)
@given(
    places=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1),
    width=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_context_windows_end_at_the_completion_and_at_missing_tokens(places, width, seed):
    tokens = np.random.default_rng(seed).integers(0, 5, len(places)).tolist()
    rows = [(*place, token) for place, token in zip(sorted(places), tokens, strict=True)]
    rollout, position, token = (np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))
    corpus = Corpus(rollout, position, token, np.zeros(len(rows), np.float32))
    found = corpus.windows(np.arange(len(rows)), width)
    assert found.tolist() == [slow_window(rows, row, width) for row in range(len(rows))]


@st.composite
def rock_sets(draw) -> RockSet:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=6))
    cut = draw(st.integers(0, len(ids)))
    optional = st.none() | finite
    roles = st.sampled_from([None, "pillar", "stumbling", "neutral"])
    rocks = [
        Rock(id, draw(st.none() | texts), draw(wholes), draw(finite), draw(finite), draw(optional), draw(optional))
        for id in ids[:cut]
    ]
    rocks += [Rock(id, None, 1, 0.5, 0.5, family=draw(texts), role=draw(roles)) for id in ids[cut : cut + 1]]
    others = ids[cut + 1 :]
    names = draw(st.none() | st.lists(st.none() | texts, min_size=len(others), max_size=len(others)))
    controls = Controls(others, draw(finite), draw(st.booleans()), draw(st.none() | wholes), names)
    method = {"score": draw(texts), "top_k": draw(wholes), "gamma": draw(optional), "of another": draw(texts)}
    method = dict.fromkeys(("tau_pre", "tau_post", "window", "eta")) | method
    return RockSet(
        rocks,
        {"name": draw(st.none() | texts), "vocab_size": None, "fingerprint": draw(st.none() | texts)},
        {"divergence": draw(texts), "temperature": draw(finite)},
        method,
        {"rollouts": draw(st.none() | wholes), "tokens": draw(wholes), "kl_sum": draw(finite)},
        draw(st.none() | st.just(controls)),
        draw(st.none() | st.just({"token_share": draw(finite), "kl_share": draw(finite)})),
    )


@settings(deadline=None, max_examples=30)
@given(rock_set=rock_sets())
def test_rock_set_loads_as_it_was_saved(rock_set):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rocks.json")
        rock_set.save(path)
        again = RockSet.load(path)
    assert again == rock_set
    assert [math.copysign(1, rock.score) for rock in again.rocks] == [math.copysign(1, r.score) for r in rock_set.rocks]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_occurrences_are_read_as_they_were_written(data):
    places = sorted(data.draw(st.sets(st.tuples(wholes_32, wholes_32), min_size=1, max_size=12)))
    count = len(places)
    rollout, position = zip(*places, strict=True)
    ids = data.draw(st.lists(st.integers(0, MAX_VOCABULARY - 1), min_size=count, max_size=count))
    kl, kl_pre = (data.draw(st.lists(divergences, min_size=count, max_size=count)) for _ in range(2))
    of_rollout = {value: data.draw(wholes_32) for value in sorted(set(rollout))}
    columns = {"rollout": rollout, "position": position, "token_id": ids, "kl": kl}
    columns |= data.draw(st.sampled_from([{}, {"kl_pre": kl_pre}]))
    columns |= data.draw(st.sampled_from([{}, {"prompt": [of_rollout[value] for value in rollout]}]))
    about = data.draw(st.dictionaries(texts.filter(lambda name: name != "version"), texts | finite | st.none()))
    with tempfile.TemporaryDirectory() as folder:
        write_occurrences(Path(folder, "o.parquet"), columns, about)
        file = Occurrences(Path(folder, "o.parquet"))
        batches = list(file.batches())
        units = file.units().tolist()
    found = {name: np.concatenate([batch[name] for batch in batches]).tolist() for name in batches[0]}
    assert found.pop("unit") == list(columns.get("prompt", rollout))
    assert found == {name: list(values) for name, values in columns.items() if name != "prompt"}
    assert units == sorted(set(columns.get("prompt", rollout)))
    assert file.metadata == {"version": 1} | about
    assert file.rows == count


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=6))
def test_prompts_are_read_by_their_index(prompts):
    columns = {"prompt": list(prompts), "token_ids": list(prompts.values()), "row": [0] * len(prompts)}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(columns, schema=PROMPT_SCHEMA), Path(folder, "p.parquet"))
        ids_of = read_prompts(Path(folder, "p.parquet"))
    assert {prompt: ids_of(prompt) for prompt in prompts} == prompts
    assert ids_of(next(number for number in range(7) if number not in prompts)) is None
