"""Sessions: a restored stream goes on exactly as the uninterrupted one; damage is refused and nothing is lost."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from session_files import rewritten

from edge_stream import EdgeStreamError, Engine, Sampling, SessionError
from edge_stream.session_file import peek_session

Load = Callable[..., Any]
Draw = Callable[..., list[int]]

OPTIONS = {"n_ctx": 64, "n_keep": 4, "n_slide": 1}
SAMPLINGS = {
    "greedy": Sampling(temp=0),
    "seeded": Sampling(seed=7, temp=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.2),
}


def tokens_of(stream: Any, n: int, sampling: Sampling) -> list[int]:
    """n generated tokens."""
    return [t.token for t in stream.generate(n, sampling=sampling, ignore_eos=True)]


@pytest.mark.parametrize("sink_move", ["bank", "redecode"])
@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("n_before", [30, 300])
@pytest.mark.parametrize("cache", ["f32", "q8_0"])
def test_continues_identically(
    cache: str, n_before: int, kind: str, sink_move: str, load: Load, draw: Draw, tmp_path: Path
) -> None:
    """In a new engine, before and after the cache filled, with the sampler's random sequence and penalties."""
    sampling = SAMPLINGS[kind]
    options = OPTIONS | {"sink_move": sink_move, "cache_type_k": cache}
    path = tmp_path / "s.session"
    with load("head64", **options).stream() as stream:
        stream.feed(draw(n_before))
        tokens_of(stream, 10, sampling)
        stream.save(path, b"mine")
        at_save = stream.stats
        want = tokens_of(stream, 200, sampling)
    restored = load("head64", **options).restore(path)
    assert restored.user == b"mine"
    assert restored.stats.n_past == at_save.n_past == n_before + 10
    assert restored.tokens()[:4] == draw(n_before)[:4]
    assert tokens_of(restored, 200, sampling) == want


@pytest.mark.parametrize("sink_move", ["bank", "redecode"])
@pytest.mark.parametrize("n_before", [1, 9])
def test_saved_while_sinks_are_missing(sink_move: str, n_before: int, load: Load, draw: Draw, tmp_path: Path) -> None:
    """A stream that is shorter than its sinks goes on as well, and pins the later ones."""
    options = {"n_ctx": 64, "n_keep": 12, "n_slide": 4, "sink_move": sink_move}
    path = tmp_path / "s"
    sampling = SAMPLINGS["seeded"]
    with load("gqa", **options).stream() as stream:
        stream.feed(draw(n_before))
        tokens_of(stream, 2, sampling)
        stream.save(path)
        want = tokens_of(stream, 100, sampling)
        sinks = stream.tokens()[:12]
    restored = load("gqa", **options).restore(path)
    assert restored.stats.n_past == n_before + 2
    assert tokens_of(restored, 100, sampling) == want
    assert restored.tokens()[:12] == sinks
    assert restored.stats.n_sinks == 12


@pytest.mark.parametrize(("name", "sink_move"), [("gqa", "bank"), ("gqa", "redecode"), ("gemma3", "bank")])
def test_saved_between_turns(name: str, sink_move: str, load: Load, draw: Draw, tmp_path: Path) -> None:
    """As chat does: rebase, save, and in another process go on reading; sliding-window models included."""
    options = {"n_ctx": 64, "n_slide": 8, "sink_move": sink_move}
    path = tmp_path / "s"
    with load(name, **options).stream(n_boundary=5) as stream:
        stream.feed(draw(250))
        stream.rebase()
        stream.save(path)
        want = [stream.logits_of([token])[0] for token in draw(60, seed=2)]
    with load(name, **options).restore(path) as stream:
        got = [stream.logits_of([token])[0] for token in draw(60, seed=2)]
        assert stream.stats.n_slide == 8
    assert max(abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-3


def test_sampler_state_survives_a_second_save(load_each: Load, draw: Draw, tmp_path: Path) -> None:
    engine = load_each("head64", **OPTIONS)
    with engine.stream() as stream:
        stream.feed(draw(50))
        tokens_of(stream, 5, SAMPLINGS["seeded"])
        stream.save(tmp_path / "a")
        want = tokens_of(stream, 50, SAMPLINGS["seeded"])
    with engine.restore(tmp_path / "a") as stream:
        stream.save(tmp_path / "b")
    with engine.restore(tmp_path / "b") as stream:
        assert tokens_of(stream, 50, SAMPLINGS["seeded"]) == want


def test_another_seed_is_another_sequence(load_each: Load, draw: Draw, tmp_path: Path) -> None:
    engine = load_each("head64", **OPTIONS)
    stream = engine.stream()
    stream.feed(draw(50))
    tokens_of(stream, 5, SAMPLINGS["seeded"])
    stream.save(tmp_path / "s")
    want = tokens_of(stream, 50, SAMPLINGS["seeded"])
    other = engine.restore(tmp_path / "s")
    assert tokens_of(other, 50, Sampling(seed=8, temp=1.0, top_k=0, top_p=1.0, min_p=0.0)) != want


def test_larger_engine_takes_smaller_session_and_not_the_reverse(load_each: Load, draw: Draw, tmp_path: Path) -> None:
    small = load_each("gqa", **OPTIONS)
    with small.stream() as stream:
        stream.feed(draw(100))
        stream.save(tmp_path / "s")
    with load_each("gqa", n_ctx=128).restore(tmp_path / "s") as stream:
        assert stream.stats.n_ctx == 64
    with load_each("gqa", n_ctx=128).stream() as stream:
        stream.feed(draw(100))
        stream.save(tmp_path / "large")
    with pytest.raises(SessionError, match="-c 128"):
        small.restore(tmp_path / "large")


@pytest.fixture
def saved(load: Load, draw: Draw, tmp_path: Path) -> tuple[Any, Path]:
    engine = load("gqa", **OPTIONS)
    stream = engine.stream()
    stream.feed(draw(100))
    stream.save(tmp_path / "good.session")
    return engine, tmp_path / "good.session"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("empty", "not an edge-stream session"),
        ("text", "not an edge-stream session"),
        ("half", "cut short"),
        ("flipped", "checksum"),
        ("longer", "bytes follow"),
        ("newer", "version 4"),
        ("missing", "No such file"),
        ("folder", "not a regular file"),
    ],
)
def test_bad_files(name: str, match: str, saved: tuple[Any, Path], tmp_path: Path) -> None:
    engine, path = saved
    good = path.read_bytes()
    bad = tmp_path / "bad"
    contents = {
        "empty": b"",
        "text": b"hello, this is a text\n" * 10,
        "half": good[: len(good) // 2],
        "flipped": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "longer": good + b"x",
        "newer": good[:8] + b"\x04" + good[9:],
    }
    if name == "folder":
        bad.mkdir()
    elif name in contents:
        bad.write_bytes(contents[name])
    with pytest.raises(SessionError, match=match):
        engine.restore(bad)
    if name in contents:
        assert bad.read_bytes() == contents[name]
    with engine.restore(path) as stream:  # the engine is as good as before
        assert stream.stats.n_past == 100


CELL = struct.Struct("<iIi")  # position, number of sequences, sequence
POSITIONS = {  # what is at the cells that were at the positions 20 and 40
    "one position twice": (20, 20),
    "exchanged": (40, 20),  # as good: cells are in no order
    "one far behind": (20, 1 << 30),
    "one at no position": (-1, 40),
    "one negative": (20, -7),
    "one at the last of all": (20, (1 << 31) - 1),
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("model", ["gqa", "gemma3"])
def test_cells_whose_positions_contradict_each_other_are_refused(
    name: str, model: str, load: Load, draw: Draw, tmp_path: Path
) -> None:
    def moved(keys: bytes) -> bytes:
        out, at = bytearray(keys), 16  # after magic, sequence, numbers of streams and of cells
        new = dict(zip((20, 40), POSITIONS[name], strict=True))
        for _ in range(struct.unpack_from("<I", keys, 12)[0]):
            position, n, sequence = CELL.unpack_from(keys, at)
            assert n == 1
            CELL.pack_into(out, at, new.pop(position, position), n, sequence)
            at += CELL.size
        assert not new
        return bytes(out)

    engine = load(model, **OPTIONS)
    with engine.stream() as stream:
        stream.feed(draw(50))
        stream.save(tmp_path / "good")
    (tmp_path / "bad").write_bytes(rewritten((tmp_path / "good").read_bytes(), b"KEYS", moved))
    if name == "exchanged":
        engine.restore(tmp_path / "bad").close()
        return
    with pytest.raises(EdgeStreamError, match=r"other positions|refused the cache"):
        engine.restore(tmp_path / "bad")
    with engine.restore(tmp_path / "good") as stream:
        assert stream.stats.n_past == 50


@pytest.mark.parametrize("state", [(1, -7, 0), (1, 20, 0), (1, (1 << 31) - 1, 0), (2, 49, 0), (0, 49, 0), (1, 49, 1)])
def test_a_recurrent_state_that_contradicts_its_stream_is_refused(
    state: tuple[int, int, int], made: Callable[[str], Path], load: Load, draw: Draw, tmp_path: Path
) -> None:
    def changed(keys: bytes) -> bytes:
        before = struct.pack("<IiI", 1, 49, 0)  # number of states; position, number of sequences
        assert keys.count(before) == 1
        return keys.replace(before, struct.pack("<IiI", *state))

    with Engine.load(str(made("granitehybrid")), n_ctx=64, n_keep=4, n_threads=1) as engine:
        with engine.stream() as stream:
            stream.feed(draw(50))
            stream.save(tmp_path / "good")
        (tmp_path / "bad").write_bytes(rewritten((tmp_path / "good").read_bytes(), b"KEYS", changed))
        with pytest.raises(EdgeStreamError, match=r"other positions|refused the cache"):
            engine.restore(tmp_path / "bad")
        with engine.restore(tmp_path / "good") as stream:
            assert stream.stats.n_past == 50


def test_foreign_model_and_cache_type(saved: tuple[Any, Path], load: Load) -> None:
    _, path = saved
    with pytest.raises(SessionError, match="another model"):
        load("mha", **OPTIONS).restore(path)
    with pytest.raises(SessionError, match="cache types"):
        load("gqa", **OPTIONS, cache_type_k="f16").restore(path)


def test_unwritable_folder(saved: tuple[Any, Path], tmp_path: Path) -> None:
    engine, path = saved
    with engine.restore(path) as stream, pytest.raises(SessionError, match="cannot write session"):
        stream.save(tmp_path / "none" / "s")


def test_a_link_is_followed(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """A chain of links, relative and absolute, to a file that is not there yet, and then to one that is."""
    engine, path = saved
    (tmp_path / "there").mkdir()
    real, link, chain = tmp_path / "there" / "real", tmp_path / "there" / "link", tmp_path / "chain"
    link.symlink_to("real")
    chain.symlink_to(link)
    with engine.restore(path) as stream:
        for n in (100, 101):
            stream.save(chain)
            assert peek_session(chain)[0].n_past == n
            assert chain.is_symlink() and link.is_symlink() and not real.is_symlink()
            assert sorted(p.name for p in real.parent.iterdir()) == ["link", "real"]
            stream.feed([5])


def test_what_is_no_file_is_not_replaced(saved: tuple[Any, Path], tmp_path: Path) -> None:
    engine, path = saved
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(p.name for p in tmp_path.iterdir())
    with engine.restore(path) as stream:
        for name in ("pipe", "to-pipe", "folder"):
            with pytest.raises(SessionError, match=f"cannot write session .*{name}: not a regular file"):
                stream.save(tmp_path / name)
        with pytest.raises(SessionError, match=r"cannot write session .*loop: Too many levels of symbolic links"):
            stream.save(tmp_path / "loop")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "to-pipe").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


SAVE_LOOP = """
import resource, signal, sys
from edge_stream import Engine, SessionError
model, path, mode = sys.argv[1:]
engine = Engine.load(model, n_ctx=64, n_threads=1, cache_type_k="f32", cache_type_v="f32", flash_attn="off")
stream = engine.stream()
stream.feed(list(range(10, 110)))
stream.save(path, b"first")
if mode == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        stream.save(path, b"second")
    except SessionError as error:
        print(error)
else:
    print("ready", flush=True)
    while True:
        stream.feed([20])
        stream.save(path, b"later")
"""


def test_full_disk_keeps_the_old_session(tiny: Any, load: Load, tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-c", SAVE_LOOP, str(tiny("gqa")), str(path), "full"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full" in out.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    with load("gqa", n_ctx=64).restore(path) as stream:
        assert stream.user == b"first"


def test_what_a_killed_process_was_saving_is_removed(saved: tuple[Any, Path], tmp_path: Path) -> None:
    engine, path = saved
    killed, alive, other = (tmp_path / name for name in ("good.session.tmp-1", "good.session.tmp-2", "good.tmp-1"))
    for file in (killed, alive, other):
        file.write_bytes(b"half")
    with alive.open() as lock, engine.restore(path) as stream:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stream.save(path)
        assert set(tmp_path.iterdir()) == {path, alive, other}


def test_kill_while_saving(tiny: Any, load: Load, tmp_path: Path) -> None:
    """kill -9 at any moment leaves a whole session."""
    engine = load("gqa", n_ctx=64)
    path = tmp_path / "s"
    for i in range(5):
        command = [sys.executable, "-c", SAVE_LOOP, str(tiny("gqa")), str(path), "loop"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.03 * i)
            os.kill(process.pid, signal.SIGKILL)
        with engine.restore(path) as stream:
            assert stream.user in (b"first", b"later")
            assert stream.stats.n_past >= 100
