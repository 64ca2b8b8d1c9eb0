"""Drafts: the text, the counters, the sampler and sessions are those without them; wrong ones leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import Loader, Run
from serving import serve
from tiny_models import write_tiny_mamba

from edge_stream import EdgeStreamError, Engine, Sampling, UnsupportedModelError
from edge_stream.chat.conversation import Conversation
from edge_stream.stream import Stream

Load = Callable[..., Engine]
Draw = Callable[..., list[int]]

ALWAYS = {"n_draft": 6, "n_draft_min": 1}  # whether they pay or not, so that the tests do not depend on the machine
OPTIONS: dict[str, Any] = {"n_ctx": 64, "n_keep": 4, "n_slide": 16, "rebase_at": 200, "flash_attn": "off"}
SAMPLINGS = {
    "greedy": Sampling(temp=0),
    "seeded": Sampling(seed=7, temp=0.6),
    "penalties": Sampling(seed=8, temp=0.8, repeat_penalty=1.05, presence_penalty=0.1, dry_multiplier=0.3),
    "mirostat": Sampling(seed=9, mirostat=2, mirostat_tau=1.0),
    "xtc": Sampling(seed=10, temp=0.5, xtc_probability=0.2),
    "grammar": Sampling(seed=11, grammar='root ::= ("abcde" [f-i] "jklm" | "abcxyz")+'),
}


def facts(stream: Stream) -> dict[str, Any]:
    """Everything in a stream's stats that drafts must not change."""
    values = dict(vars(stream.stats))
    return {name: v for name, v in values.items() if not name.startswith("t_") and name not in DRAFTS}


DRAFTS = ("n_drafts", "n_drafted", "n_accepted")


def same(drafting: Stream, plain: Stream) -> None:
    """Both streams hold the same, and go on the same."""
    assert facts(drafting) == facts(plain)
    assert drafting.tokens() == plain.tokens()
    assert drafting.logits is not None and plain.logits is not None
    np.testing.assert_allclose(drafting.logits, plain.logits, atol=1e-3)


def written(stream: Stream, n: int, sampling: Sampling, **options: Any) -> list[Any]:
    """What is generated: tokens, text and the way they end."""
    options = {"ignore_eos": True, **options}
    return [(t.token, t.text, t.finish_reason, t.n_past) for t in stream.generate(n, sampling=sampling, **options)]


# who guesses besides the lookup: nobody, the model itself, or one that is nearly always wrong
GUESSERS = {"lookup": "", "itself": "head64", "another": "one_layer"}


@pytest.fixture(params=GUESSERS)
def pair(
    request: pytest.FixtureRequest, load: Load, tiny: Callable[[str], Path], draw: Draw
) -> Iterator[tuple[Stream, Stream]]:
    """A stream with drafts and one without, which read the same text, with repetitions."""
    text = draw(20) * 2 + draw(9, seed=1) + draw(20)
    guesser = GUESSERS[request.param]
    more = ALWAYS | {"draft_model": str(tiny(guesser)) if guesser else ""}
    with load("head64", **OPTIONS, **more).stream() as drafting, load("head64", **OPTIONS).stream() as plain:
        drafting.feed(text)
        plain.feed(text)
        yield drafting, plain


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_the_same_tokens(kind: str, pair: tuple[Stream, Stream]) -> None:
    """Across slides and rebases, with everything that a sampler remembers."""
    drafting, plain = pair
    assert written(drafting, 500, SAMPLINGS[kind]) == written(plain, 500, SAMPLINGS[kind])
    same(drafting, plain)
    stats = drafting.stats
    assert stats.n_slides > 25 and stats.n_rebases > 2
    assert stats.n_drafted > stats.n_accepted
    if kind == "grammar":  # the tiny model hardly repeats itself otherwise
        assert stats.n_accepted > 100


def test_stop_strings_and_the_loop_guard_end_at_the_same_token(pair: tuple[Stream, Stream]) -> None:
    drafting, plain = pair
    cycle = Sampling(seed=1, grammar='root ::= "abc" ("xyzXYZ")+')
    ends = [written(s, 600, cycle, loop_guard=True) for s in pair]
    assert ends[0] == ends[1] and ends[0][-1][2] == "repetition"
    same(drafting, plain)
    ends = [written(s, 100, cycle, stop=["zXYZx"]) for s in pair]
    assert ends[0] == ends[1] and ends[0][-1][2] == "stop"
    same(drafting, plain)
    assert drafting.stats.n_accepted > 300


def test_whatever_happens_in_the_middle(pair: tuple[Stream, Stream], draw: Draw, tmp_path: Path) -> None:
    """Rewinding, reading, marking, rebasing, saving: the drafts that are in the cache are taken back first."""
    drafting, plain = pair
    actions: dict[str, Callable[[Stream], object]] = {
        "rewind": lambda s: (s.rewind(5), s.feed(draw(1))),
        "read": lambda s: s.feed(draw(25)),
        "mark": lambda s: s.mark(),
        "rebase": lambda s: s.rebase(),
        "save": lambda s: s.save(tmp_path / str(s is drafting), b"mine"),
        "score": lambda s: s.score(draw(7), chunk=1),
        "load": lambda s: s.load(tmp_path / str(s is drafting), b"mine"),
        "again": lambda s: s.rewind(3),
    }
    n_ahead = 0
    for name, act in actions.items():
        before = drafting.stats
        texts = [written(s, 103, SAMPLINGS["grammar"]) for s in pair]
        assert texts[0] == texts[1], name
        stats = drafting.stats
        n_ahead += stats.n_drafted - stats.n_accepted > before.n_drafted - before.n_accepted
        for stream in pair:
            act(stream)
        if name == "again":  # it has no logits now
            assert facts(drafting) == facts(plain) and drafting.tokens() == plain.tokens()
        else:
            same(drafting, plain)
    assert n_ahead > 3
    one, other = ((tmp_path / str(s is drafting)).read_bytes() for s in pair)
    assert len(one) == len(other)


def test_a_session_goes_on_without_drafts_and_with(pair: tuple[Stream, Stream], load: Load, tmp_path: Path) -> None:
    drafting, plain = pair
    sampling = SAMPLINGS["penalties"]
    assert written(drafting, 133, sampling) == written(plain, 133, sampling)
    drafting.save(tmp_path / "drafting")
    plain.save(tmp_path / "plain")
    want = written(plain, 100, sampling)
    assert written(drafting, 100, sampling) == want
    for name, more in (("plain", ALWAYS), ("drafting", {}), ("drafting", ALWAYS)):
        with load("head64", **OPTIONS, **more).restore(tmp_path / name) as stream:
            assert written(stream, 100, sampling) == want


def test_ctrl_c_in_the_middle(pair: tuple[Stream, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream then holds what was written, and goes on as one that was never interrupted."""
    drafting, plain = pair
    sampling = SAMPLINGS["greedy"]
    n = 0
    deliver = drafting.backend.callbacks.deliver

    def interrupted() -> None:
        nonlocal n
        n += 1
        deliver()
        if n == 37:
            raise KeyboardInterrupt

    monkeypatch.setattr(drafting.backend.callbacks, "deliver", interrupted)
    got: list[int] = []
    before = drafting.stats.n_past
    with pytest.raises(KeyboardInterrupt):
        got.extend(t.token for t in drafting.generate(100, sampling=sampling, ignore_eos=True))
    monkeypatch.undo()
    n_written = drafting.stats.n_past - before
    want = [t for t, *_ in written(plain, 100 + n_written, sampling)]
    assert drafting.tokens()[-10:] == [t for t, *_ in zip(want[:n_written], strict=False)][-10:]
    assert [t for t, *_ in written(drafting, 100, sampling)] == want[n_written:]
    same(drafting, plain)


def test_wrong_drafts_leave_no_trace(pair: tuple[Stream, Stream], draw: Draw) -> None:
    """Two tokens that repeat, and another one after them each time: nearly every draft is wrong."""
    drafting, plain = pair
    before = drafting.stats
    for third in draw(150, seed=3):
        for token in (7, 9, third):
            drafting.feed([token])
            plain.feed([token])
    stats = drafting.stats
    n_drafted, n_accepted = stats.n_drafted - before.n_drafted, stats.n_accepted - before.n_accepted
    assert n_drafted > 6 * n_accepted and n_drafted > 200
    same(drafting, plain)


def test_streams_in_one_batch_do_not_draft(load: Load, draw: Draw) -> None:
    options = OPTIONS | {"n_parallel": 2}
    drafting, plain = load("head64", **options, **ALWAYS), load("head64", **options)
    streams = [[engine.stream(seq_id=i) for i in range(2)] for engine in (drafting, plain)]
    text = draw(12) * 12
    for pair in streams:
        pair[0].feed(text[:30])
        pair[1].feed(text[5:40])
    for i in range(40, 120):
        for engine, pair in zip((drafting, plain), streams, strict=True):
            if i % 10 < 5:  # alone, with drafts, and then together
                pair[i // 10 % 2].feed([text[i]])
            else:
                engine.feed_each(pair, [text[i], text[i - 9]])
        for one, other in zip(*streams, strict=True):
            same(one, other)
    assert all(stream.stats.n_drafted > 0 for stream in streams[0])


def test_by_default_evictions_make_room(load: Load) -> None:
    without = {name: v for name, v in OPTIONS.items() if name not in ("n_slide", "rebase_at")}
    with load("head64", **without, **ALWAYS).stream() as stream:
        assert stream.stats.n_slide == 15  # a quarter of the window, at most 16
    with load("head64", **without | {"n_ctx": 256}, **ALWAYS).stream() as stream:
        assert stream.stats.n_slide == 16
    with load("head64", **without).stream() as stream:
        assert stream.stats.n_slide == 1


def test_one_token_evictions_leave_no_room_once_the_cache_is_full(load: Load, draw: Draw) -> None:
    with load("head64", **OPTIONS | {"n_slide": 1}, **ALWAYS).stream() as stream:
        text = draw(10) * 30
        stream.feed(text[:30])
        for token in text[30:64]:
            stream.feed([token])
        full = stream.stats.n_drafted
        for token in text[64:]:
            stream.feed([token])
        assert full > 0 and stream.stats.n_drafted == full


def test_a_random_text_is_hardly_drafted(load: Load, draw: Draw) -> None:
    """Adaptive: nothing comes true, so nothing is drafted."""
    with load("head64", **OPTIONS, n_draft=6).stream() as stream:
        for token in draw(1500, seed=5):
            stream.feed([token])
        assert stream.stats.n_drafted < 100


def test_a_draft_model_that_is_wrong_falls_asleep(load: Load, tiny: Callable[[str], Path], draw: Draw) -> None:
    """It is tried again after 512 tokens, then after twice as many, and so on."""
    with load("head64", **OPTIONS, n_draft=6, draft_model=str(tiny("one_layer"))).stream() as stream:
        for token in draw(1500, seed=5):
            stream.feed([token])
        assert 0 < stream.stats.n_drafted < 150


def test_a_draft_model_with_other_tokens_is_refused(load: Load, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    other = str(tiny("chat"))  # it has special tokens
    with pytest.raises(UnsupportedModelError, match="the draft model has another vocabulary: token"):
        load("head64", **OPTIONS, n_draft=4, draft_model=other)
    with pytest.raises(EdgeStreamError, match="needs n_draft"):
        load("head64", **OPTIONS, draft_model=other)
    with pytest.raises(EdgeStreamError, match="a GGUF file"):
        load("head64", **OPTIONS, n_draft=4, draft_model=str(tmp_path))
    mamba = str(write_tiny_mamba(tmp_path / "mamba.gguf"))
    with pytest.raises(UnsupportedModelError, match="recurrent layers, whose state cannot take wrong guesses back"):
        load("head64", **OPTIONS, n_draft=4, draft_model=mamba)


def test_recurrent_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="recurrent layers cannot take tokens back"):
        Engine.load(write_tiny_mamba(tmp_path / "mamba.gguf"), n_ctx=64, n_draft=4)


@pytest.mark.parametrize("bad", [{"n_draft": 65}, {"n_draft": 2, "n_draft_min": 3}, {"n_draft": 2, "n_match": 65}])
def test_bounds(bad: dict[str, int], load: Load) -> None:
    with pytest.raises(EdgeStreamError, match="must be at most"):
        load("head64", **OPTIONS, **bad)


def test_a_conversation_is_the_same(load: Load) -> None:
    """With turns, regenerated answers and answers that go on."""
    answers = []
    for more in (ALWAYS, {}):
        conversation = Conversation(load("chat", **OPTIONS | {"n_ctx": 128}, **more))
        options: dict[str, Any] = {"sampling": Sampling(seed=4, temp=0.3), "max_tokens": 60, "ignore_eos": True}
        texts = ["".join(t.text for t in conversation.reply(text, **options)) for text in ("one", "one", "two")]
        texts.append("".join(t.text for t in conversation.regenerate(**options)))
        texts.append("".join(t.text for t in conversation.continue_answer(**options)))
        answers.append((texts, facts(conversation.stream)))
        conversation.close()
    assert answers[0] == answers[1]


def test_the_server_drafts_for_one_conversation(load: Load) -> None:
    texts = []
    for more in (ALWAYS, {}):
        with serve(load("chat", **OPTIONS | {"n_ctx": 128, "n_parallel": 2}, **more)) as served:
            answer = served.client.chat([{"role": "user", "content": "hello"}], seed=3, temperature=0, max_tokens=120)
            texts.append(answer["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]


def test_flags(run: Run, loader: Loader) -> None:
    """llama.cpp's names; nothing is drafted without --spec-type."""
    names = ("n_draft", "n_draft_min", "n_match")
    for flags, wanted in {
        "": (None, None, None),
        "--spec-type none --spec-draft-n-max 4": (None, None, None),
        "--spec-type ngram-simple": (8, 0, 2),
        "--spec-default": (8, 0, 2),
        "--spec-type ngram-mod,none --draft-max 4 --draft-min 2 --spec-ngram-simple-size-n 3": (4, 2, 3),
    }.items():
        loader.engine.answers = ["b"]
        assert run("run", "-m", "x.gguf", "-p", "a", "-n", "1", *flags.split()).exit_code == 0
        assert tuple(loader.asked.get(name) for name in names) == wanted
    result = run("run", "-m", "x.gguf", "-p", "a", "--spec-type", "draft-eagle3")
    assert result.exit_code == 2 and "(draft-simple and -md)" in result.output
    result = run("run", "-m", "x.gguf", "-p", "a", "--spec-type", "draft-simple")
    assert result.exit_code == 2 and "-md" in result.output
    for flags, model in {"-md small.gguf": "small.gguf", "-hfd a/b:Q4_0": "hf:a/b:Q4_0"}.items():
        loader.engine.answers = ["b"]
        assert run("run", "-m", "x.gguf", "-p", "a", "-n", "1", *flags.split(), "-ngld", "3").exit_code == 0
        assert loader.asked["draft_model"] == model and loader.asked["n_gpu_layers_draft"] == 3
    loader.engine.answers = ["b"]
    result = run("chat", "-st", "-m", "x.gguf", "-p", "a", "--spec-type", "ngram-simple", "--slide", "1")
    assert "no room for drafts" in result.output


def test_the_mlc_engine_drafts_too(load_mlc: Load, draw: Draw) -> None:
    """Its ring is not told of drafts that are taken back: it writes over them."""
    options = {"n_ctx": 51, "n_slide": 12}
    text = draw(15) * 12
    text[70], text[101], text[102] = draw(3, seed=2)
    with load_mlc("gqa", **options, **ALWAYS).stream() as drafting, load_mlc("gqa", **options).stream() as plain:
        for token in text:
            drafting.feed([token])
            plain.feed([token])
            same(drafting, plain)
        assert drafting.stats.n_accepted > 80
        for stream in (drafting, plain):
            stream.rewind(4)
            stream.feed(draw(2))
        assert written(drafting, 60, SAMPLINGS["grammar"]) == written(plain, 60, SAMPLINGS["grammar"])
        same(drafting, plain)
