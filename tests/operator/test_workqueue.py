"""The queue: each key once, one at a time, in time, later after each failure."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from ckpt2pt_operator.workqueue import Turns, WorkQueue


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def nothing_comes(queue: WorkQueue[str], seconds: float = 0.05) -> bool:
    try:
        await asyncio.wait_for(queue.get(), seconds)
    except TimeoutError:
        return True
    return False


def test_a_key_that_is_added_often_waits_once() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue(len)
        for _ in range(1000):
            queue.add("a")
        assert len(queue) == 1
        assert (await queue.get())[0] == "a"
        assert await nothing_comes(queue)

    run(work())


def test_a_key_that_changes_while_it_is_handled_is_handled_again_and_never_twice_at_a_time() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue(len)
        queue.add("a")
        await queue.get()
        queue.add("a")
        assert await nothing_comes(queue), "it is being handled"
        queue.done("a")
        assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
        queue.done("a")
        assert await nothing_comes(queue)

    run(work())


def test_a_later_time_does_not_put_off_an_earlier_one_and_an_earlier_one_counts() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue(len)
        queue.add("a", 0.0)
        queue.add("a", 60.0)
        assert (await asyncio.wait_for(queue.get(), 1))[0] == "a"
        queue.done("a")
        queue.add("b", 60.0)
        assert await nothing_comes(queue)
        queue.add("b")
        assert (await asyncio.wait_for(queue.get(), 1))[0] == "b"

    run(work())


def test_keys_come_when_they_are_due() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue(len)
        queue.add("late", 0.2)
        queue.add("soon", 0.1)
        assert queue.ready(asyncio.get_running_loop().time()) == 0
        found = [(await queue.get())[0] for _ in range(2)]
        assert found == ["soon", "late"]

    run(work())


def test_pauses_double_with_failures_in_a_row_up_to_two_minutes() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue(len)
        pauses = [queue.retry("a") for _ in range(12)]
        for number, pause in enumerate(pauses):
            wanted = min(0.5 * 2**number, 120)
            assert 0.8 * wanted <= pause <= 1.2 * wanted
        queue.forget("a")
        assert queue.retry("a") <= 0.6
        assert queue.retry("a", at_least=30) == 30

    run(work())


def test_what_is_discarded_does_not_come() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue(len)
        queue.add("a")
        queue.discard("a")
        assert await nothing_comes(queue)
        assert len(queue) == 0

    run(work())


@pytest.mark.parametrize("workers", [1, 4])
def test_no_change_is_lost_whatever_the_order(workers: int) -> None:
    async def work() -> None:
        queue: WorkQueue[int] = WorkQueue(lambda key: key % 3)
        version, handled, busy = [0] * 20, [0] * 20, set[int]()

        async def worker() -> None:
            while True:
                key, _ = await queue.get()
                assert key not in busy
                busy.add(key)
                seen = version[key]
                await asyncio.sleep(0.001 * (key % 3))
                handled[key] = seen
                busy.discard(key)
                queue.done(key)

        tasks = [asyncio.create_task(worker()) for _ in range(workers)]
        for step in range(400):
            version[step * 7 % 20] += 1
            queue.add(step * 7 % 20)
            if step % 5 == 0:
                await asyncio.sleep(0.001)
        while handled != version:
            assert not any(task.done() for task in tasks)
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()

    run(work())


def test_one_key_of_a_group_waits_for_one_key_of_each_other_group_and_not_for_all() -> None:
    """2,000 conversions of one namespace, all due before the one of another."""

    async def work() -> None:
        queue: WorkQueue[tuple[str, int]] = WorkQueue(lambda key: key[0])
        for number in range(2000):
            queue.add(("many", number))
        await asyncio.sleep(0.01)
        queue.add(("one", 0))
        queue.add(("two", 0))
        queue.add(("two", 1))
        order = [(await queue.get())[0] for _ in range(8)]
        assert order[:5] == [("many", 0), ("one", 0), ("two", 0), ("many", 1), ("two", 1)]
        assert order[5:] == [("many", 2), ("many", 3), ("many", 4)], "within a group the first comes first"

    run(work())


def test_a_group_whose_key_comes_later_is_served_before_those_that_had_their_turn() -> None:
    async def work() -> None:
        queue: WorkQueue[tuple[str, int]] = WorkQueue(lambda key: key[0])
        for number in range(100):
            queue.add(("many", number))
        taken = [(await queue.get())[0] for _ in range(10)]
        queue.add(("late", 0))
        assert ("late", 0) in [(await queue.get())[0] for _ in range(2)]
        assert len(taken) == 10

    run(work())


def test_groups_take_turns_and_within_one_the_first_comes_first() -> None:
    turns: Turns[str] = Turns()
    for group, item in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")):
        turns.add(group, item)
    found = []
    while turns:
        found.append(turns.take())
    assert found == ["a1", "b1", "c1", "a2", "b2", "a3"]
    with pytest.raises(StopIteration):
        turns.take()
