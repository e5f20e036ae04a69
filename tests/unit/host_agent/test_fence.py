"""Whoever closes the fence is called back when nobody is inside, except if the fence is opened
before that. A permit that was given before the fence was closed never enters again."""

import pytest

from host_agent.memory.fence import Fence, FenceClosed


def test_a_closed_fence_lets_nothing_in() -> None:
    fence, empty = Fence(), []
    fence.close(lambda: empty.append(1))
    assert empty
    with pytest.raises(FenceClosed), fence.inside(fence.permit()):
        pass


def test_who_closes_it_waits_for_who_is_inside() -> None:
    fence, empty = Fence(), []
    with fence.inside(fence.permit()):
        fence.close(lambda: empty.append(1))
        assert not empty
    assert len(empty) == 1


def test_a_batch_of_before_does_not_go_on_when_it_is_open_again() -> None:
    fence = Fence()
    old = fence.permit()
    fence.close(lambda: None)
    fence.open()
    with pytest.raises(FenceClosed), fence.inside(old):
        pass
    with fence.inside(fence.permit()):
        pass


def test_who_closed_it_is_not_called_after_it_was_opened_again() -> None:
    fence, empty = Fence(), []
    with fence.inside(fence.permit()):
        fence.close(lambda: empty.append(1))
        fence.open()
    assert not empty
