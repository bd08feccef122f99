"""Which warning events are worth a request."""

from __future__ import annotations

from datetime import timedelta

from ckpt2pt_operator.rules.seen import wants_warnings
from simulation import World


def test_a_job_without_pods_is_asked_about_after_a_while() -> None:
    world = World()
    world.settle()
    uid = world.jobs["demo-1"]["metadata"]["uid"]
    assert wants_warnings(world.look()) == ()
    world.now += timedelta(seconds=11)
    assert wants_warnings(world.look()) == (uid,)
    world.control()
    assert uid not in wants_warnings(world.look())
    world.jobs["demo-1"]["spec"]["suspend"] = True
    world.pods.clear()
    assert wants_warnings(world.look()) == ()


def test_pods_that_do_not_start_are_asked_about_three_at_most() -> None:
    world = World()
    world.run()
    world.now += timedelta(seconds=11)
    assert len(wants_warnings(world.look())) == 3
    world.start(0, 1, 2, 3)
    assert wants_warnings(world.look()) == ()


def test_pods_of_a_job_that_is_gone_do_not_hide_the_next_one() -> None:
    world = World()
    world.run()
    world.start(0)
    world.delete_job("demo-1")
    orphan = dict(world.pods)
    world.reap()
    world.run()
    world.pods = {name: pod for name, pod in orphan.items() if pod["status"]["phase"] == "Running"}
    world.now += timedelta(seconds=11)
    assert world.jobs["demo-1"]["metadata"]["uid"] in wants_warnings(world.look())
