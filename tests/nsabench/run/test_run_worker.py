"""What a worker and its driver have in common: a board, and messages in a pipe."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsabench.plan import Cell
from nsabench.run import worker
from nsabench.run.worker import Board, _Speaker, receive, send, split

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def boards() -> Iterator[tuple[Board, Board]]:
    """One board, seen from two sides."""
    memory = os.memfd_create("board")
    os.truncate(memory, Board.BYTES)
    yield Board(memory), Board(memory)
    os.close(memory)


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def set_to(seconds: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: seconds)

    return set_to


def test_time_is_charged_to_the_marked_cell(
    boards: tuple[Board, Board], now: Callable[[float], None]
) -> None:
    mine, seen = boards
    mine.clear()
    assert seen.place == Board.UNTOUCHED
    for at, place in ((10.0, Board.EVERY), (11.0, 0), (13.0, 1), (16.0, 0)):
        now(at)
        mine.mark(place)
    assert (seen.place, seen.marked, seen.spent) == (0, 16.0, 2.0)
    now(20.0)
    mine.pause()
    assert (seen.marked, seen.spent) == (20.0, 6.0)
    now(50.0)
    mine.resume()
    assert (seen.place, seen.marked, seen.spent) == (0, 50.0, 6.0)
    mine.mark(1)
    assert seen.spent == 3.0
    seen.clear()
    assert (mine.place, mine.marked, mine.spent) == (Board.UNTOUCHED, 0.0, 0.0)


def test_a_group_larger_than_the_board_is_not_timed_but_told_apart(boards: tuple[Board, Board]) -> None:
    mine, seen = boards
    mine.clear()
    mine.mark(10**6)
    mine.mark(10**6 + 1)
    assert (seen.place, seen.spent) == (10**6 + 1, 0.0)


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 50))
def test_messages_come_whole_and_in_order(messages: list[bytes], size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            send(ours, message)
        ours.shutdown(socket.SHUT_WR)
        buffer, found = bytearray(), []
        while part := theirs.recv(size):
            buffer += part
            found += split(buffer)
    assert found == messages
    assert buffer == b""


def test_a_message_is_waited_for(pair: Pair) -> None:
    ours, theirs = pair
    send(ours, ("a", [1, 2]))
    send(ours, "b")
    assert receive(theirs) == ("a", [1, 2])
    assert receive(theirs) == "b"
    ours.sendall(struct.pack("!Q", 100) + b"cut short")
    ours.close()
    with pytest.raises(EOFError):
        receive(theirs)


def test_waiting_for_the_driver_is_nobodys_time(
    pair: Pair,
    boards: tuple[Board, Board],
    now: Callable[[float], None],
    make_cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answered_late(channel: object) -> None:
        now(100.0)

    monkeypatch.setattr(worker, "receive", answered_late)
    cells = [make_cell(route=route) for route in ("a", "b")]
    speaker = _Speaker(pair[0], boards[0])
    now(1.0)
    speaker.begin(cells)
    assert boards[1].place == Board.EVERY
    speaker.mark(cells[1])
    now(3.0)
    speaker.doing("something")
    assert (boards[1].place, boards[1].spent, boards[1].marked) == (1, 2.0, 100.0)
