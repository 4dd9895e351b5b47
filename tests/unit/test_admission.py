"""Jobs get a warm chain one after another, in the order in which they came, and a dead driver keeps nobody waiting."""

from m2ray.chain.admission import Admission, Visitor

FIRST, SECOND, THIRD = (Visitor(f"ticket-{number}", f"driver-{number}", f"job {number}") for number in (1, 2, 3))


def in_line() -> Admission:
    admission = Admission()
    assert admission.ask(FIRST) is None
    assert admission.ask(SECOND) == FIRST
    assert admission.ask(THIRD) == FIRST
    return admission


def test_jobs_get_the_chain_in_the_order_in_which_they_came() -> None:
    admission = in_line()
    assert (admission.admitted, admission.waiting) == (FIRST, 2)
    assert admission.leave(FIRST.ticket), "it had the chain"
    assert admission.ask(THIRD) == SECOND, "whoever asks first is not before who came first"
    assert admission.ask(SECOND) is None


def test_a_job_that_does_not_wait_any_more_leaves_the_line() -> None:
    admission = in_line()
    assert not admission.leave(SECOND.ticket)
    assert admission.leave(FIRST.ticket)
    assert admission.ask(THIRD) is None
    assert not admission.leave("nobody's")


def test_the_places_of_a_dead_driver_are_given_up() -> None:
    admission = in_line()
    assert not admission.forget({SECOND.driver}), "it only waited"
    assert admission.forget({FIRST.driver, "another"})
    assert (admission.admitted, admission.waiting) == (THIRD, 0)
    assert not admission.forget({THIRD.driver + "0"})
    assert admission.forget({THIRD.driver})
    assert admission.admitted is None


def test_a_job_that_is_still_looked_at_has_no_place_in_the_line() -> None:
    admission = Admission()
    for ends in (lambda: admission.leave(FIRST.ticket), lambda: admission.forget({FIRST.driver})):
        admission.expect(FIRST)
        assert admission.is_expected
        assert admission.ask(SECOND) is None, "it keeps nobody waiting"
        assert admission.leave(SECOND.ticket)
        assert not ends(), "it had not the chain"
        assert not admission.is_expected
