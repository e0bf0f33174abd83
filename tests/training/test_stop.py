"""When a stop may come too late for its checkpoint."""

from smalti.training.stop import outlasts_the_grace


def test_two_saves_must_fit_into_the_grace_of_a_launcher():
    assert outlasts_the_grace(15.0) is None
    assert outlasts_the_grace(15.1).startswith("a save took 15 s")
    assert "kill after 30 s" in outlasts_the_grace(100.0)
