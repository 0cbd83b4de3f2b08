"""What these tests share with those of the method."""

from tests.conftest import (  # noqa: F401
    _restore_defaults,
    device,
    mnist_root,
    pytest_runtest_call,
    smooth,
    toy,
    toy_on_device,
)
